"""Bochs' growing disks: the header, and where an extent's parts are.

Public:
    Header                  as far as both versions have the same fields
    decode_header(data) -> Disk     judged: every field that is used is safe to use
    UNALLOCATED             a catalog entry that names no extent

1. An extent is stored as its bitmap, one bit a sector, then its sectors; both in whole sectors.
2. The catalog has an entry for every extent of the disk.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U32, U64, Record
from blocklayer.units import GIB, SECTOR, div_up, is_power_of_two

MAGIC: Final = b"Bochs Virtual HD Image"
_TYPE: Final = b"Redolog"
_SUBTYPE: Final = b"Growing"
_VERSION_1: Final = 0x00010000
_VERSION_2: Final = 0x00020000
UNALLOCATED: Final = 0xFFFFFFFF
HEADER_SIZE: Final = 512
_MAX_ENTRIES: Final = 1 << 24
_MAX_EXTENT: Final = GIB


class Header(Record, byte_order="<"):
    """What every version begins with. Names are those of Bochs' documentation."""

    magic: Annotated[bytes, "32s"]
    type: Annotated[bytes, "16s"]
    subtype: Annotated[bytes, "16s"]
    version: U32
    header_size: U32
    catalog: U32
    bitmap: U32
    extent: U32


class _Disk1(Record, byte_order="<"):
    size: U64


class _Disk2(Record, byte_order="<"):
    timestamp: U32
    size: U64


class Disk(msgspec.Struct, frozen=True):
    """A growing disk. Sizes and offsets in bytes."""

    size: int
    catalog_offset: int
    entries: int
    extent_size: int
    bitmap_size: int

    @property
    def data_offset(self) -> int:
        """Where the first extent may be."""
        return self.catalog_offset + 4 * self.entries

    def place(self, entry: int) -> int:
        """Where the bitmap of the extent that ``entry`` names begins."""
        return self.data_offset + entry * (self.bitmap_size + self.extent_size)


def decode_header(data: bytes) -> Disk:
    """The disk that the header at the start of ``data`` describes. Raises FormatError."""
    header = Header.unpack(data)
    if header.magic.rstrip(b"\0") != MAGIC:
        raise FormatError("Image not in Bochs format")
    if header.type.rstrip(b"\0") != _TYPE or header.subtype.rstrip(b"\0") != _SUBTYPE:
        kind = header.subtype.rstrip(b"\0").decode("latin-1")
        raise UnsupportedError(f"Bochs disks of kind '{kind}' are not supported")
    if header.version == _VERSION_1:
        size = _Disk1.unpack(data, Header.SIZE).size
    elif header.version == _VERSION_2:
        size = _Disk2.unpack(data, Header.SIZE).size
    else:
        raise UnsupportedError(f"Bochs version {header.version:#x} is not supported")
    if header.header_size < HEADER_SIZE or header.header_size > _MAX_ENTRIES:
        raise FormatError(f"Bochs header of {header.header_size} bytes")
    if not is_power_of_two(header.extent) or not SECTOR <= header.extent <= _MAX_EXTENT:
        raise FormatError(f"Extent size {header.extent} is not a power of two of 512 or more")
    if header.bitmap < div_up(header.extent, 8 * SECTOR):
        raise FormatError(f"A bitmap of {header.bitmap} bytes does not cover an extent")
    if header.bitmap > _MAX_EXTENT:
        raise FormatError(f"A bitmap of {header.bitmap} bytes is too large")
    if header.catalog > _MAX_ENTRIES:
        raise FormatError("Catalog size is too large")
    if size % SECTOR or div_up(size, header.extent) > header.catalog:
        raise FormatError("Catalog size is too small for this disk size")
    return Disk(
        size=size,
        catalog_offset=header.header_size,
        entries=header.catalog,
        extent_size=header.extent,
        bitmap_size=div_up(header.bitmap, SECTOR) * SECTOR,
    )
