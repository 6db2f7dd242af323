"""One test by name for each class of bug that image formats have had elsewhere.

The other suites would find most of them in general; here each is shown by its shortest story.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest

from blocklayer.api.disk import Disk, create
from blocklayer.errors import BlockError, FormatError, LockedError, StorageError
from blocklayer.graph.root import Root
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk
from oracles import Oracle
from proof.chains import blk, blk_json, run
from proof.crashes import check, new_image, raw_disk, take
from proof.hostile import Layout

KIB = 1024
CLUSTER = 512


def test_a_freed_cluster_is_not_reused_before_its_flush() -> None:
    """Else the old L2 entry, still on disk, shows another guest offset's new data."""

    async def main() -> None:
        disk = await new_image(40 * KIB)
        root = await take(disk)
        await root.write(0, b"old!" * 128)
        await root.flush()
        disk.settle()
        await root.discard(0, CLUSTER)
        await root.write(20 * KIB, b"new!" * 128)
        for position in range(disk.position + 1):
            for state in disk.states(position):
                after = await take(state.disk(), writable=False)
                found = await after.read(0, CLUSTER)
                assert found in (b"old!" * 128, bytes(CLUSTER)), str(state)
                await after.close()
        await root.close()

    run(main())


def test_no_cluster_is_allocated_twice_after_running_out_of_space() -> None:
    """What was set aside for the failed write is given out once, or not at all."""

    async def main() -> None:
        for nth in range(1, 40):
            disk = await new_image(40 * KIB)
            root = await take(disk)
            disk.fail(nth, errno.ENOSPC, kinds=("write", "truncate"))
            written = {}
            for fill, offset in enumerate(range(0, 12 * KIB, 3 * CLUSTER), 1):
                data = bytes([fill]) * (2 * CLUSTER)
                try:
                    await root.write(offset, data)
                    written[offset] = data
                except StorageError:
                    assert disk.failures
            disk.fail(0)
            for offset, data in written.items():
                assert await root.read(offset, len(data)) == data, f"write {nth} failed"
            try:
                await root.close()
            except BlockError:
                assert root.node.poisoned
            root = await take(disk)
            assert not (await check(root)).corruptions, f"write {nth} failed"
            await root.close()

    run(main())


def test_write_zeroes_on_an_overlay_does_not_expose_the_backing_file() -> None:
    """Nor does a discard, in either version of the format, nor growing over a longer base."""

    async def main() -> None:
        for compat in ("0.10", "1.1"):
            base = raw_disk(b"secret" * 10 * KIB)
            disk = await new_image(40 * KIB, base=base, compat=compat)
            root = await take(disk)
            await root.write(0, b"x" * 20 * KIB)
            await root.write_zeroes(0, 5 * KIB)
            await root.write_zeroes(5 * KIB, 5 * KIB, unmap=True)
            await root.discard(10 * KIB, 5 * KIB)
            await root.write_zeroes(30 * KIB + 100, 300)
            await root.truncate(35 * KIB, shrink=True)
            await root.truncate(50 * KIB)
            content = await read_all(root)
            assert not any(content[: 10 * KIB])
            assert set(content[10 * KIB : 15 * KIB]) <= set(b"x\0")
            assert not any(content[30 * KIB + 100 : 30 * KIB + 400])
            assert not any(content[35 * KIB :])
            await root.close()

    run(main())


def test_bit_0_of_a_compressed_entry_is_part_of_its_offset(
    qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path
) -> None:
    """Compressed clusters begin at any byte: at odd ones, the entry's bit 0 is no zero flag."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", image, "256k")
    commands = [f"write -q -c -P {fill} {fill * 4 - 4}k 4k" for fill in range(1, 60)]
    qemu_io("-f", "qcow2", *(part for c in commands for part in ("-c", c)), image)
    layout = Layout(image.read_bytes())
    entries = [layout.entry(layout.l2 + 8 * n) for n in range(59)]
    assert any(entry & 1 for entry in entries), "no compressed cluster at an odd offset"

    async def main() -> None:
        async with await Disk.open(image) as disk:
            content = await disk.read(0, 59 * 4096)
            assert content == b"".join(bytes([fill]) * 4096 for fill in range(1, 60))
            assert [entry.compressed async for entry in disk.map(0, 59 * 4096)] == [True]

    run(main())
    assert blk_json("check", "--output=json", image)["compressed-clusters"] == 59


def test_a_short_write_is_an_error_or_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may store less than it was given, and say so only in a number."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(64 * KIB))
    plain = os.pwritev

    def short(descriptor: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        data = b"".join(bytes(part) for part in buffers)
        return plain(descriptor, [data[: max(1, len(data) // 3)]], offset, *flags)

    async def main() -> None:
        async with await Disk.open(path, format="raw", writable=True) as disk:
            monkeypatch.setattr(os, "pwritev", short)
            try:
                await disk.write(100, b"x" * 10000)
            except StorageError:
                return
            finally:
                monkeypatch.setattr(os, "pwritev", plain)
            assert await disk.read(100, 10000) == b"x" * 10000
        assert path.read_bytes()[100:10100] == b"x" * 10000

    run(main())


def test_a_backing_file_that_is_the_image_itself_is_refused(
    qemu_img: Oracle, tmp_path: Path
) -> None:
    """By the same name, by another name, and around two corners."""
    a, b, link = tmp_path / "a.qcow2", tmp_path / "b.qcow2", tmp_path / "link.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", a, "1M")
    qemu_img("create", "-q", "-f", "qcow2", b, "1M")
    link.symlink_to(a)
    (tmp_path / "sub").mkdir()
    for name in ("a.qcow2", str(a), "link.qcow2", "./a.qcow2", "sub/../a.qcow2"):
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, a)
        for writable in (False, True):
            # Writable, the image's own lock must not be taken for somebody else's.
            with pytest.raises(FormatError, match="loop"):
                run(Disk.open(a, writable=writable))
        for command in ("info --backing-chain", "map"):
            code, _, said = blk("img", *command.split(), a, check=False)
            assert code == 1, command
            assert "loop" in said
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "b.qcow2", a)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "link.qcow2", b)
    for writable in (False, True):
        with pytest.raises(FormatError, match="loop"):
            run(Disk.open(b, writable=writable))


def test_a_crafted_header_does_not_make_the_file_grow(qemu_img: Oracle, tmp_path: Path) -> None:
    """Tables said to lie far beyond the end of the file are not made to exist."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", image, "1M")
    plain = image.read_bytes()
    layout = Layout(plain)
    far = (1 << 50).to_bytes(8, "big")
    for offset in (40, 48, layout.l1, layout.refcount_table):
        crafted = layout.patched((offset, far))
        for writable in (False, True):
            image.write_bytes(crafted)
            with contextlib.suppress(BlockError):
                run(open_and_close(image, writable=writable))
            assert image.stat().st_size == len(plain)
            if not writable:
                assert image.read_bytes() == crafted
        for repair in ([], ["-r", "leaks"], ["-r", "all"]):
            image.write_bytes(crafted)
            blk("img", "check", *repair, image, check=False)
            assert image.stat().st_size < 16 << 20


async def open_and_close(image: Path, *, writable: bool) -> None:
    async with await Disk.open(image, writable=writable):
        pass


def test_the_dirty_bit_is_not_cleared_by_the_first_of_two_closers(tmp_path: Path) -> None:
    """One image has one writer; a second user of the same node does not close it."""
    image = tmp_path / "image.qcow2"

    def dirty() -> bool:
        return bool(image.read_bytes()[79] & 1)

    async def main() -> None:
        await create(image, "1M", lazy_refcounts=True)
        first = await Disk.open(image, writable=True)
        second = Root(first.root.node, "a second user", 3)
        await first.write(0, b"x" * 100000)
        await first.flush()
        assert dirty()
        with pytest.raises(LockedError):
            await Disk.open(image, writable=True)
        await first.close()
        assert dirty()
        await second.write(500000, b"y" * 1000)
        await second.flush()
        assert dirty()
        reader = await Disk.open(image, force_share=True)
        await reader.close()
        assert dirty()
        await second.close()
        assert not dirty()

    run(main())
    blk("img", "check", "-q", image)


async def write_pieces(disk: Disk, data: bytes, lengths: tuple[int, ...]) -> None:
    at = 0
    for length in lengths:
        await disk.write(at, data[at : at + length])
        at += length


def test_a_header_written_to_sector_0_of_a_guessed_raw_disk_is_refused(tmp_path: Path) -> None:
    """Else the guest chooses which of the host's files the next one to guess opens."""
    path = tmp_path / "disk"
    header = b"QFI\xfb\0\0\0\3" + bytes(504)

    async def main() -> None:
        path.write_bytes(bytes(64 * KIB))
        async with await Disk.open(path, writable=True) as disk:
            assert disk.format == "raw"
            for pieces in ((512,), (1, 511), (4, 508), (3, 1, 508)):
                with pytest.raises(StorageError, match="raw"):
                    await write_pieces(disk, header, pieces)
            assert not path.read_bytes().startswith(header[:8])
            await disk.write(0, b"anything else")
            await disk.write(512, header)
        async with await Disk.open(path, format="raw", writable=True) as disk:
            await disk.write(0, header)
        assert path.read_bytes()[:512] == header

    run(main())


def test_the_own_header_is_not_lost_to_a_guest_write_to_sector_0() -> None:
    """An L2 entry that leads to the header is corruption, not a place to write to."""

    async def main() -> None:
        disk = await new_image(40 * KIB)
        root = await take(disk)
        await root.write(0, b"x" * CLUSTER)
        await root.close()
        image = bytearray(disk.pages.size)
        disk.pages.read_into(0, memoryview(image))
        layout = Layout(bytes(image))
        for target in (0, layout.l1, layout.refcount_table, layout.refcount_block, layout.l2):
            entry = (1 << 63 | target).to_bytes(8, "big")
            crafted = raw_disk(layout.patched((layout.l2, entry)))
            root = await take(crafted)
            with pytest.raises(BlockError):
                await root.write(0, b"guest" * 100)
            try:
                await root.close()
            except BlockError:
                assert root.node.poisoned
            await assert_header_kept(crafted)

    run(main())


async def assert_header_kept(disk: CrashingDisk) -> None:
    head = bytearray(72)
    disk.pages.read_into(0, memoryview(head))
    assert head.startswith(b"QFI\xfb\0\0\0\3")
    root = await take(disk, writable=False)
    await root.close()


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_an_empty_image_does_not_become_a_file_of_0_bytes(tmp_path: Path, target: str) -> None:
    """All holes is still a size."""
    source, made = tmp_path / "source.qcow2", tmp_path / "made"
    run(create(source, "3M"))
    blk("img", "convert", "-f", "qcow2", "-O", target, source, made)
    assert blk_json("info", "-f", target, "--output=json", made)["virtual-size"] == 3 << 20
    if target == "raw":
        assert made.stat().st_size == 3 << 20
    blk("img", "compare", "-q", "-f", "qcow2", "-F", target, source, made)
