"""QED (QEMU enhanced disk): the header, and what table entries mean.

Public:
    Header                          the first 64 bytes; `unpack`, `pack`
    decode_header(data, file_size) -> Header   judged: every field that is used is safe to use
    new_header(size, cluster_size, table_size, …) -> Header
    name_place(header, length) -> int          where the next backing file name goes
    UNALLOCATED, ZERO               entries that name no cluster

1. Tables have ``table_entries`` entries; the L1 table lies in the file behind the header.
2. ``name_place`` never answers with a place that the name in force touches: the header's own sector
   decides which one counts.
"""

from __future__ import annotations

from typing import Final

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U32, U64, Record
from blocklayer.units import KIB, MIB, SECTOR, is_power_of_two

MAGIC: Final = b"QED\0"
_MAGIC: Final = int.from_bytes(MAGIC, "little")

FEATURE_BACKING_FILE: Final = 1
FEATURE_NEED_CHECK: Final = 2
FEATURE_BACKING_RAW: Final = 4
FEATURES: Final = FEATURE_BACKING_FILE | FEATURE_NEED_CHECK | FEATURE_BACKING_RAW
"""All that are known."""

UNALLOCATED: Final = 0
ZERO: Final = 1

MIN_CLUSTER_SIZE: Final = 4 * KIB
MAX_CLUSTER_SIZE: Final = 64 * MIB
MAX_TABLE_SIZE: Final = 16
DEFAULT_CLUSTER_SIZE: Final = 64 * KIB
DEFAULT_TABLE_SIZE: Final = 4
MAX_NAME_SIZE: Final = 1023
_MAX_SIZE: Final = 1 << 62
_NAME_ROOM: Final = MAX_NAME_SIZE + 1


class Header(Record, byte_order="<"):
    """The start of the first cluster. Names are the specification's."""

    magic: U32
    cluster_size: U32
    table_size: U32
    header_size: U32
    features: U64
    compat_features: U64
    autoclear_features: U64
    l1_table_offset: U64
    image_size: U64
    backing_filename_offset: U32
    backing_filename_size: U32

    @property
    def table_bytes(self) -> int:
        """Bytes of the L1 table, and of each L2 table."""
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        """Entries of a table."""
        return self.table_bytes // 8

    @property
    def data_offset(self) -> int:
        """Where clusters may begin: what is before belongs to the header."""
        return self.header_size * self.cluster_size

    @property
    def has_backing(self) -> bool:
        """Whether the fields of the backing file's name are in use."""
        return bool(self.features & FEATURE_BACKING_FILE)


def decode_header(data: bytes, file_size: int) -> Header:
    """The header at the start of ``data``. Raises FormatError or UnsupportedError."""
    header = Header.unpack(data)
    if header.magic != _MAGIC:
        raise FormatError("Image not in QED format")
    if header.features & ~FEATURES:
        raise UnsupportedError(f"Unsupported QED features: {header.features & ~FEATURES:x}")
    if not _valid_cluster_size(header.cluster_size):
        raise FormatError("QED cluster size is invalid")
    if not _valid_table_size(header.table_size):
        raise FormatError("QED table size is invalid")
    if header.image_size > max_size(header.cluster_size, header.table_size) or (
        header.image_size % SECTOR
    ):
        raise FormatError("QED image size is invalid")
    if not header.header_size or header.data_offset > file_size:
        raise FormatError("QED header size is invalid")
    place = header.l1_table_offset
    if (
        place % header.cluster_size
        or place < header.data_offset
        or place + header.table_bytes > file_size
    ):
        raise FormatError("QED table offset is invalid")
    if header.has_backing:
        end = header.backing_filename_offset + header.backing_filename_size
        if end > header.data_offset or header.backing_filename_offset < Header.SIZE:
            raise FormatError("QED backing filename offset is invalid")
        if not 0 < header.backing_filename_size <= MAX_NAME_SIZE:
            raise FormatError("QED backing filename is too long")
    return header


def _valid_cluster_size(size: int) -> bool:
    return is_power_of_two(size) and MIN_CLUSTER_SIZE <= size <= MAX_CLUSTER_SIZE


def _valid_table_size(size: int) -> bool:
    return is_power_of_two(size) and size <= MAX_TABLE_SIZE


def max_size(cluster_size: int, table_size: int) -> int:
    """The largest disk that tables of such an image can describe, in bytes."""
    entries = table_size * cluster_size // 8
    return min(entries * entries * cluster_size, _MAX_SIZE)


def check_layout(size: int, cluster_size: int, table_size: int) -> str | None:
    """Why no image of this shape can be made; None if it can."""
    if not _valid_cluster_size(cluster_size):
        return (
            f"QED cluster size must be within range [{MIN_CLUSTER_SIZE}, {MAX_CLUSTER_SIZE}] and "
            "power of 2"
        )
    if not _valid_table_size(table_size):
        return f"QED table size must be within range [1, {MAX_TABLE_SIZE}] and power of 2"
    if size > max_size(cluster_size, table_size):
        return (
            "QED image size must be a non-zero multiple of cluster size and less than "
            f"{max_size(cluster_size, table_size)} bytes"
        )
    return None


def new_header(size: int, cluster_size: int, table_size: int) -> Header:
    """The header of a new image of ``size`` bytes without a backing file."""
    return Header(
        magic=_MAGIC,
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=0,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=cluster_size,
        image_size=size,
        backing_filename_offset=0,
        backing_filename_size=0,
    )


def name_place(header: Header, length: int) -> int:
    """Where a new backing file name of ``length`` bytes can be written beside the one in force."""
    start, end = 0, 0
    if header.has_backing:
        start = header.backing_filename_offset
        end = start + header.backing_filename_size
    # A name touches no more than two of these places.
    for place in range(Header.SIZE, Header.SIZE + 3 * _NAME_ROOM, _NAME_ROOM):
        if place >= end or place + length <= start:
            return place
    raise AssertionError("three places, and a name as long as all of them")
