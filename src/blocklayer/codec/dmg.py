"""Apple's disk images (UDIF): the trailer, and the tables of chunks that it leads to.

Public:
    decode_trailer(data, file_size) -> Trailer
    tables_of_plist(data) -> list[bytes], tables_of_fork(data) -> list[bytes]
    decode_chunks(tables, data_offset, file_size) -> Chunks     all, in the order of the disk
    the kinds of chunks: ZERO, RAW, IGNORED, ZLIB, BZIP2, LZFSE, LZMA

1. Chunks do not overlap; each is bounded in size, and its bytes are in the file.
2. Nothing of a property list is taken but the tables in it.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Any, Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U32, U64, Record
from blocklayer.units import MIB, SECTOR

MAGIC: Final = b"koly"
_TABLE_MAGIC: Final = b"mish"

ZERO: Final = 0
RAW: Final = 1
IGNORED: Final = 2
ZLIB: Final = 0x80000005
BZIP2: Final = 0x80000006
LZFSE: Final = 0x80000007
LZMA: Final = 0x80000008
_COMMENT: Final = 0x7FFFFFFE
_END: Final = 0xFFFFFFFF
PACKED: Final = frozenset((ZLIB, BZIP2, LZFSE, LZMA))

MAX_LIST: Final = 16 * MIB
"""Bytes of a property list, or of a resource fork."""
_MAX_CHUNKS: Final = 1 << 20
_MAX_CHUNK: Final = 64 * MIB
_MAX_SECTORS: Final = 1 << 53
_MAX_RESOURCES: Final = 4096
TAIL_SIZE: Final = 1023


class Trailer(Record, byte_order=">"):
    """The last 512 bytes of the file."""

    magic: Annotated[bytes, "4s"]
    version: U32
    header_size: U32
    flags: U32
    running_offset: U64
    data_offset: U64
    data_length: U64
    fork_offset: U64
    fork_length: U64
    segment: U32
    segments: U32
    segment_id: Annotated[bytes, "16s"]
    data_checksum: Annotated[bytes, "136s"]
    list_offset: U64
    list_length: U64
    reserved: Annotated[bytes, "120s"]
    checksum: Annotated[bytes, "136s"]
    variant: U32
    sectors: U64
    reserved2: Annotated[bytes, "12s"]


class _Table(Record, byte_order=">"):
    magic: Annotated[bytes, "4s"]
    version: U32
    first_sector: U64
    sectors: U64
    data_offset: U64
    buffers: U32
    descriptors: U32
    reserved: Annotated[bytes, "24s"]
    checksum: Annotated[bytes, "136s"]
    chunks: U32


class _Chunk(Record, byte_order=">"):
    kind: U32
    comment: U32
    sector: U64
    sectors: U64
    offset: U64
    length: U64


class _Fork(Record, byte_order=">"):
    data_offset: U32
    map_offset: U32
    data_length: U32
    map_length: U32


class Chunks(msgspec.Struct, frozen=True):
    """Chunks side by side, in the order of the disk. In bytes."""

    starts: array[int]
    ends: array[int]
    kinds: array[int]
    places: array[int]
    lengths: array[int]


def decode_trailer(data: bytes, file_size: int) -> Trailer:
    """The trailer in ``data``, the file's last ``TAIL_SIZE`` bytes. Raises FormatError.

    Storage counts in sectors, images do not: zeros may follow the trailer.
    """
    length = len(data) - Trailer.SIZE
    at = data.rfind(MAGIC, max(0, length - SECTOR + 1), length + len(MAGIC))
    if at < 0 or any(data[at + Trailer.SIZE :]):
        raise FormatError("Image not in dmg format: it does not end in a 'koly' block")
    trailer = Trailer.unpack(data, at)
    if trailer.header_size != Trailer.SIZE:
        raise FormatError("Image not in dmg format: it does not end in a 'koly' block")
    if trailer.segments > 1:
        raise UnsupportedError("Images in several segments are not supported")
    if trailer.sectors > _MAX_SECTORS:
        raise FormatError(f"The image has {trailer.sectors:#x} sectors")
    for offset, length in (
        (trailer.list_offset, trailer.list_length),
        (trailer.fork_offset, trailer.fork_length),
    ):
        if length > MAX_LIST or offset + length > file_size:
            raise FormatError(f"The image's tables at {offset:#x}, {length:#x} bytes, are too long")
    return trailer


def tables_of_plist(data: bytes) -> list[bytes]:
    """The chunk tables in a property list. Raises FormatError."""
    import plistlib

    try:
        found: Any = plistlib.loads(data, fmt=plistlib.FMT_XML)
        blocks = found["resource-fork"]["blkx"]
        tables = [block["Data"] for block in blocks]
    except Exception as error:  # whatever strangers' XML makes of the parser
        raise FormatError(f"The image's property list cannot be read: {error}") from None
    if not all(isinstance(table, bytes) for table in tables):
        raise FormatError("The image's property list holds tables that are no data")
    return tables


def tables_of_fork(data: bytes) -> list[bytes]:
    """The chunk tables in a resource fork. Raises FormatError."""
    fork = _Fork.unpack(data)
    at, end = fork.data_offset, fork.data_offset + fork.data_length
    if end > len(data):
        raise FormatError("The image's resource fork is cut off")
    tables: list[bytes] = []
    while at + 4 <= end and len(tables) < _MAX_RESOURCES:
        length = int.from_bytes(data[at : at + 4], "big")
        resource = data[at + 4 : min(at + 4 + length, end)]
        if resource.startswith(_TABLE_MAGIC):
            tables.append(resource)
        at += 4 + length
    return tables


def decode_chunks(tables: list[bytes], data_offset: int, file_size: int) -> Chunks:
    """The chunks of all ``tables``. Raises FormatError or UnsupportedError."""
    found: list[tuple[int, int, int, int, int]] = []
    for data in tables:
        if not data.startswith(_TABLE_MAGIC):
            # Property lists have other things beside tables.
            continue
        table = _Table.unpack(data)
        if table.chunks > _MAX_CHUNKS or len(found) + table.chunks > _MAX_CHUNKS:
            raise FormatError(f"More than {_MAX_CHUNKS} chunks")
        for number in range(table.chunks):
            chunk = _Chunk.unpack(data, _Table.SIZE + number * _Chunk.SIZE)
            if chunk.kind == _END:
                break
            if chunk.kind == _COMMENT or not chunk.sectors:
                continue
            found.append(_judge(chunk, table, data_offset, file_size))
    found.sort()
    columns = [array("Q", column) for column in zip(*found, strict=True)]
    starts, ends, kinds, places, lengths = columns or [array("Q")] * 5
    for number in range(1, len(starts)):
        if starts[number] < ends[number - 1]:
            raise FormatError(f"Two chunks of the disk meet at {starts[number]:#x}")
    return Chunks(starts, ends, kinds, places, lengths)


def _judge(
    chunk: _Chunk, table: _Table, data_offset: int, file_size: int
) -> tuple[int, int, int, int, int]:
    first = table.first_sector + chunk.sector
    if max(first, chunk.sectors) > _MAX_SECTORS:
        raise FormatError(f"A chunk of {chunk.sectors:#x} sectors at sector {first:#x}")
    start, size = first * SECTOR, chunk.sectors * SECTOR
    if chunk.kind in (ZERO, IGNORED):
        return start, start + size, ZERO, 0, 0
    place = data_offset + table.data_offset + chunk.offset
    if place + chunk.length > file_size:
        raise FormatError(f"The chunk at {start:#x} is stored at {place:#x}, past the end")
    if chunk.kind == RAW:
        if chunk.length < size:
            raise FormatError(f"The chunk at {start:#x} is shorter than its sectors")
    elif chunk.kind not in PACKED:
        raise UnsupportedError(f"Chunks of kind {chunk.kind:#x} are not supported")
    elif size > _MAX_CHUNK or chunk.length > 2 * _MAX_CHUNK:
        raise FormatError(f"The chunk at {start:#x} has {size:#x} bytes, packed {chunk.length:#x}")
    return start, start + size, chunk.kind, place, chunk.length
