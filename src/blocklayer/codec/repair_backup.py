"""The file that keeps what a repair overwrites: a head, and pages as they were.

Public:
    KeptPage(offset, before, after_crc)      4096 bytes of the image's file
    Backup(size_before, size_after, pages)   all that a repair changes
    encode(backup) -> bytes, decode(data) -> Backup        FormatError if it is not one, or broken

1. A checksum over everything stands at the end: half a backup is none.
2. Of what the repair wrote there are checksums, which tell whether the image was changed since.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Final

import msgspec

from blocklayer.errors import FormatError
from blocklayer.record import U32, U64, Record

PAGE_SIZE: Final = 4096
MAGIC: Final = b"BLKMEND1"


class _Head(Record, byte_order=">"):
    magic: Annotated[bytes, "8s"]
    size_before: U64
    size_after: U64
    count: U64


class _PageHead(Record, byte_order=">"):
    offset: U64
    after_crc: U32


class KeptPage(msgspec.Struct, frozen=True):
    """A page as it was, and the checksum of what the repair made of it."""

    offset: int
    before: bytes
    after_crc: int


class Backup(msgspec.Struct, frozen=True):
    """What a repair changes; sizes are the file's, in bytes."""

    size_before: int
    size_after: int
    pages: list[KeptPage]


def checksum(data: bytes | bytearray | memoryview) -> int:
    """As it is kept of a page."""
    return zlib.crc32(data)


def encode(backup: Backup) -> bytes:
    """The whole file."""
    parts = [_Head(MAGIC, backup.size_before, backup.size_after, len(backup.pages)).pack()]
    for page in backup.pages:
        assert len(page.before) == PAGE_SIZE
        parts += [_PageHead(page.offset, page.after_crc).pack(), page.before]
    data = b"".join(parts)
    return data + checksum(data).to_bytes(4, "big")


def decode(data: bytes) -> Backup:
    """What ``encode`` was given."""
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError("this is no backup that a repair has made")
    head = _Head.unpack(data)
    step = _PageHead.SIZE + PAGE_SIZE
    if len(data) != _Head.SIZE + head.count * step + 4:
        raise FormatError("the backup is not complete, or something follows it")
    if checksum(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "big"):
        raise FormatError("the backup is damaged: its checksum is wrong")
    pages = []
    for at in range(_Head.SIZE, len(data) - 4, step):
        page = _PageHead.unpack(data, at)
        if page.offset % PAGE_SIZE or page.offset >= max(head.size_before, head.size_after):
            raise FormatError(f"the backup has a page at {page.offset:#x}, outside the image")
        before = data[at + _PageHead.SIZE : at + step]
        pages.append(KeptPage(page.offset, before, page.after_crc))
    return Backup(head.size_before, head.size_after, pages)
