"""Parallels' expanding images: the header, and where the clusters of its table are.

Public:
    Header                          the first 64 bytes; `unpack`, `pack`
    decode_header(data) -> Header   judged: every field that is used is safe to use
    new_header(size, cluster_size) -> Header
    necessary_extension(data) -> bool   whether a format extension forbids that the image changes

1. A table entry counts sectors in images with the old magic, clusters in those with the new one.
2. ``data_offset`` is right even where the header's own field is not.
"""

from __future__ import annotations

from typing import Annotated, Final

from blocklayer.errors import FormatError
from blocklayer.record import U32, U64, Record
from blocklayer.units import MIB, SECTOR, align_up, div_up

MAGIC_OLD: Final = b"WithoutFreeSpace"
MAGIC_NEW: Final = b"WithouFreSpacExt"
MAGICS: Final = (MAGIC_OLD, MAGIC_NEW)
_VERSION: Final = 2
_HEADS: Final = 16
_SECTORS_A_TRACK: Final = 32
MAX_ENTRIES: Final = 0x7FFFFFFF // 4
_MAX_CLUSTER_SECTORS: Final = 0x7FFFFFFF // SECTOR
_MAX_SIZE: Final = 1 << 62
DEFAULT_CLUSTER_SIZE: Final = MIB

IN_USE: Final = 0x746F6E59
CLOSED: Final = 0x312E3276
IN_USE_OFFSET: Final = 44
DATA_OFF_OFFSET: Final = 48
EXT_OFF_OFFSET: Final = 56

_EXTENSION_MAGIC: Final = 0xAB234CEF23DCEA87
_BITMAP_MAGIC: Final = 0x20385FAE252CB34A
_NECESSARY: Final = 1
_MAX_FEATURES: Final = 1000


class Header(Record, byte_order="<"):
    """The start of the file; the table follows. Names are the specification's."""

    magic: Annotated[bytes, "16s"]
    version: U32
    heads: U32
    cylinders: U32
    tracks: U32
    bat_entries: U32
    nb_sectors: U64
    in_use: U32
    data_off: U32
    flags: U32
    ext_off: U64

    @property
    def is_new(self) -> bool:
        """Whether table entries count clusters."""
        return self.magic == MAGIC_NEW

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster; not always a power of two."""
        return self.tracks * SECTOR

    @property
    def entry_size(self) -> int:
        """Bytes of the file that one step of a table entry stands for."""
        return self.cluster_size if self.is_new else SECTOR

    @property
    def size(self) -> int:
        """The disk's size; past what the table describes, it reads as zeros."""
        sectors = self.nb_sectors if self.is_new else self.nb_sectors & 0xFFFFFFFF
        return sectors * SECTOR

    @property
    def table_end(self) -> int:
        """Where the table ends in the file."""
        return Header.SIZE + 4 * self.bat_entries

    @property
    def expected_data_off(self) -> int:
        """The sector at which the data can begin at the earliest."""
        unit = self.cluster_size if self.is_new else SECTOR
        return align_up(self.table_end, unit) // SECTOR

    @property
    def data_off_valid(self) -> bool:
        """Whether the header's own word for it can be true."""
        if not self.data_off:
            return not self.is_new
        return self.data_off * SECTOR >= self.table_end

    @property
    def data_offset(self) -> int:
        """Where the data begin in the file."""
        trusted = self.data_off and self.data_off_valid
        return (self.data_off if trusted else self.expected_data_off) * SECTOR


def decode_header(data: bytes) -> Header:
    """The header at the start of ``data``. Raises FormatError."""
    header = Header.unpack(data)
    if header.magic not in MAGICS or header.version != _VERSION:
        raise FormatError("Image not in Parallels format")
    if not header.tracks:
        raise FormatError("Invalid image: Zero sectors per track")
    if header.tracks > _MAX_CLUSTER_SECTORS:
        raise FormatError("Invalid image: Too big cluster")
    if header.bat_entries > MAX_ENTRIES:
        raise FormatError("Catalog too large")
    if header.size > _MAX_SIZE:
        raise FormatError(f"Invalid image: a disk of {header.size:#x} bytes")
    return header


def new_header(size: int, cluster_size: int) -> Header:
    """The header of a new image. Raises FormatError when no table can describe the disk."""
    sectors, tracks = div_up(size, SECTOR), div_up(cluster_size, SECTOR)
    if not 0 < tracks <= _MAX_CLUSTER_SECTORS:
        raise FormatError("Cluster size is too large" if tracks else "Cluster size is zero")
    entries = div_up(sectors, tracks)
    # QEMU says so of its own limit; a table entry must also be able to count the last cluster.
    if entries > MAX_ENTRIES:
        raise FormatError("Image size is too large for this cluster size")
    header = Header(
        magic=MAGIC_NEW,
        version=_VERSION,
        heads=_HEADS,
        cylinders=(sectors // _HEADS // _SECTORS_A_TRACK) & 0xFFFFFFFF,
        tracks=tracks,
        bat_entries=entries,
        nb_sectors=sectors,
        in_use=0,
        data_off=0,
        flags=0,
        ext_off=0,
    )
    header.data_off = header.expected_data_off
    return header


class _Feature(Record, byte_order="<"):
    magic: U64
    flags: U64
    data_size: U32
    unused: U32


def necessary_extension(data: bytes) -> bool:
    """Whether the extension cluster ``data`` holds what must not be dropped, or cannot be read.

    Dirty bitmaps may be dropped: whoever misses one copies everything.
    """
    if len(data) < 24 or int.from_bytes(data[:8], "little") != _EXTENSION_MAGIC:
        return False
    place = 24
    for _ in range(_MAX_FEATURES):
        if place + _Feature.SIZE > len(data):
            return False
        feature = _Feature.unpack(data, place)
        if not feature.magic:
            return False
        if feature.flags & _NECESSARY and feature.magic != _BITMAP_MAGIC:
            return True
        place = align_up(place + _Feature.SIZE + feature.data_size, 8)
    return True
