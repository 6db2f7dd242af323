"""Hosted sparse extents of VMDK: header, footer, the layout of new ones, grains and markers.

Public:
    Header, decode_header(data) -> Header, footer_header(data) -> Header
    Layout(capacity) and new_header(layout, …): where a new extent's tables are
    directory(layout, offset) -> array: the grain directory of a new extent
    GrainMarker, pack_grain(sector, compressed) -> bytes
    MAGIC, UNALLOCATED, ZEROED, AT_END, DESCRIPTOR_OFFSET, DESCRIPTOR_SIZE

1. No size or place of a header is used before it is compared with its limit. Whether a place lies
   within the file is for the driver to see.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U8, U16, U32, U64, Record
from blocklayer.units import MIB, SECTOR, align_up, div_up, is_power_of_two

MAGIC: Final = b"KDMV"
_NEWLINES: Final = b"\n \r\n"
AT_END: Final = 0xFFFFFFFF_FFFFFFFF
"""Where the header says that the grain directory is named by the footer."""

_FLAG_NEWLINES: Final = 1 << 0
_FLAG_REDUNDANT: Final = 1 << 1
_FLAG_ZEROED: Final = 1 << 2
_FLAG_COMPRESSED: Final = 1 << 16
_FLAG_MARKERS: Final = 1 << 17
_DEFLATE: Final = 1

UNALLOCATED: Final = 0
ZEROED: Final = 1
"""A grain that reads as zeros, in extents that may say so."""

GRAIN_SIZE: Final = 64 * 1024
TABLE_ENTRIES: Final = 512
DESCRIPTOR_OFFSET: Final = SECTOR
DESCRIPTOR_SIZE: Final = 20 * SECTOR
_MAX_GRAIN: Final = 16 * MIB
_MAX_TABLE_ENTRIES: Final = 1 << 16
_MAX_CAPACITY: Final = 1 << 54
MAX_TABLES: Final = 1 << 22
"""Grain tables that an extent may have: enough for 128 TiB in grains of 64 KiB."""


class Header(Record, byte_order="<"):
    """The first sector; also, at the end of a finished stream, the footer."""

    magic: Annotated[bytes, "4s"]
    version: U32
    flags: U32
    capacity: U64
    granularity: U64
    descriptor_offset: U64
    descriptor_size: U64
    table_entries: U32
    redundant_offset: U64
    directory_offset: U64
    overhead: U64
    unclean: U8
    newlines: Annotated[bytes, "4s"]
    compression: U16
    padding: Annotated[bytes, "433s"]

    @property
    def size(self) -> int:
        """The extent's size in bytes."""
        return self.capacity * SECTOR

    @property
    def grain_size(self) -> int:
        """Bytes of a grain."""
        return self.granularity * SECTOR

    @property
    def table_count(self) -> int:
        """Grain tables, which is entries of the directory."""
        return div_up(self.capacity, self.granularity * self.table_entries)

    @property
    def compressed(self) -> bool:
        """Whether grains are compressed."""
        return bool(self.flags & _FLAG_COMPRESSED)

    @property
    def markers(self) -> bool:
        """Whether each grain begins with a marker."""
        return bool(self.flags & _FLAG_MARKERS)

    @property
    def redundant(self) -> bool:
        """Whether there is a second directory with tables of its own."""
        return bool(self.flags & _FLAG_REDUNDANT) and self.redundant_offset not in (0, AT_END)

    @property
    def zeroed(self) -> bool:
        """Whether a table entry may say that a grain reads as zeros."""
        return bool(self.flags & _FLAG_ZEROED)


def decode_header(data: bytes) -> Header:
    """The header in ``data``. Raises FormatError or UnsupportedError."""
    header = Header.unpack(data)
    if header.magic != MAGIC:
        raise FormatError("A sparse VMDK extent does not begin with its signature")
    if header.version > 3 or header.version == 0:
        raise UnsupportedError(f"Unsupported VMDK version {header.version}")
    if header.flags & _FLAG_NEWLINES and header.newlines != _NEWLINES:
        raise FormatError("The VMDK header was damaged by a conversion of line ends")
    if header.compressed and header.compression != _DEFLATE:
        raise UnsupportedError(f"Unsupported VMDK compression {header.compression}")
    if not is_power_of_two(header.granularity) or header.grain_size > _MAX_GRAIN:
        raise FormatError(f"Invalid VMDK granularity of {header.granularity} sectors")
    if not 0 < header.table_entries <= _MAX_TABLE_ENTRIES:
        raise FormatError(f"Invalid VMDK grain tables of {header.table_entries} entries")
    if header.capacity >= _MAX_CAPACITY or header.table_count > MAX_TABLES:
        raise FormatError(f"A VMDK extent of {header.capacity} sectors is too large")
    return header


FOOTER_SIZE: Final = 3 * SECTOR
"""Footer marker, footer, and the marker of the end of the stream."""


def footer_header(data: bytes) -> Header:
    """The header in the last ``FOOTER_SIZE`` bytes of a finished stream."""
    marker = Marker.unpack(data)
    end = Marker.unpack(data, 2 * SECTOR)
    if (marker.size, marker.type) != (0, MARKER_FOOTER) or (end.size, end.type) != (0, MARKER_END):
        raise FormatError("The stream-optimized VMDK has no footer: it may have been truncated")
    header = decode_header(data[SECTOR : 2 * SECTOR])
    if header.directory_offset == AT_END:
        raise FormatError("The VMDK footer does not say where the grain directory is")
    return header


MARKER_END: Final = 0
MARKER_TABLE: Final = 1
MARKER_DIRECTORY: Final = 2
MARKER_FOOTER: Final = 3


class Marker(Record, byte_order="<"):
    """What stands, a sector each, before metadata of a stream: its sectors, and of which type."""

    value: U64
    size: U32
    type: U32


class GrainMarker(Record, byte_order="<"):
    """What stands before a compressed grain: its first guest sector, and its bytes here."""

    sector: U64
    size: U32


def pack_grain(sector: int, compressed: bytes) -> bytes:
    """A compressed grain with its marker, padded to sectors."""
    data = GrainMarker(sector, len(compressed)).pack() + compressed
    return data.ljust(align_up(len(data), SECTOR), b"\0")


class Layout(msgspec.Struct, frozen=True):
    """Where the metadata of a new extent of ``capacity`` sectors is, in sectors."""

    capacity: int

    @property
    def table_count(self) -> int:
        return div_up(self.capacity * SECTOR, GRAIN_SIZE * TABLE_ENTRIES)

    @property
    def directory_sectors(self) -> int:
        return div_up(4 * self.table_count, SECTOR)

    @property
    def tables_sectors(self) -> int:
        return self.table_count * (4 * TABLE_ENTRIES // SECTOR)

    @property
    def redundant(self) -> int:
        return (DESCRIPTOR_OFFSET + DESCRIPTOR_SIZE) // SECTOR

    @property
    def directory(self) -> int:
        return self.redundant + self.directory_sectors + self.tables_sectors

    @property
    def end(self) -> int:
        end = self.directory + self.directory_sectors + self.tables_sectors
        return align_up(end, GRAIN_SIZE // SECTOR)


def directory(layout: Layout, offset: int) -> array[int]:
    """The directory at sector ``offset``: its tables follow it."""
    first = offset + layout.directory_sectors
    step = 4 * TABLE_ENTRIES // SECTOR
    return array("I", range(first, first + layout.table_count * step, step))


def new_header(layout: Layout, *, compressed: bool, zeroed: bool) -> Header:
    """The header of a new extent."""
    flags = _FLAG_NEWLINES | _FLAG_REDUNDANT
    if compressed:
        flags |= _FLAG_COMPRESSED | _FLAG_MARKERS
    if zeroed:
        flags |= _FLAG_ZEROED
    return Header(
        magic=MAGIC,
        version=3 if compressed else 2 if zeroed else 1,
        flags=flags,
        capacity=layout.capacity,
        granularity=GRAIN_SIZE // SECTOR,
        descriptor_offset=DESCRIPTOR_OFFSET // SECTOR,
        descriptor_size=DESCRIPTOR_SIZE // SECTOR,
        table_entries=TABLE_ENTRIES,
        redundant_offset=layout.redundant,
        directory_offset=layout.directory,
        overhead=layout.end,
        unclean=0,
        newlines=_NEWLINES,
        compression=_DEFLATE if compressed else 0,
        padding=b"",
    )
