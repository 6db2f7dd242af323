"""Internal snapshots: beside the real tools, against a model, through power failures and errors."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blocklayer
from blocklayer.api.disk import Disk
from blocklayer.errors import BlockError, LockedError, StorageError, UnsupportedError, UsageError
from blocklayer.graph import snapshots
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.root import Root
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.crashing import CrashingDisk, State
from blocklayer.testing.model import Chain, difference
from blocklayer.testing.strategies import Request
from cli.runs import ours, theirs
from effort import examples
from oracles import Oracle
from proof.crashes import Bench, check, moments, new_image, spread, survive, take
from qcow2.images import run

KIB = 1024
CLUSTER = 512
STATES = 100

SHAPES: dict[str, list[str]] = {
    "default": [],
    "tiny clusters": ["cluster_size=512"],
    "version 2": ["compat=0.10", "cluster_size=1024"],
    "wide refcounts": ["refcount_bits=64", "cluster_size=512"],
    "narrow refcounts": ["refcount_bits=8", "cluster_size=2048"],
    "lazy refcounts": ["lazy_refcounts=on", "cluster_size=4096"],
    "extended L2": ["extended_l2=on", "cluster_size=16k"],
}


@pytest.fixture(params=SHAPES)
def image(
    request: pytest.FixtureRequest, qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path
) -> Path:
    """An image with data, zeros and, where it can, compressed clusters, in several L2 tables."""
    path = tmp_path / "image.qcow2"
    options = [word for option in SHAPES[request.param] for word in ("-o", option)]
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "4M")
    for command in ("write -P 1 0 100k", "write -P 2 3M 200k", "write -z 64k 16k",
                    "write -c -P 3 1M 64k"):  # fmt: skip
        qemu_io("-f", "qcow2", "-c", command, path)
    return path


def shown_by_qemu(qemu_img: Oracle, image: Path, identifier: str) -> bytes:
    """The content of a snapshot, according to the real tool."""
    target = image.with_suffix(".raw")
    qemu_img("convert", "-l", f"snapshot.id={identifier}", "-O", "raw", image, target)
    return target.read_bytes()


def shown_by_us(image: Path, identifier: str | None = None) -> bytes:
    with blocklayer.open(image, snapshot=identifier) as disk:
        return disk.read(0, disk.size)


def sound(qemu_img: Oracle, image: Path) -> None:
    """Neither corruptions nor leaks."""
    done = qemu_img("check", image, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ours_for_qemu(image: Path, qemu_img: Oracle) -> None:
    with blocklayer.open(image, writable=True) as disk:
        contents = {"1": disk.read(0, disk.size)}
        assert disk.create_snapshot("first").id == "1"
        disk.write(50 * KIB, b"x" * 100 * KIB)
        disk.write_zeroes(3 * 1024 * KIB, 10 * KIB, unmap=True)
        contents["2"] = disk.read(0, disk.size)
        disk.create_snapshot("second")
        disk.write(0, b"y" * KIB)
        now = disk.read(0, disk.size)
    sound(qemu_img, image)
    for identifier, content in contents.items():
        assert shown_by_qemu(qemu_img, image, identifier) == content
        assert shown_by_us(image, identifier) == content
    assert shown_by_us(image) == now
    with blocklayer.open(image, writable=True) as disk:
        disk.apply_snapshot("first")
        assert disk.read(0, disk.size) == contents["1"]
    sound(qemu_img, image)
    assert shown_by_qemu(qemu_img, image, "2") == contents["2"]
    qemu_img("snapshot", "-a", "2", image)
    sound(qemu_img, image)
    assert shown_by_us(image) == contents["2"]
    with blocklayer.open(image, writable=True) as disk:
        disk.delete_snapshot("1")
        assert [each.name for each in disk.snapshots()] == ["second"]
        assert disk.read(0, disk.size) == contents["2"]
    sound(qemu_img, image)
    qemu_img("snapshot", "-d", "second", image)
    sound(qemu_img, image)
    assert shown_by_us(image) == contents["2"]


def test_qemus_for_us(image: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    contents = {"1": shown_by_us(image)}
    qemu_img("snapshot", "-c", "one", image)
    qemu_io("-f", "qcow2", "-c", "write -P 9 20k 1200k", image)
    contents["2"] = shown_by_us(image)
    qemu_img("snapshot", "-c", "two", image)
    qemu_io("-f", "qcow2", "-c", "write -z -u 0 2M", image)
    now = shown_by_us(image)
    for identifier, content in contents.items():
        assert shown_by_us(image, identifier) == content
    with blocklayer.open(image, writable=True) as disk:
        disk.delete_snapshot("1")
        assert disk.read(0, disk.size) == now
    sound(qemu_img, image)
    assert shown_by_qemu(qemu_img, image, "2") == contents["2"]
    with blocklayer.open(image, writable=True) as disk:
        disk.apply_snapshot("two")
    sound(qemu_img, image)
    assert shown_by_us(image) == contents["2"]
    with blocklayer.open(image, writable=True) as disk:
        disk.delete_snapshot("two")
    sound(qemu_img, image)
    assert shown_by_us(image) == contents["2"]
    # Nothing is shared any more: writes go in place again.
    size = image.stat().st_size
    with blocklayer.open(image, writable=True) as disk:
        disk.write(20 * KIB, b"z" * 40 * KIB)
    assert image.stat().st_size <= size
    sound(qemu_img, image)


def test_the_size_goes_back(tmp_path: Path, qemu_img: Oracle) -> None:
    image = tmp_path / "image.qcow2"
    blocklayer.create(image, 100 * KIB, cluster_size=512)
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"s" * 100 * KIB)
        disk.create_snapshot("small")
        disk.resize(5000 * KIB)
        disk.write(4000 * KIB, b"l" * 100 * KIB)
        disk.create_snapshot("large")
        disk.apply_snapshot("small")
        assert disk.size == 100 * KIB
        disk.write(0, b"t")
    sound(qemu_img, image)
    assert shown_by_us(image) == b"t" + b"s" * (100 * KIB - 1)
    large = shown_by_us(image, "large")
    assert len(large) == 5000 * KIB
    with blocklayer.open(image, writable=True) as disk:
        disk.apply_snapshot("large")
        disk.delete_snapshot("small")
    sound(qemu_img, image)
    assert shown_by_us(image) == large


def test_refusals(tmp_path: Path) -> None:
    image, raw = tmp_path / "image.qcow2", tmp_path / "image.raw"
    blocklayer.create(image, 100 * KIB, refcount_bits=1, cluster_size=512)
    blocklayer.create(raw, 100 * KIB, format="raw")
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"x" * 5000)
        with pytest.raises(UnsupportedError, match="refcount"):
            disk.create_snapshot("x")
        disk.write(0, b"y" * 5000)
        with pytest.raises(StorageError, match="no snapshot 'x'"):
            disk.apply_snapshot("x")
        with pytest.raises(UsageError, match="longer than"):
            disk.create_snapshot("x" * 70000)
    with blocklayer.open(image) as disk:
        assert disk.read(0, 5000) == b"y" * 5000
        with pytest.raises(StorageError, match="read-only"):
            disk.create_snapshot("x")
    with (
        blocklayer.open(raw, format="raw", writable=True) as disk,
        pytest.raises(UnsupportedError, match="'raw' does not support"),
    ):
        disk.create_snapshot("x")
    blocklayer.create(image, 100 * KIB)
    with blocklayer.open(image, writable=True) as disk:
        disk.create_snapshot("x")
    with pytest.raises(UsageError, match="read-only"):
        blocklayer.open(image, writable=True, snapshot="x")


def test_permission_is_needed(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    blocklayer.create(image, 100 * KIB)

    async def main() -> None:
        async with await Disk.open(image, writable=True) as disk:
            reader = Root(disk.root.node, "a reader", 0)
            with pytest.raises(LockedError, match="permission to write"):
                await snapshots.create(reader, "x")
            await reader.close()

    run(main())


def test_unknown_extra_data_is_kept(tmp_path: Path, qemu_img: Oracle) -> None:
    """What a later version may add to an entry is still there when others are added and go."""
    image = tmp_path / "image.qcow2"
    blocklayer.create(image, 100 * KIB)
    with blocklayer.open(image, writable=True) as disk:
        disk.create_snapshot("one")
        entry = disk.aio.root.node.driver.image.snapshots[0]  # type: ignore[attr-defined]
        entry.extra_data += b"what is to come!"
        disk.create_snapshot("two")
    with blocklayer.open(image, writable=True) as disk:
        disk.delete_snapshot("two")
    assert b"what is to come!" in image.read_bytes()
    with blocklayer.open(image) as disk:
        entry = disk.aio.root.node.driver.image.snapshots[0]  # type: ignore[attr-defined]
        assert entry.extra_data.endswith(b"what is to come!")
    sound(qemu_img, image)


def named(image: Path) -> list[tuple[str, str]]:
    with blocklayer.open(image) as disk:
        return [(each.id, each.name) for each in disk.snapshots()]


SAME = """
snapshot {}
snapshot -l {}
snapshot -q -l {}
snapshot -U -l {}
snapshot --list -f qcow2 {}
snapshot --image-opts driver=qcow2,file.filename={}
snapshot -c new {}
snapshot -c '' {}
snapshot -a 2 {}
snapshot -a one {}
snapshot -d 2 {}
snapshot -d 1 {}
snapshot -d nope {}
snapshot -a nope {}
snapshot -l -c x {}
snapshot -c x -c y {}
snapshot -U -c x {}
snapshot -c
snapshot -l
snapshot -c x {} {}
snapshot -c x -f raw {}
snapshot -a x -f raw {}
snapshot -d x -f raw {}
snapshot -l nofile
convert -l one -O raw {} out
convert -l 2 -O raw {} out
convert --snapshot snapshot.name=2 -O raw {} out
convert -l snapshot.id=2 -O raw {} out
convert -l snapshot.id=2,snapshot.name=one -O raw {} out
convert -l nope -O raw {} out
convert -l one -O raw {} {} out
convert -l one -f raw -O raw {} out
"""


@pytest.mark.parametrize("line", SAME.strip().splitlines())
def test_the_command_line(line: str, tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    name = "image.qcow2"
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        folder.mkdir()
    mine, other = tmp_path / "ours" / name, tmp_path / "theirs" / name
    qemu_img("create", "-q", "-f", "qcow2", mine, "1M")
    for number, label in enumerate(("one", "2", "1"), 1):
        qemu_io("-f", "qcow2", "-c", f"write -P {number} 0 {number * 100}k", mine)
        qemu_img("snapshot", "-c", label, mine)
    shutil.copy(mine, other)
    line = line.replace("{}", name)
    found, expected = ours(line, mine.parent), theirs(qemu_img, line, other.parent)
    assert (found.code, found.out) == (expected.code, expected.out)
    assert found.err.replace("blk img", "qemu-img") == expected.err
    assert named(mine) == named(other)
    assert shown_by_us(mine) == shown_by_us(other)
    if expected.code == 0 and line.startswith("convert"):
        assert (mine.parent / "out").read_bytes() == (other.parent / "out").read_bytes()
    sound(qemu_img, mine)


DISK = 90 * KIB

steps = st.one_of(
    st.tuples(
        st.sampled_from(("write", "write", "write", "zero", "unmap")),
        st.integers(0, DISK - 1),
        st.integers(1, 20 * KIB),
    ),
    st.tuples(st.just("compress"), st.integers(0, DISK // CLUSTER - 1), st.just(CLUSTER)),
    st.tuples(st.sampled_from(("create", "create", "flush", "reopen")), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(("apply", "delete")), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("resize"), st.integers(1, 2 * DISK // CLUSTER), st.just(0)),
)


class Model:
    """The disk and its snapshots, as bytes."""

    def __init__(self, root: Root, disk: CrashingDisk) -> None:
        self.root, self.disk = root, disk
        self.chain = Chain(DISK)
        self.kept: dict[str, bytes] = {}
        self.made = 0

    async def step(self, kind: str, at: int, length: int) -> None:
        if kind in ("write", "zero", "unmap", "compress"):
            await self._request(kind, at, length)
        elif kind == "resize":
            if self.root.node.driver.image.header.version > 2 or not self.kept:  # type: ignore[attr-defined]
                self.chain.resize(at * CLUSTER)
                await self.root.truncate(at * CLUSTER, shrink=True)
        elif kind == "flush":
            await self.root.flush()
        elif kind == "reopen":
            await self.reopen()
        elif kind == "create":
            await self._create()
        elif self.kept:
            identifier = list(self.kept)[at % len(self.kept)]
            found = snapshots.get(self.root.node, identifier)
            if kind == "delete":
                await snapshots.delete(self.root, found)
                del self.kept[identifier]
            elif await self._allowed(snapshots.apply(self.root, found)):
                self.chain.resize(len(self.kept[identifier]))
                self.chain.write(0, self.kept[identifier])

    async def _request(self, kind: str, at: int, length: int) -> None:
        size = self.root.node.size
        unit = self.root.node.driver.allocation_unit  # type: ignore[attr-defined]
        at, length = (at * unit, unit) if kind == "compress" else (at, length)
        length = min(length, size - at)
        if length <= 0:
            return
        self.made += 1
        request = Request(kind, at, length, self.made % 255 + 1)
        request.apply(self.chain)
        await apply(self.root, request)

    async def _create(self) -> None:
        self.made += 1
        if await self._allowed(snapshots.create(self.root, f"n{self.made}")):
            newest = snapshots.listed(self.root.node)[-1]
            self.kept[newest.id] = self.chain.visible()

    async def _allowed(self, change: Awaitable[Any]) -> bool:
        """False if narrow refcounts do not let it be."""
        try:
            await change
        except UnsupportedError:
            assert self.root.node.driver.image.geometry.refcount_bits <= 4  # type: ignore[attr-defined]
            return False
        return True

    async def reopen(self) -> None:
        await self.root.close()
        self.root = await take(self.disk)

    async def compare(self) -> None:
        assert await read_all(self.root) == self.chain.visible(), "the disk"
        assert [each.id for each in snapshots.listed(self.root.node)] == list(self.kept)
        await self.root.close()
        for identifier, content in self.kept.items():
            await holds(self.disk, identifier, content)
        self.root = await take(self.disk)
        found = await check(self.root)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        await self.root.close()


async def shown(disk: CrashingDisk, identifier: str) -> bytes:
    root = await take(disk, writable=False)
    try:
        await snapshots.load(root.node, snapshots.get(root.node, identifier))
        return await read_all(root)
    finally:
        await root.close()


async def holds(disk: CrashingDisk, identifier: str, content: bytes, when: object = "") -> None:
    """The snapshot reads as ``content``."""
    found = await shown(disk, identifier)
    assert found == content, f"{when} snapshot {identifier}: {difference(found, content)}"


@settings(max_examples=examples(20))
@given(
    st.sampled_from(
        (
            {},
            {"refcount_bits": 1},
            {"refcount_bits": 2},
            {"refcount_bits": 4},
            {"refcount_bits": 64},
            {"compat": "0.10"},
            {"lazy_refcounts": True},
            {"extended_l2": True, "cluster_size": 16 * KIB},
        )
    ),
    st.lists(steps, max_size=25),
)
def test_against_a_model(options: dict[str, Any], wanted: list[tuple[str, int, int]]) -> None:
    async def main() -> None:
        disk = await new_image(DISK, **options)
        model = Model(await take(disk), disk)
        for step in wanted:
            await model.step(*step)
        await model.compare()

    run(main())


Change = Callable[[Root], Awaitable[Any]]


def on(name: str, change: Callable[[Root, SnapshotInfo], Awaitable[None]]) -> Change:
    return lambda root: change(root, snapshots.get(root.node, name))


CHANGES: dict[str, Change] = {
    "create": lambda root: snapshots.create(root, "new"),
    "apply the first": on("first", snapshots.apply),
    "apply the second": on("second", snapshots.apply),
    "delete the first": on("first", snapshots.delete),
    "delete the second": on("second", snapshots.delete),
}

CRASHING: dict[str, dict[str, Any]] = {
    "plain": {},
    "version 2": {"compat": "0.10"},
    "lazy refcounts": {"lazy_refcounts": True},
    "wide refcounts": {"refcount_bits": 64},
    "extended L2": {"extended_l2": True, "cluster_size": 16 * KIB},
}


async def with_snapshots(**options: Any) -> tuple[CrashingDisk, dict[str, bytes]]:
    """An image with two snapshots and newer data, and what those hold."""
    disk = await new_image(60 * KIB, **options)
    root = await take(disk)
    kept = {}
    await root.write(0, b"\x11" * 30 * CLUSTER)
    await root.write(40 * KIB, b"\x12" * 10 * CLUSTER)
    await snapshots.create(root, "first")
    kept["first"] = await read_all(root)
    await root.write(5 * CLUSTER, b"\x21" * 10 * CLUSTER)
    await root.write_zeroes(20 * CLUSTER, 5 * CLUSTER)
    if "compat" not in options:
        await root.truncate(70 * KIB)
    await snapshots.create(root, "second")
    kept["second"] = await read_all(root)
    await root.write(0, b"\x31" * 8 * CLUSTER)
    await root.close()
    disk.settle()
    return disk, kept


@pytest.mark.parametrize("shape", CRASHING)
@pytest.mark.parametrize("change", CHANGES)
def test_power_failure(change: str, shape: str) -> None:
    """The old snapshots and content or the new ones, and all that is kept stays writable around."""

    async def main() -> None:
        disk, kept = await with_snapshots(**CRASHING[shape])
        bench = await Bench.open(disk)
        await bench.write(10 * KIB, 3 * CLUSTER, 4)
        before = bench.model.visible()
        old = [each.name for each in snapshots.listed(bench.root.node)]
        begun = disk.position
        if change.startswith("apply"):
            content = kept[change.rsplit(maxsplit=1)[-1]]
            bench.model.resize(len(content))
            bench.model.write(0, content)
            bench.begin(content)
        elif change == "create":
            kept = kept | {"new": before}
        await CHANGES[change](bench.root)
        ended = disk.position
        new = [each.name for each in snapshots.listed(bench.root.node)]
        assert await read_all(bench.root) == bench.model.visible()
        bench.versions.flushed()
        bench.mark()
        await bench.write(3 * CLUSTER, 20 * CLUSTER, 5)
        await bench.flush()
        await bench.root.close()
        states = spread(moments(disk), STATES)
        if "compat" not in CRASHING[shape]:
            assert await survive(bench, states) > 20
        for state in states:
            allowed = [old] if state.position < begun else [new]
            if begun <= state.position <= ended:
                allowed = [old, new]
            await judge(state, allowed, kept)

    run(main())


async def judge(state: State, allowed: list[list[str]], kept: dict[str, bytes]) -> None:
    """Snapshots are whole, and writing all of the disk, repaired or not, leaves them alone."""
    disk = state.disk()
    root = await take(disk)
    names = [each.name for each in snapshots.listed(root.node)]
    assert names in allowed, f"{state}: {names}"
    await root.write(0, b"\xee" * root.node.size)
    await root.close()
    for name in names:
        await holds(disk, name, kept[name], state)
    root = await take(disk)
    found = await check(root)
    worse = [line for line in found.messages if "OFLAG_COPIED" not in line and "ERROR" in line]
    assert not worse, f"{state}: {worse}"
    await root.close()


@pytest.mark.parametrize("kinds", [("read", "write", "flush"), ("flush",)])
@pytest.mark.parametrize("change", CHANGES)
def test_nth_failure(change: str, kinds: tuple[str, ...]) -> None:
    """The error is told; the session goes on, or refuses writes; the file has no corruption."""

    async def main() -> None:
        nth, failed = 0, 1
        while failed:
            nth += 1
            disk, kept = await with_snapshots()
            root = await take(disk)
            before = await read_all(root)
            kept = kept | {"new": before, "": before}
            disk.fail(nth, errno.EIO, kinds=kinds)
            try:
                await CHANGES[change](root)
            except BlockError:
                assert disk.failures
            failed = disk.failures
            disk.fail(0)
            after = kept[change.rsplit(maxsplit=1)[-1]] if change.startswith("apply") else before
            assert await read_all(root) in (before, after), nth
            try:
                await root.write(0, b"\x77" * 20 * CLUSTER)
                await root.flush()
            except BlockError:
                assert root.node.poisoned or root.node.children["file"].node.poisoned
            try:
                await root.close()
            except BlockError:
                assert failed
            root = await take(disk)
            found = await check(root)
            assert not found.corruptions, (nth, found.messages)
            names = [each.name for each in snapshots.listed(root.node)]
            await root.close()
            for name in names:
                await holds(disk, name, kept[name], nth)

    run(main())


@pytest.mark.parametrize("change", CHANGES)
def test_requests_meanwhile(change: str) -> None:
    """Each write comes before the change or after it, as a whole, and none is lost."""

    async def main() -> None:
        disk, kept = await with_snapshots()
        root = await take(disk)
        before = await read_all(root)
        disk.concurrent = True
        writes = [root.write(at * 1500, bytes([at + 1]) * 1500) for at in range(30)]
        half = len(writes) // 2
        await asyncio.gather(*writes[:half], CHANGES[change](root), *writes[half:])
        after = await read_all(root)
        for at in range(half, len(writes)):
            assert after[at * 1500 : (at + 1) * 1500] == bytes([at + 1]) * 1500
        await root.close()
        for name, content in kept.items():
            if change != f"delete the {name}":
                await holds(disk, name, content)
        if change == "create":
            new = await shown(disk, "new")
            for at in range(len(writes)):
                piece = new[at * 1500 : (at + 1) * 1500]
                assert piece in (bytes([at + 1]) * 1500, before[at * 1500 : (at + 1) * 1500])
        root = await take(disk)
        found = await check(root)
        assert (found.corruptions, found.leaks) == (0, 0), found.messages
        await root.close()

    run(main())
