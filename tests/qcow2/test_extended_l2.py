"""Extended L2 entries: subclusters beside qemu-img and qemu-io, and bitmaps that are broken."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocklayer.codec.qcow2.entries import COPIED, OFFSET_MASK
from blocklayer.errors import CorruptionError
from blocklayer.graph.extent import Kind
from cli.runs import ours as blk
from effort import examples
from oracles import Oracle
from proof.chains import blk_json
from proof.crashes import check as check_root
from proof.crashes import new_image, raw_disk, take
from qcow2.broken import Broken, check, compare_reports
from qcow2.images import driver_of, opened, run

KIB = 1024
CLUSTER = 64 * KIB
SUB = 2 * KIB
SIZE = 20 * CLUSTER - 3 * SUB - 512

DATA = Kind.DATA
NOTHING = Kind.UNALLOCATED


@pytest.fixture
def image(tmpfs: Path, qemu_img: Oracle) -> Path:
    """An empty image over a base full of 0xBB."""
    base, path = tmpfs / "base.raw", tmpfs / "image.qcow2"
    base.write_bytes(b"\xbb" * SIZE)
    options = ("-o", "extended_l2=on", "-b", str(base), "-F", "raw")
    qemu_img("create", "-q", "-f", "qcow2", *options, path, str(SIZE))
    return path


async def kinds(root: Any, offset: int, length: int) -> list[tuple[int, Kind]]:
    """(subclusters, kind) of each run of the range."""
    found: list[tuple[int, Kind]] = []
    end = offset + length
    while offset < end:
        extent = await root.node.driver.map(offset, end - offset)
        count = extent.length // SUB
        if found and found[-1][1] is extent.kind:
            found[-1] = (found[-1][0] + count, extent.kind)
        else:
            found.append((count, extent.kind))
        offset += extent.length
    return found


def sound(qemu_img: Oracle, path: Path) -> None:
    assert "No errors were found" in qemu_img("check", path).stdout


def test_a_write_copies_its_subclusters_only(image: Path, qemu_img: Oracle) -> None:
    async def main() -> None:
        async with opened(image) as root:
            await root.write(5 * SUB + 100, b"x" * SUB)
            assert await kinds(root, 0, CLUSTER) == [(5, NOTHING), (2, DATA), (25, NOTHING)]
            await root.write_zeroes(6 * SUB, SUB)
            await root.write_zeroes(30 * SUB, 4 * SUB)
            assert await kinds(root, 0, 2 * CLUSTER) == [
                (5, NOTHING), (1, DATA), (1, Kind.ZERO), (23, NOTHING), (4, Kind.ZERO),
                (30, NOTHING),
            ]  # fmt: skip
            await root.discard(5 * SUB, SUB)
            assert await kinds(root, 0, CLUSTER) == [
                (5, NOTHING), (2, Kind.ZERO), (23, NOTHING), (2, Kind.ZERO),
            ]  # fmt: skip

    run(main())
    sound(qemu_img, image)
    # The last subcluster with data gave the cluster back.
    assert qemu_img.json("check", "--output=json", image).get("allocated-clusters", 0) == 0


def test_two_writes_at_once_share_the_cluster(image: Path, qemu_img: Oracle) -> None:
    async def main() -> None:
        async with opened(image) as root:
            await asyncio.gather(
                *(root.write(at * 3 * SUB, bytes([at + 1]) * SUB) for at in range(10)),
                root.write_zeroes(SUB, SUB),
                root.write_zeroes(31 * SUB, SUB),
            )
            content = await root.read(0, CLUSTER)
            for at in range(10):
                assert content[at * 3 * SUB :][:SUB] == bytes([at + 1]) * SUB
            assert content[SUB : 2 * SUB] == content[31 * SUB :] == bytes(SUB)
            assert content[2 * SUB : 3 * SUB] == b"\xbb" * SUB

    run(main())
    sound(qemu_img, image)
    assert qemu_img.json("check", "--output=json", image)["allocated-clusters"] == 1


def test_a_shared_cluster_is_copied_as_far_as_it_holds_data(image: Path, qemu_img: Oracle) -> None:
    async def main(snapshot: bool) -> None:
        async with opened(image) as root:
            if not snapshot:
                await root.write(4 * SUB, b"1" * 4 * SUB)
                await root.write_zeroes(20 * SUB, SUB)
                return
            await root.write(10 * SUB, b"2" * SUB)
            assert await kinds(root, 0, CLUSTER) == [
                (4, NOTHING), (7, DATA), (9, NOTHING), (1, Kind.ZERO), (11, NOTHING),
            ]  # fmt: skip
            expected = b"\xbb" * 4 * SUB + b"1" * 4 * SUB + b"\xbb" * 2 * SUB + b"2" * SUB
            assert await root.read(0, 11 * SUB) == expected

    run(main(False))
    qemu_img("snapshot", "-c", "one", image)
    run(main(True))
    sound(qemu_img, image)


def test_zeros_in_a_part_of_a_compressed_cluster(image: Path, qemu_img: Oracle) -> None:
    async def main() -> None:
        async with opened(image) as root:
            await root.write_compressed(0, b"c" * 2 * CLUSTER)
            await root.discard(3 * SUB, 2 * SUB)
            assert (await root.node.driver.map(3 * SUB, SUB)).compressed
            await root.write_zeroes(31 * SUB, 2 * SUB)
            expected = bytearray(b"c" * 2 * CLUSTER)
            expected[31 * SUB : 33 * SUB] = bytes(2 * SUB)
            assert await root.read(0, 2 * CLUSTER) == expected
            ends = [(31, DATA), (2, Kind.ZERO), (31, DATA)]
            assert await kinds(root, 0, 2 * CLUSTER) == ends

    run(main())
    sound(qemu_img, image)


def test_zeros_are_found_by_subcluster(image: Path) -> None:
    options = f"driver=qcow2,file.filename={image},detect-zeroes=on"
    assert blk("bench -w --pattern=0 -c 3 -s 2048 -o 4096 --image-opts " + options, image.parent)
    found = blk_json("map", "--output=json", image)
    assert (found[1]["start"], found[1]["length"], found[1]["zero"]) == (4096, 3 * SUB, True)


def test_discarded_subclusters_give_their_space_back(image: Path) -> None:
    async def main() -> None:
        async with opened(image) as root:
            await root.write(0, b"x" * 4 * CLUSTER)
            await root.flush()
            before = image.stat().st_blocks
            await root.discard(SUB * 2, 28 * SUB)
            await root.discard(2 * CLUSTER + 2 * SUB, 28 * SUB)
            given_back = (before - image.stat().st_blocks) * 512
            assert given_back >= 2 * 27 * SUB

    run(main())


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation(tmpfs: Path, qemu_img: Oracle, mode: str, backed: bool) -> None:
    (tmpfs / "base.raw").write_bytes(b"\xbb" * (300 * KIB))
    backing = "-b base.raw -F raw" if backed else ""
    create = f"create -q -f qcow2 -o extended_l2=on,preallocation={mode} {backing}"
    for name in ("ours", "theirs"):
        line = f"{create} {name} 1M"
        if name == "ours":
            assert blk(line, tmpfs) == (0, "", "")
        else:
            qemu_img(*line.split(), cwd=tmpfs)
        sound(qemu_img, tmpfs / name)
    maps = [qemu_img.json("map", "--output=json", tmpfs / name) for name in ("ours", "theirs")]
    assert maps[0] == maps[1]
    used = [(tmpfs / name).stat().st_blocks * 512 for name in ("ours", "theirs")]
    assert abs(used[0] - used[1]) < CLUSTER
    for name in ("ours", "theirs"):
        assert blk_json("map", "--output=json", tmpfs / name) == maps[0]
    # What is grown reads as zeros, also where the backing file goes on.
    assert blk("resize -q --preallocation=metadata ours 2M", tmpfs).code == 0
    qemu_img("resize", "-q", "--preallocation=metadata", "theirs", "2M", cwd=tmpfs)
    sound(qemu_img, tmpfs / "ours")
    qemu_img("compare", "ours", "theirs", cwd=tmpfs)


def test_growth_with_preallocation_hides_the_backing_file(image: Path, qemu_img: Oracle) -> None:
    async def main() -> None:
        async with opened(image) as root:
            await root.truncate(5 * SUB + 512, shrink=True)
            await root.truncate(8 * CLUSTER, preallocation="metadata")
            kept = 5 * SUB + 512
            expected = b"\xbb" * kept + bytes(8 * CLUSTER - kept)
            assert await root.read(0, 8 * CLUSTER) == expected

    run(main())
    sound(qemu_img, image)


requests = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "write -z", "write -z -u", "write -c", "discard")),
        st.integers(0, SIZE // SUB - 1),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=20,
)


def places(steps: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Whole subclusters; discards and compressed writes of whole clusters, as QEMU does them."""
    used: set[int] = set()
    packed: set[int] = set()
    ready = []
    for verb, first, count in steps:
        unit = CLUSTER // SUB if verb in ("write -c", "discard") else 1
        start = first // unit * unit * SUB
        end = start + CLUSTER if verb == "write -c" else min(SIZE, start + count * unit * SUB)
        touched = set(range(start // CLUSTER, (end - 1) // CLUSTER + 1))
        if verb == "write -c" and (touched & used or end > SIZE):
            continue
        if verb.startswith("write -z") and touched & packed:
            # They write zeros to a part of a compressed cluster; we note them.
            continue
        if verb == "write -c":
            packed |= touched
        used |= touched
        ready.append((verb, start, end - start))
    return ready


def mapped(path: Path, qemu_img: Oracle) -> list[dict[str, Any]]:
    """The map without host offsets, runs that differ in them alone put together.

    Zeros may have space of their own there and not here: we free a cluster with its last data.
    """
    runs: list[dict[str, Any]] = []
    for found in qemu_img.json("map", "--output=json", path):
        found.pop("offset", None)
        alike = [name for name in found if name not in ("start", "length")]
        if runs and all(runs[-1][name] == found[name] for name in alike):
            runs[-1]["length"] += found["length"]
        else:
            runs.append(found)
    return runs


@settings(max_examples=examples(8))
@given(requests, st.booleans())
def test_maps_are_alike(
    qemu_img: Oracle, qemu_io: Oracle, steps: list[tuple[str, int, int]], keep: bool
) -> None:
    async def ours(path: Path) -> None:
        async with opened(path, discard_no_unref=keep) as root:
            for number, (verb, start, length) in enumerate(places(steps), 1):
                if verb == "write":
                    await root.write(start, bytes([number]) * length)
                elif verb == "write -c":
                    await root.write_compressed(start, bytes([number]) * length)
                elif verb == "discard":
                    await root.discard(start, length)
                else:
                    await root.write_zeroes(start, length, unmap=verb.endswith("-u"))

    def theirs(path: Path) -> None:
        commands: list[str] = []
        for number, (verb, start, length) in enumerate(places(steps), 1):
            pattern = f" -P {number}" if verb in ("write", "write -c") else ""
            commands += ["-c", f"{verb}{pattern} {start} {length}"]
        text = f"driver=qcow2,file.filename={path},discard=unmap"
        qemu_io(*commands, "--image-opts", f"{text},discard-no-unref={'on' if keep else 'off'}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").write_bytes(b"\xbb" * (SIZE // 2 // 512 * 512))
        for path in (folder / "ours", folder / "theirs"):
            how = ("-o", "extended_l2=on", "-b", "base", "-F", "raw")
            qemu_img("create", "-q", "-f", "qcow2", *how, path, str(SIZE))
        run(ours(folder / "ours"))
        theirs(folder / "theirs")
        assert mapped(folder / "ours", qemu_img) == mapped(folder / "theirs", qemu_img)
        qemu_img("compare", folder / "ours", folder / "theirs")
        sound(qemu_img, folder / "ours")


@functools.cache
def sample(qemu_img: Oracle, qemu_io: Oracle, folder: Path, snapshot: bool) -> bytes:
    """Entry 0: two subclusters; 2: a whole cluster; 3: compressed; 4: some zeros."""
    path = folder / "extended.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "1M")
    commands = ("write -P 1 0 4k", "write -P 2 128k 64k", "write -c -P 3 192k 64k",
                "write -P 4 256k 64k", "write -z 260k 20k", "write -z 512k 10k")  # fmt: skip
    qemu_io(*(part for command in commands for part in ("-c", command)), path)
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_io("-c", "write -P 9 256k 2k", "-c", "write -P 8 700k 2k", path)
    return path.read_bytes()


@pytest.fixture
def whole(qemu_img: Oracle, qemu_io: Oracle, folder: Path) -> Broken:
    """The sample, to be broken."""
    return Broken(sample(qemu_img, qemu_io, folder, False))


def put(image: Broken, index: int, entry: int | None, bitmap: int | None) -> None:
    """Replace words of an extended entry."""
    for offset, word in ((0, entry), (8, bitmap)):
        if word is not None:
            image.put(image.l2() + 16 * index + offset, word)


def host(image: Broken, index: int) -> int:
    return image.word(image.l2() + 16 * index) & OFFSET_MASK


ALL_ZERO = 0xFFFFFFFF << 32

FAULTS: dict[str, Callable[[Broken], None]] = {
    "none": lambda image: None,
    "allocated and zero": lambda image: put(image, 0, None, 3 | 3 << 32),
    "one of them is both": lambda image: put(image, 4, None, ALL_ZERO | 1 << 31),
    "allocated nowhere": lambda image: put(image, 1, 0, 3),
    "allocated and zero nowhere": lambda image: put(image, 1, 0, 3 | 1 << 32),
    "its cluster is gone": lambda image: put(image, 0, 0, None),
    "compressed with data": lambda image: put(image, 3, None, 1),
    "compressed with zeros": lambda image: put(image, 3, None, 1 << 40),
    "compressed and copied": lambda image: image.flip(image.l2() + 48, COPIED),
    "unaligned data": lambda image: image.flip(image.l2(), 0x200),
    "unaligned data, broken": lambda image: put(
        image, 0, COPIED | host(image, 0) | 0x200, 3 | 3 << 32
    ),
    "unaligned zeros": lambda image: put(image, 0, COPIED | host(image, 0) | 0x200, ALL_ZERO),
    "unaligned, nothing in it": lambda image: put(image, 0, COPIED | host(image, 0) | 0x200, 0),
    "reserved bits": lambda image: image.flip(image.l2(), 2),
    "reserved bits, broken": lambda image: put(image, 0, COPIED | host(image, 0) | 2, 1 | 1 << 32),
    "copied bit lost": lambda image: image.flip(image.l2(), COPIED),
    "copied bit of an empty cluster lost": lambda image: put(image, 0, host(image, 0), 0),
    "shared": lambda image: put(image, 9, COPIED | host(image, 0), 1),
    "past the end": lambda image: put(image, 0, COPIED | 1 << 30, 7),
    "leak": lambda image: image.refcount(9, 2),
}
UNREADABLE = {
    "allocated and zero", "one of them is both", "allocated nowhere", "allocated and zero nowhere",
    "its cluster is gone", "compressed with data", "compressed with zeros", "unaligned data",
    "unaligned data, broken", "unaligned zeros", "unaligned, nothing in it", "reserved bits",
    "reserved bits, broken",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_says_what_they_say(whole: Broken, fault: str, tmpfs: Path, qemu_img: Oracle) -> None:
    ours, theirs = tmpfs / "ours.qcow2", tmpfs / "theirs.qcow2"
    FAULTS[fault](whole)
    for path in (ours, theirs):
        path.write_bytes(whole.content)
    compare_reports(ours, qemu_img, text=True)
    assert ours.read_bytes() == whole.content, "a check without repair writes nothing"

    async def read() -> None:
        async with opened(ours, read_only=True) as root:
            await root.read(0, 10 * CLUSTER)

    if fault in UNREADABLE:
        with pytest.raises(CorruptionError, match=r"L2 entry 0x"):
            run(read())
    else:
        run(read())
    _, messages, _ = check(ours, "all")
    assert qemu_img("check", "-r", "all", theirs, check=False).returncode in (0, 2)
    # What follows the tables is data: they clear what they give up.
    tables = slice(0, whole.l2() + CLUSTER)
    assert ours.read_bytes()[tables] == theirs.read_bytes()[tables], messages
    compare_reports(ours, qemu_img)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["L2", "L2", "L2", "L1", "refcounts"]),
            st.one_of(st.integers(0, 20), st.integers(0, 100)),
            st.sampled_from([*range(1, 64), 63, 62, 9, 16, 18]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_anyhow(
    tmpfs: Path,
    folder: Path,
    qemu_img: Oracle,
    qemu_io: Oracle,
    flips: list[tuple[str, int, int]],
    snapshot: bool,
) -> None:
    image, path = Broken(sample(qemu_img, qemu_io, folder, snapshot)), tmpfs / "x.qcow2"
    places = {"L1": image.l1, "L2": image.l2(), "refcounts": image.refcount_block}
    for table, index, bit in flips:
        image.flip(places[table] + 8 * (index % (2 if table == "L1" else 100)), 1 << bit)
    path.write_bytes(image.content)
    if compare_reports(path, qemu_img) is None:
        return
    repaired, _, _ = check(path, "all")
    after = compare_reports(path, qemu_img)
    assert after is not None
    assert after.corruptions == repaired.corruptions


def test_the_zero_flag_has_no_place(whole: Broken, tmpfs: Path) -> None:
    """QEMU looks past it; we do not follow an entry whose meaning is not defined, and say so."""
    path = tmpfs / "x.qcow2"
    whole.flip(whole.l2(), 1)
    path.write_bytes(whole.content)
    found, messages, _ = check(path)
    assert found.corruptions == 1
    assert "reserved bits" in messages[0]

    async def read() -> None:
        async with opened(path, read_only=True) as root:
            await root.read(0, 10)

    with pytest.raises(CorruptionError, match="extended L2 entries"):
        run(read())


def test_data_in_place_is_not_copied(image: Path) -> None:
    """Others may write it meanwhile: a write ends before it rather than fill up what it cuts."""

    async def main() -> None:
        async with opened(image) as root:
            await root.write(5 * SUB, b"1" * SUB)
            driver = driver_of(root)
            async with root.node.claims.claim(0, CLUSTER):
                for end, stop in ((5 * SUB + 512, 5 * SUB), (6 * SUB, 6 * SUB), (7 * SUB + 1, 0)):
                    allocation = await driver.allocate(3 * SUB + 512, end - 3 * SUB - 512)
                    assert allocation.offset + allocation.length == (stop or end)
                    assert allocation.tail == (0 if stop else SUB - 1)
                    await driver.abort(allocation)

    run(main())


def test_failed_writes_leave_no_bits() -> None:
    """An allocation in a cluster of its own that fails is not shown, and frees nothing."""

    async def main() -> None:
        base = raw_disk(b"\xbb" * 4 * CLUSTER)
        disk = await new_image(4 * CLUSTER, base=base, cluster_size=CLUSTER, extended_l2=True)
        root = await take(disk)
        await root.write(0, b"1" * SUB)
        driver = driver_of(root)
        async with root.node.claims.claim(0, CLUSTER):
            allocation = await driver.allocate(10 * SUB, 3 * SUB)
            await driver.abort(allocation)
        assert await root.read(10 * SUB, SUB) == b"\xbb" * SUB
        await root.write(20 * SUB, b"2" * SUB)
        await root.close()
        root = await take(disk)
        assert await root.read(0, 2 * SUB) == b"1" * SUB + b"\xbb" * SUB
        found = await check_root(root)
        assert (found.corruptions, found.leaks) == (0, 0)
        await root.close()

    run(main())
