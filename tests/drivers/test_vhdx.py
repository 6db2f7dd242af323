"""VHDX: the log. Replayed by QEMU where we stopped, and by us; never while open read-only."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from blocklayer.codec.vhdx import log, structure
from drivers.images import MIB
from drivers.other_readers import read_vhd
from oracles import Oracle

TABLE = 2 * MIB
"""Where the block table of a new image with a log of 1 MiB is."""


def write_and_stop(image: Path, blocks: int) -> tuple[bytes, bytes]:
    """An image as a crash leaves it, its table as it was before, and what the disk held."""
    content = bytearray(blocks * MIB)

    async def main() -> bytes:
        disk = await blocklayer.aio.Disk.open(image, format="vhdx", writable=True)
        for block in range(blocks):
            piece = bytes([block % 255 + 1]) * 3000
            await disk.write(block * MIB + 5, piece)
            content[block * MIB + 5 : block * MIB + 3005] = piece
            await disk.flush()
        stopped = bytearray(image.read_bytes())
        # The places may not have been reached: only the log must say it.
        stopped[TABLE : TABLE + 65536] = before[TABLE : TABLE + 65536]
        await disk.close()
        return bytes(stopped)

    before = image.read_bytes()
    return asyncio.run(main()), bytes(content)


@pytest.mark.parametrize("blocks", [1, 3])
def test_replay(blocks: int, tmpfs: Path, qemu_img: Oracle) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, blocks * MIB, format="vhdx", block_size="1M")
    stopped, content = write_and_stop(image, blocks)
    for replayer in ("qemu", "blocklayer"):
        image.write_bytes(stopped)
        with pytest.raises(BlockError, match="opened read-only, but contains a log"):
            blocklayer.open(image, format="vhdx")
        if replayer == "qemu":
            qemu_img("check", "-r", "all", "-f", "vhdx", image, check=False)
        else:
            blocklayer.open(image, format="vhdx", writable=True).close()
        with blocklayer.open(image, format="vhdx") as disk:
            assert disk.read(0, disk.size) == content, replayer
        raw = tmpfs / "raw"
        raw.write_bytes(content)
        qemu_img("compare", "-f", "vhdx", "-F", "raw", image, raw)
        qemu_img("check", "-f", "vhdx", image)


def test_the_log_goes_round(tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    """Far more is logged than the log holds, each entry with most of a page of the table."""
    image = tmpfs / "image"
    blocklayer.create(image, 8191 * MIB, format="vhdx", block_size="1M")
    before = image.read_bytes()
    places = [at * MIB for n in range(20) for at in (n, 8190 - n)]

    async def main() -> bytes:
        disk = await blocklayer.aio.Disk.open(image, format="vhdx", writable=True)
        for first, second in zip(places[::2], places[1::2], strict=True):
            await disk.write(first, b"\x11" * 512)
            await disk.write(second, b"\x11" * 512)
            await disk.flush()
        stopped = bytearray(image.read_bytes())
        stopped[TABLE : TABLE + 65536] = before[TABLE : TABLE + 65536]
        await disk.close()
        return bytes(stopped)

    stopped = asyncio.run(main())
    blocklayer.open(image, format="vhdx").close()
    reads = [word for place in places for word in ("-c", f"read -q -P 0x11 {place} 512")]
    for replayer in ("qemu", "blocklayer"):
        image.write_bytes(stopped)
        if replayer == "qemu":
            qemu_img("check", "-r", "all", "-f", "vhdx", image, check=False)
        else:
            blocklayer.open(image, format="vhdx", writable=True).close()
        with blocklayer.open(image, format="vhdx") as disk:
            assert all(disk.read(place, 512) == b"\x11" * 512 for place in places), replayer
        assert "failed" not in qemu_io("-f", "vhdx", *reads, image).stdout


def test_qemu_says_the_same_of_a_log(tmpfs: Path, qemu_img: Oracle) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 3 * MIB, format="vhdx", block_size="1M")
    stopped, _ = write_and_stop(image, 2)
    image.write_bytes(stopped)
    said = qemu_img("info", "-f", "vhdx", image, check=False).stderr
    assert "opened read-only, but contains a log that needs to be replayed" in said


@pytest.mark.parametrize("place", [0, 4096, 8192, 12288 - 4])
def test_a_torn_entry_is_no_entry(place: int, tmpfs: Path) -> None:
    """What an entry says counts as a whole; the entries before it still count."""
    image = tmpfs / "image"
    blocklayer.create(image, 3 * MIB, format="vhdx", block_size="1M")
    stopped, content = write_and_stop(image, 3)
    torn = bytearray(stopped)
    third = MIB + 2 * 8192
    torn[third + place % 8192 : third + place % 8192 + 4] = b"torn"
    image.write_bytes(torn)
    with blocklayer.open(image, format="vhdx", writable=True) as disk:
        assert disk.read(0, 2 * MIB) == content[: 2 * MIB]
        assert disk.read(2 * MIB, MIB) == bytes(MIB)


def test_a_truncated_file_is_not_replayed(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 3 * MIB, format="vhdx", block_size="1M")
    stopped, _ = write_and_stop(image, 3)
    image.write_bytes(stopped[: 5 * MIB])
    with pytest.raises(BlockError, match="has been truncated"):
        blocklayer.open(image, format="vhdx", writable=True)


def test_either_header_will_do(tmpfs: Path, qemu_img: Oracle) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 3 * MIB, format="vhdx")
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"kept")
    whole = image.read_bytes()
    for offset in structure.HEADER_OFFSETS:
        damaged = bytearray(whole)
        damaged[offset + 8] ^= 1
        image.write_bytes(damaged)
        with blocklayer.open(image) as disk:
            assert disk.read(0, 4) == b"kept"
        qemu_img("check", "-f", "vhdx", image)


def test_reading_changes_nothing_and_writing_changes_the_identity(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 3 * MIB, format="vhdx")
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"a")
    before = image.read_bytes()
    with blocklayer.open(image, writable=True) as disk:
        assert disk.read(0, 1) == b"a"
    assert image.read_bytes() == before
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"b")
    headers = [
        structure.decode_header(image.read_bytes()[o : o + 4096]) for o in structure.HEADER_OFFSETS
    ]
    old = [structure.decode_header(before[o : o + 4096]) for o in structure.HEADER_OFFSETS]
    assert None not in headers
    newest = max(h.sequence_number for h in headers if h)
    assert newest > max(h.sequence_number for h in old if h)
    written = {h.data_write_guid for h in headers if h} - {h.data_write_guid for h in old if h}
    assert written


def test_a_log_of_lies_ends(tmpfs: Path) -> None:
    """Every sector claims to be an entry as long as the log: looking is bounded."""
    guid = bytes(range(16))
    ring = bytearray(MIB)
    for offset in range(0, MIB, log.SECTOR):
        struct.pack_into("<4sIIIQII16s", ring, offset, b"loge", 0, MIB, 0, 1, 0, 0, guid)
    with pytest.raises(BlockError, match="more entries than it has room for"):
        log.active_entries(bytes(ring), guid)


@pytest.mark.parametrize("kind", ["sequence", "descriptor", "offset"])
def test_entries_that_contradict_themselves(kind: str) -> None:
    guid = bytes(range(16))
    entry = bytearray(
        log.encode_entry(
            [(5 * MIB, b"x" * 4096)],
            log_guid=guid,
            sequence_number=7,
            tail=0,
            flushed_file_size=6 * MIB,
            last_file_size=6 * MIB,
        )
    )
    ring = bytes(entry).ljust(MIB, b"\0")
    found = log.active_entries(ring, guid)
    assert [u.data for u in log.entry_updates(ring, found[0])] == [b"x" * 4096]
    place = {"sequence": 4096 + 4092, "descriptor": 64, "offset": 64 + 16}[kind]
    entry[place] ^= 1
    ring = structure.with_checksum(entry).ljust(MIB, b"\0")
    assert log.active_entries(ring, guid) == []


@pytest.mark.parametrize("size", ["1G", "100G", "32T", "64T"])
def test_block_sizes_are_qemus(size: str, tmpfs: Path, qemu_img: Oracle) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    blocklayer.create(ours, size, format="vhdx")
    qemu_img("create", "-q", "-f", "vhdx", theirs, size)
    infos = [qemu_img.json("info", "--output=json", path) for path in (ours, theirs)]
    assert infos[0]["cluster-size"] == infos[1]["cluster-size"]
    assert infos[0]["virtual-size"] == infos[1]["virtual-size"]
    qemu_img("check", "-f", "vhdx", ours)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": "3M"}, "power of two"),
        ({"log_size": "0"}, "multiple of 1 MB"),
        ({"log_size": "5G"}, "smaller than 4 GB"),
        ({"size": "65T"}, "max of 64TB"),
    ],
)
def test_what_cannot_be_made(options: dict[str, str], said: str, tmpfs: Path) -> None:
    with pytest.raises(BlockError, match=said):
        blocklayer.create(tmpfs / "image", options.pop("size", "1M"), format="vhdx", **options)


def test_another_reader(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vhdx", block_size="1M")
    with blocklayer.open(image, writable=True) as disk:
        for offset in range(0, 10 * MIB, 1234567):
            disk.write(offset, b"other reader" * 1000)
        content = disk.read(0, disk.size)
    assert read_vhd(image) == content
