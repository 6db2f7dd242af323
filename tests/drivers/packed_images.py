"""Images that no tool at hand can make, written by the tests: dmg, cloop and bochs.

Each function answers with what the image's disk holds.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import plistlib
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

SECTOR = 512
_KINDS = {
    "raw": 1,
    "zero": 0,
    "ignored": 2,
    "zlib": 0x80000005,
    "bzip2": 0x80000006,
    "lzfse": 0x80000007,
    "lzma": 0x80000008,
    "adc": 0x80000004,
}

_SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def plain(seed: int, size: int) -> bytes:
    """Something that can be packed, followed by something that cannot."""
    return bytes([seed + 1]) * (size // 2) + random.Random(seed).randbytes(size - size // 2)


def pack(kind: str, data: bytes) -> bytes:
    """The bytes of a chunk of this kind."""
    if kind in ("zero", "ignored"):
        return b""
    if kind == "lzfse":
        packed: bytes = importlib.import_module("lzfse").compress(data)
        return packed
    return {
        "raw": lambda: data,
        "zlib": lambda: zlib.compress(data),
        "bzip2": lambda: bz2.compress(data),
        "lzma": lambda: lzma.compress(data),
        "adc": lambda: data,
    }[kind]()


class Layout(msgspec.Struct):
    """What of a dmg image can be made wrong."""

    kinds: Sequence[str]
    sectors: int = 64
    fork: bool = False
    """Tables in a resource fork, as older images have them."""
    tables: int = 1
    data_offset: int = 0
    gap: int = 0
    """Sectors between one table's part of the disk and the next one's."""


def write_dmg(path: Path, layout: Layout) -> bytes:
    """A UDIF image with a chunk of each of ``kinds`` in turn in every table."""
    data = bytearray(bytes(layout.data_offset))
    disk, tables = bytearray(), []
    for number in range(layout.tables):
        if number:
            disk += bytes(layout.gap * SECTOR)
        first, chunks = len(disk) // SECTOR, []
        for position, kind in enumerate(layout.kinds):
            size = layout.sectors * SECTOR
            content = plain(16 * number + position, size)
            packed = pack(kind, content)
            chunks.append(
                (_KINDS[kind], position * layout.sectors, layout.sectors,
                 len(data) - layout.data_offset, len(packed))
            )  # fmt: skip
            data += packed
            disk += content if packed else bytes(size)
        chunks.append((0x7FFFFFFE, 0, 0, 0, 0))
        end = len(layout.kinds) * layout.sectors
        chunks.append((0xFFFFFFFF, end, 0, len(data), 0))
        tables.append(_table(first, end, chunks))
    sectors = len(disk) // SECTOR
    write_dmg_of(path, bytes(data), tables, layout.data_offset, sectors, fork=layout.fork)
    return bytes(disk)


def _table(first: int, count: int, chunks: Sequence[tuple[int, int, int, int, int]]) -> bytes:
    head = struct.pack(
        ">4sIQQQII24sII128sI",
        b"mish", 1, first, count, 0, 0x208, 0, bytes(24), 2, 32, bytes(128), len(chunks),
    )  # fmt: skip
    return head + b"".join(struct.pack(">IIQQQQ", kind, 0, *rest) for kind, *rest in chunks)


def write_dmg_of(
    path: Path,
    data: bytes,
    tables: Sequence[bytes],
    data_offset: int,
    sectors: int,
    *,
    fork: bool,
) -> None:
    """The file around chunks and their tables."""
    listed = data_fork = (0, 0)
    if fork:
        area = b"".join(len(table).to_bytes(4, "big") + table for table in tables)
        area = (8).to_bytes(4, "big") + b"no table" + area
        body = struct.pack(">IIII", 256, 256 + len(area), len(area), 0).ljust(256, b"\0") + area
        data_fork = (len(data), len(body))
    else:
        blocks = [
            {"Attributes": "0x0050", "Data": table, "ID": str(number), "Name": f"part {number}"}
            for number, table in enumerate(tables)
        ]
        body = plistlib.dumps({"resource-fork": {"blkx": blocks, "plst": []}})
        listed = (len(data), len(body))
    trailer = struct.pack(
        ">4sIIIQQQQQII16sII128sQQ120sII128sIQIII",
        b"koly", 4, 512, 1, 0, data_offset, len(data) - data_offset, *data_fork, 1, 1, bytes(16),
        2, 32, bytes(128), *listed, bytes(120), 2, 32, bytes(128), 1, sectors, 0, 0, 0,
    )  # fmt: skip
    path.write_bytes(data + body + trailer)


def write_cloop(path: Path, *, block_size: int = 4096, blocks: int = 9) -> bytes:
    """A cloop image of version 2."""
    content = [plain(number, block_size) for number in range(blocks)]
    packed = [zlib.compress(block) for block in content]
    head = _SCRIPT.ljust(128, b"\0")
    place = len(head) + 8 + 8 * (blocks + 1)
    offsets = [place]
    for block in packed:
        place += len(block)
        offsets.append(place)
    head += struct.pack(f">II{blocks + 1}Q", block_size, blocks, *offsets)
    path.write_bytes(head + b"".join(packed))
    return b"".join(content)


def write_bochs(
    path: Path, *, version: int = 2, extent: int = 65536, extents: int = 12, bitmap: int = 16
) -> bytes:
    """A growing disk in which some extents are there, with some of their sectors."""
    size = extent * extents
    head = struct.pack("<32s16s16sII", b"Bochs Virtual HD Image", b"Redolog", b"Growing",
                       version << 16, 512)  # fmt: skip
    head += struct.pack("<III", extents, bitmap, extent)
    head += struct.pack("<Q", size) if version == 1 else struct.pack("<IQ", 0, size)
    catalog, body, disk = [0xFFFFFFFF] * extents, bytearray(), bytearray(size)
    for place, number in enumerate((3, 0, extents - 1, 4)):
        catalog[number] = place
        bits, data = bytearray(-(-bitmap // SECTOR) * SECTOR), bytearray(extent)
        for sector in range(extent // SECTOR):
            if (sector // 3 + number) % 3:
                bits[sector >> 3] |= 1 << (sector & 7)
                content = bytes([(sector * 7 + number) % 255 + 1]) * SECTOR
                data[sector * SECTOR : (sector + 1) * SECTOR] = content
        disk[number * extent : (number + 1) * extent] = data
        body += bits + data
    path.write_bytes(head.ljust(512, b"\0") + struct.pack(f"<{extents}I", *catalog) + body)
    return bytes(disk)
