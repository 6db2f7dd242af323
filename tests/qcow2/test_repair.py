"""Repairs: refcounts are made right, guest data stay, and a crash makes nothing worse."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blocklayer.codec.qcow2.header import INCOMPATIBLE_DIRTY, decode_header
from blocklayer.drivers import REGISTRY
from blocklayer.drivers.qcow2.check_image import CheckedImage
from blocklayer.errors import BlockError, CorruptionError, StorageError
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from oracles import Oracle
from qcow2.broken import FAULTS, Broken, check, compare_reports, exit_class

MIB = 1 << 20

# What these break is not the refcounts' business: QEMU leaves it alone as well.
BEYOND_REPAIR = {
    "reserved bits in L2", "reserved bits in an empty L2 entry", "reserved bits in L1",
    "unaligned cluster", "cluster past the end", "table past the end", "compressed and copied",
    "L1 table past the end",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_repairs_all_that_refcounts_can(
    image: Broken, fault: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    path = tmpfs / "x.qcow2"
    FAULTS[fault](image)
    path.write_bytes(image.content)
    before, after_repair = tmpfs / "before.raw", tmpfs / "after.raw"
    # With the corrupt bit set, which stays if they meet corruption, QEMU reads all the same.
    readable = qemu_img("convert", "-O", "raw", path, before, check=False).returncode == 0
    found, _, _ = check(path, "all")
    if readable:
        qemu_img("convert", "-O", "raw", path, after_repair)
        assert before.read_bytes() == after_repair.read_bytes()
    assert not found.leaks
    assert not found.check_errors
    assert bool(found.corruptions) == (fault in BEYOND_REPAIR)
    after = compare_reports(path, qemu_img)
    assert after is not None
    assert after.corruptions == found.corruptions
    if fault not in BEYOND_REPAIR:
        assert decode_header(path.read_bytes()).incompatible_features == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_leaks_only(image: Broken, fault: str, tmpfs: Path, qemu_img: Oracle) -> None:
    ours, theirs = tmpfs / "a.qcow2", tmpfs / "b.qcow2"
    FAULTS[fault](image)
    for path in (ours, theirs):
        path.write_bytes(image.content)
    found, messages, _ = check(ours, "leaks")
    done = qemu_img("check", "-q", "-r", "leaks", theirs, check=False)
    assert exit_class(found) == done.returncode, (messages, done.stderr)


@pytest.mark.parametrize("fault", ["leak", "data shared", "copied bit lost"])
def test_says_what_they_say_while_repairing(
    image: Broken, fault: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    ours, theirs = tmpfs / "a.qcow2", tmpfs / "b.qcow2"
    FAULTS[fault](image)
    for path in (ours, theirs):
        path.write_bytes(image.content)
    _, messages, (leaks, corruptions) = check(ours, "all")
    done = qemu_img("check", "-r", "all", theirs)
    assert messages == done.stderr.splitlines()
    assert f"{leaks} leaked clusters\n    {corruptions} corruptions" in done.stdout
    assert ours.read_bytes() == theirs.read_bytes()


# Faults whose repair writes in more than one step.
STEPS = [
    "leak", "lost refcount", "data shared", "copied bit lost", "unaligned zero cluster",
    "refcount block outside", "refcount block missing", "refcount block twice",
    "refcount table in data", "refcount table past the end", "corrupt",
]  # fmt: skip


@pytest.mark.parametrize("fault", STEPS)
def test_a_repair_that_stops_makes_nothing_worse(
    image: Broken, fault: str, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each prefix of a repair's writes no more is wrong than before it.

    But for copied flags: they follow refcounts, and two of them may follow one.
    """

    def wrong() -> int:
        _, messages, _ = check(path)
        return sum(line.startswith("ERROR") and "OFLAG" not in line for line in messages)

    path = tmpfs / "x.qcow2"
    FAULTS[fault](image)
    path.write_bytes(image.content)
    wrong_before = wrong()
    write, left = CheckedImage.write, 0

    async def failing_write(self: CheckedImage, offset: int, data: bytes) -> None:
        nonlocal left
        if not left:
            raise StorageError("no", 5)
        left -= 1
        await write(self, offset, data)

    for allowed in range(20):
        path.write_bytes(image.content)
        left = allowed
        with monkeypatch.context() as patch:
            patch.setattr(CheckedImage, "write", failing_write)
            try:
                check(path, "all")
            except StorageError:
                stopped = True
            else:
                stopped = False
        assert wrong() <= wrong_before
        if not stopped:
            break
        assert exit_class(check(path, "all")[0]) == 0
    assert not stopped
    assert exit_class(check(path)[0]) == 0


def test_a_dirty_image_is_repaired_when_it_is_opened_for_writing(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    path = tmpfs / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    qemu_io("-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "abort", path, check=False)
    assert decode_header(path.read_bytes()).incompatible_features & INCOMPATIBLE_DIRTY
    assert check(path)[0].corruptions

    async def run() -> None:
        graph = Graph(REGISTRY)
        node = await open_image(graph, str(path), flags=Flags(read_only=False))
        root = Root(node, "a test", Permission.WRITE)
        assert await root.read(1 * MIB, 4) == b"\7" * 4
        await root.close()

    asyncio.run(run())
    report = compare_reports(path, qemu_img)
    assert report is not None
    assert exit_class(report) == 0


def test_a_dirty_image_that_is_broken_is_not_opened_for_writing(image: Broken, tmpfs: Path) -> None:
    path = tmpfs / "x.qcow2"
    image.put(72, INCOMPATIBLE_DIRTY)
    image.flip(image.l2(), 1 << 57)
    path.write_bytes(image.content)

    async def run() -> None:
        graph = Graph(REGISTRY)
        await open_image(graph, str(path), flags=Flags(read_only=False))

    with pytest.raises(CorruptionError, match="reserved bits"):
        asyncio.run(run())
    assert decode_header(path.read_bytes()).incompatible_features & INCOMPATIBLE_DIRTY


def test_an_unaligned_refcount_block(image: Broken, tmpfs: Path, qemu_img: Oracle) -> None:
    """QEMU marks the image corrupt and gives up; its refcounts can be counted anew all the same."""
    path = tmpfs / "x.qcow2"
    image.flip(image.refcount_table, 0x200)
    path.write_bytes(image.content)
    assert exit_class(check(path)[0]) == 1
    assert exit_class(check(path, "all")[0]) == 0
    qemu_img("check", path)


def test_a_repair_needs_a_writable_image(image: Broken, tmpfs: Path) -> None:
    path = tmpfs / "x.qcow2"
    path.write_bytes(image.content)

    async def run() -> None:
        graph = Graph(REGISTRY)
        node = await open_image(graph, str(path))
        try:
            await node.driver.check(frozenset(("leaks",)))  # type: ignore[attr-defined]
        finally:
            await graph.release(node)

    with pytest.raises(BlockError, match="read-only"):
        asyncio.run(run())
