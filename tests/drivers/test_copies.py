"""quorum, blkverify and preallocate: what copies agree on, and what the files hold afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import BlockError, StorageError, UsageError
from blocklayer.graph.events import Event, QuorumFailure, QuorumReportBad
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import KIB, MIB
from drivers.opening import file, using
from oracles import Oracle
from qmp.conversation import real_daemon, run, serving, talk_in_turn

SIZE = MIB


def raw(path: Path) -> dict[str, Any]:
    return {"driver": "raw", "file": file(path)}


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """Three copies of one disk."""
    found = [tmp_path / f"{name}.raw" for name in "abc"]
    content = random.Random(5).randbytes(SIZE)
    for path in found:
        path.write_bytes(content)
    return found


def spoil(path: Path, offset: int = 4096, data: bytes = b"spoiled") -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def quorum(paths: list[Path], threshold: int = 2, **options: Any) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in options.items()}
    children = [raw(path) for path in paths]
    return {"driver": "quorum", "vote-threshold": threshold, "children": children, **given}


def listen(root: Root) -> list[Event]:
    heard: list[Event] = []
    root.graph.listeners.append(heard.append)
    return heard


@pytest.mark.parametrize("rewrite", [False, True])
def test_the_outvoted_are_told_of_and_rewritten(copies: list[Path], rewrite: bool) -> None:
    good = copies[0].read_bytes()
    spoil(copies[1])

    async def scene() -> None:
        async with using(quorum(copies, rewrite_corrupted=rewrite)) as root:
            heard = listen(root)
            assert await root.read(0, 64 * KIB) == good[: 64 * KIB]
            (event,) = heard
            assert isinstance(event, QuorumReportBad)
            name = root.node.children["children.1"].node.name
            assert (event.type, event.node_name) == ("read", name)
            assert (event.sector_num, event.sectors_count) == (0, 128)
            await root.read(64 * KIB, 64 * KIB)
            assert len(heard) == 1

    run(scene())
    assert (copies[1].read_bytes() == good) is rewrite


def test_no_quorum_is_an_error(copies: list[Path]) -> None:
    spoil(copies[1])
    spoil(copies[2], data=b"otherwise")

    async def scene() -> None:
        async with using(quorum(copies)) as root:
            heard = listen(root)
            with pytest.raises(StorageError, match="0x1000 bytes at 0x1000"):
                await root.read(4096, 4096)
            (event,) = heard
            assert isinstance(event, QuorumFailure)
            assert event.sector_num == 8
        async with using(quorum(copies, read_pattern="fifo")) as root:
            assert await root.read(0, SIZE) == copies[0].read_bytes()

    run(scene())


def failing(path: Path, iotype: str) -> dict[str, Any]:
    return {
        "driver": "blkdebug", "image": raw(path),
        "inject-error": [{"event": "none", "iotype": iotype}],
    }  # fmt: skip


@pytest.mark.parametrize("iotype", ["read", "write", "flush"])
@pytest.mark.parametrize("broken", [1, 2])
def test_children_that_fail(copies: list[Path], iotype: str, broken: int) -> None:
    options = quorum(copies)
    for number in range(broken):
        options["children"][number] = failing(copies[number], iotype)

    async def scene() -> None:
        async with using(options) as root:
            heard = listen(root)
            work: Any = {
                "read": lambda: root.read(0, 512),
                "write": lambda: root.write(0, b"x"),
                "flush": root.flush,
            }
            if broken == 1:
                await work[iotype]()
            else:
                with pytest.raises(StorageError, match="made to fail"):
                    await work[iotype]()
            bad = [event for event in heard if isinstance(event, QuorumReportBad)]
            assert [event.type for event in bad] == [iotype] * broken
            assert all("made to fail" in str(event.error) for event in bad)
            assert any(isinstance(event, QuorumFailure) for event in heard) is (broken == 2)

    run(scene())


def test_reads_beside_writes_never_differ(copies: list[Path]) -> None:
    """Children written one after the other differ for a moment: nobody hears of that."""

    async def scene() -> None:
        async with using(quorum(copies, rewrite_corrupted=True)) as root:
            heard = listen(root)

            async def write(number: int) -> None:
                await root.write(number % 3 * 512, bytes([number]) * 2048)

            for start in range(0, 250, 10):
                works = [write(number) for number in range(start, start + 10)]
                await asyncio.gather(*works, *(root.read(0, 8192) for _ in range(10)))
            assert heard == []

    run(scene())
    assert copies[0].read_bytes() == copies[1].read_bytes() == copies[2].read_bytes()


def test_quorum_as_the_real_one(copies: list[Path], qemu_io: Oracle, tmp_path: Path) -> None:
    """It writes, we vote; we write, it votes."""
    options = quorum(copies)
    name = "json:" + json.dumps(options)
    qemu_io("-c", "write -P 7 64k 128k", "-c", "write -z 512k 64k", name)
    for path in copies[:2]:
        expected = bytearray(path.read_bytes())
        assert expected[64 * KIB : 192 * KIB] == b"\7" * 128 * KIB
    spoil(copies[0], 70 * KIB)

    async def scene() -> None:
        async with using(options) as root:
            assert await root.read(64 * KIB, 128 * KIB) == b"\7" * 128 * KIB
            await root.write(256 * KIB, b"\5" * 64 * KIB)
            await root.write_zeroes(320 * KIB, 64 * KIB, unmap=True)
            await root.discard(400 * KIB, 64 * KIB)

    run(scene())
    said = qemu_io(
        "-c", "read -P 7 64k 128k", "-c", "read -P 5 256k 64k", "-c", "read -P 0 320k 64k", name
    )
    assert "failed" not in said.stdout
    assert copies[1].read_bytes() == copies[2].read_bytes()


def null(name: str | None = None, size: int = 65536) -> dict[str, Any]:
    options = {"driver": "null-co", "size": size, "read-zeroes": True}
    return options if name is None else {**options, "node-name": name}


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": given}


def add(name: str, children: int, threshold: int, **options: Any) -> dict[str, Any]:
    given = {"driver": "quorum", "vote_threshold": threshold, "node_name": name, **options}
    return command("blockdev-add", children=[null()] * children, **given)


def change(parent: str, **which: str) -> dict[str, Any]:
    return command("x-blockdev-change", parent=parent, **which)


def verify(**options: Any) -> dict[str, Any]:
    return command("blockdev-add", driver="blkverify", test=null(), raw=null(), **options)


SCRIPT = [
    add("q", 3, 2), add("q1", 1, 2), add("q1", 0, 2), add("q1", 1, 0), add("q1", 2, 3),
    add("q4", 3, 2, blkverify=True), add("q4", 2, 1, blkverify=True),
    add("q5", 2, 2, blkverify=True, rewrite_corrupted=True),
    add("q6", 2, 2, read_pattern="fifo", rewrite_corrupted=True), add("q7", 2, 2),
    command("blockdev-add", **null("new")), command("blockdev-add", **null("newer")),
    change("q", node="new"), change("q", child="children.1"), change("q", child="children.1"),
    change("q", child="children.0"), change("q", child="children.2"), change("q", node="newer"),
    change("q", child="children.3"), change("q", child="children.4"), change("q", node="new"),
    change("q", node="new"), change("q", node="nope"), change("nope", node="new"),
    change("new", node="newer"), change("q"), change("q", node="new", child="children.0"),
    verify(node_name="v"), change("v", node="newer"), change("v", child="raw"),
    command("blockdev-add", driver="preallocate", node_name="p", prealloc_align=1000, file=null()),
    command("blockdev-add", driver="preallocate", node_name="p", prealloc_align=0, file=null()),
]  # fmt: skip


@pytest.mark.oracle("qemu-storage-daemon")
def test_commands_are_answered_as_the_real_daemon_does(tmp_path: Path) -> None:
    script = [{"execute": "qmp_capabilities"}, *SCRIPT]
    with real_daemon(tmp_path / "real"):
        theirs = talk_in_turn(tmp_path / "real", script)

    async def ours() -> list[dict[str, Any]]:
        async with Daemon() as daemon, serving(tmp_path / "own", daemon=daemon):
            return await asyncio.to_thread(talk_in_turn, tmp_path / "own", script)

    own = run(ours())
    for asked, ours_said, theirs_said in zip(script, own[1:], theirs[1:], strict=True):
        assert ours_said == theirs_said, asked


def test_a_copy_of_another_size_is_refused(copies: list[Path]) -> None:
    with copies[2].open("ab") as stream:
        stream.write(bytes(MIB))

    async def scene() -> None:
        with pytest.raises(UsageError, match="differ in size"):
            async with using(quorum(copies)):
                pass
        async with Daemon() as daemon:
            await nodes.add(daemon, {**quorum(copies[:2]), "node-name": "q"})
            await nodes.add(daemon, {**raw(copies[2]), "node-name": "larger"})
            with pytest.raises(UsageError, match="bytes"):
                await nodes.change_children(daemon, "q", node="larger")
            assert list(daemon.graph.nodes["q"].children) == ["children.0", "children.1"]

    run(scene())


def verified(copies: list[Path]) -> dict[str, Any]:
    return {"driver": "blkverify", "test": raw(copies[0]), "raw": file(copies[1])}


def test_blkverify_finds_the_difference(copies: list[Path]) -> None:
    async def scene() -> None:
        async with using(verified(copies)) as root:
            await root.write(8192, b"x" * 4096)
            await root.write_zeroes(0, 4096, unmap=True)
            await root.read(0, SIZE)
            spoil(copies[1], 70000, b"?")
            await root.read(0, 64 * KIB)
            with pytest.raises(StorageError, match="differ at 0x11170"):
                await root.read(64 * KIB, 64 * KIB)
            await root.flush()

    run(scene())
    assert copies[0].read_bytes()[:65536] == copies[1].read_bytes()[:65536]


def test_blkverify_with_the_real_one(copies: list[Path], qemu_io: Oracle) -> None:
    name = "json:" + json.dumps(verified(copies))
    qemu_io("-c", "write -P 3 0 64k", name)

    async def scene() -> None:
        async with using(verified(copies)) as root:
            assert await root.read(0, 64 * KIB) == b"\3" * 64 * KIB
            await root.write(0, b"\4" * 4096)

    run(scene())
    said = qemu_io("-c", "read -P 4 0 4k", name)
    assert "failed" not in said.stdout


def test_a_difference_of_failures(copies: list[Path]) -> None:
    async def scene() -> None:
        options = {**verified(copies), "test": failing(copies[0], "write")}
        async with using(options) as root:
            with pytest.raises(BlockError, match="one only"):
                await root.write(0, b"x")

    run(scene())


PREALLOCATED = {"driver": "preallocate", "prealloc-size": 8 * MIB, "prealloc-align": MIB}


def test_room_is_made_and_given_back(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    """As the real one: sizes while it is open and afterwards, and an image that checks."""
    path = tmp_path / "p.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    options = {"driver": "qcow2", "file": {**PREALLOCATED, "file": file(path)}}

    async def scene() -> None:
        async with using(options) as root:
            filter_node = root.node.children["file"].node
            await root.write(MIB, b"\1" * 64 * KIB)
            assert path.stat().st_size == 9 * MIB
            assert path.stat().st_blocks * 512 >= 8 * MIB
            assert filter_node.size < MIB
            before = path.stat().st_size
            await root.write(2 * MIB, b"\3" * 64 * KIB)
            assert path.stat().st_size == before
            await root.write(4 * MIB, b"\2" * 20 * MIB)
            end = filter_node.size
            assert path.stat().st_size > end
        assert path.stat().st_size == end

    run(scene())
    qemu_img("check", path)
    qemu_io("-c", "read -P 2 4M 20M", path)


def test_a_size_with_room_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "p.raw"
    path.write_bytes(b"x" * 4096)

    async def scene() -> None:
        async with using({**PREALLOCATED, "file": file(path)}) as root:
            driver: Any = root.node.driver
            await driver.write_opaque(4096, b"y" * 4096)
            assert root.node.size == 8192
            assert path.stat().st_size == 9 * MIB
            await root.truncate(16384)
            assert (root.node.size, path.stat().st_size) == (16384, 9 * MIB)
            assert await root.read(4096, 12288) == b"y" * 4096 + bytes(8192)
            await driver.write_zeroes(16384, 4096, unmap=False, fallback=True)
            assert root.node.size == 20480
            taken = root.node.children["file"].taken
            assert taken & Permission.RESIZE
            await root.truncate(30000, preallocation="full")
            assert path.stat().st_size == 30000
            await root.truncate(20480, shrink=True)
            assert path.stat().st_size == 20480

    run(scene())
    assert path.read_bytes() == b"x" * 4096 + b"y" * 4096 + bytes(12288)


def test_a_failed_write_leaves_nothing_in_the_room(tmp_path: Path) -> None:
    path = tmp_path / "p.raw"
    path.write_bytes(b"x" * 4096)
    rules = [{"event": "none", "iotype": "write", "sector": 8, "once": True}]

    async def scene() -> None:
        below = {"driver": "blkdebug", "image": file(path), "inject-error": rules}
        async with using({**PREALLOCATED, "file": below}) as root:
            driver: Any = root.node.driver
            with pytest.raises(StorageError, match="made to fail"):
                await driver.write_opaque(4096, b"y" * 4096)
            spoil(path, 8000)
            await root.truncate(12288)
            assert await root.read(8192, 4096) == bytes(4096)

    run(scene())
    assert path.stat().st_size == 12288
