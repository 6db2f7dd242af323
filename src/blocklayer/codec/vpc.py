"""VHD (Virtual PC): footer, dynamic header, parent locators, geometry, and what sizes mean.

Public:
    Footer, decode_footer(data) -> Footer, .pack_checked() -> bytes, .size
    DynamicHeader, decode_dynamic(data, footer) -> DynamicHeader, .locators, .parent_name,
    .bitmap_size, .table_end, .pack_checked()
    new_footer(size, …), new_dynamic(entries), disk_size(size, force) -> (size, geometry)
    locator_path(code, data) -> str | None
    TYPE_FIXED TYPE_DYNAMIC TYPE_DIFFERENCING, UNUSED, BLOCK_SIZE, MAX_SIZE, COOKIE

1. A footer is used only with its cookie and checksum right.
2. Sizes come from the geometry (cylinders × heads × sectors) where the creator is known to have
   meant that, from ``current_size`` otherwise, as QEMU decides.
3. No field is used before it is compared with its limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Final

from blocklayer.errors import FormatError, UnsupportedError, UsageError
from blocklayer.record import U8, U16, U32, U64, Record
from blocklayer.units import MIB, SECTOR, align_up, div_up, is_power_of_two

COOKIE: Final = b"conectix"
_DYNAMIC_COOKIE: Final = b"cxsparse"
_VERSION: Final = 0x00010000
_FEATURES: Final = 2
_NOWHERE: Final = 0xFFFFFFFF_FFFFFFFF

TYPE_FIXED: Final = 2
TYPE_DYNAMIC: Final = 3
TYPE_DIFFERENCING: Final = 4

UNUSED: Final = 0xFFFFFFFF
"""The block allocation table's word for a block that is not stored."""
BLOCK_SIZE: Final = 2 * MIB
EPOCH: Final = 946684800
"""Timestamps count seconds from 2000, here in seconds of Unix time."""

MAX_SECTORS: Final = 0xFF000000
MAX_SIZE: Final = MAX_SECTORS * SECTOR
_MAX_GEOMETRY: Final = (65535, 16, 255)
_MAX_GEOMETRY_SECTORS: Final = 65535 * 16 * 255
_MAX_ENTRIES: Final = 0x7FFFFFFF // 4
_MAX_BLOCK_SIZE: Final = 256 * MIB
_MAX_PATH: Final = 64 * 1024
_GEOMETRY_CREATORS: Final = (b"vpc ", b"qemu")
"""Creators whose images are as large as their geometry says."""

Geometry = tuple[int, int, int]


def _checksum(data: bytes) -> int:
    return ~sum(data) & 0xFFFFFFFF


class Footer(Record, byte_order=">"):
    """The last sector of every image, and the first of those that grow."""

    cookie: Annotated[bytes, "8s"]
    features: U32
    version: U32
    data_offset: U64
    timestamp: U32
    creator_app: Annotated[bytes, "4s"]
    creator_version: U32
    creator_os: Annotated[bytes, "4s"]
    original_size: U64
    current_size: U64
    cylinders: U16
    heads: U8
    sectors: U8
    disk_type: U32
    checksum: U32
    uuid: Annotated[bytes, "16s"]
    saved_state: U8
    reserved: Annotated[bytes, "427s"]

    def pack_checked(self) -> bytes:
        """The footer's bytes, with its checksum set."""
        self.checksum = 0
        self.checksum = _checksum(self.pack())
        return self.pack()

    @property
    def geometry(self) -> Geometry:
        """Cylinders, heads, sectors per track."""
        return self.cylinders, self.heads, self.sectors

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        by_geometry = self.cylinders * self.heads * self.sectors
        if self.creator_app not in _GEOMETRY_CREATORS or self.geometry == _MAX_GEOMETRY:
            return self.current_size // SECTOR * SECTOR
        return by_geometry * SECTOR


def decode_footer(data: bytes) -> Footer:
    """The footer in ``data``. Raises FormatError or UnsupportedError."""
    footer = Footer.unpack(data)
    if footer.cookie != COOKIE:
        raise FormatError("invalid VPC image: neither its first nor its last sector is a footer")
    stored, footer.checksum = footer.checksum, 0
    if _checksum(footer.pack()) != stored:
        raise FormatError("Incorrect header checksum in the VPC image's footer")
    footer.checksum = stored
    if footer.disk_type not in (TYPE_FIXED, TYPE_DYNAMIC, TYPE_DIFFERENCING):
        raise UnsupportedError(f"Unsupported VPC disk type {footer.disk_type}")
    if footer.size > MAX_SIZE:
        raise FormatError(
            f"VPC disk size {footer.size:#x} is too large: at most {MAX_SIZE:#x} (2040 GiB)"
        )
    return footer


class Locator(Record, byte_order=">"):
    """Where one platform's name of the parent is stored."""

    code: Annotated[bytes, "4s"]
    data_space: U32
    data_length: U32
    reserved: U32
    data_offset: U64


class DynamicHeader(Record, byte_order=">"):
    """What images that grow have beside the footer."""

    cookie: Annotated[bytes, "8s"]
    data_offset: U64
    table_offset: U64
    version: U32
    max_table_entries: U32
    block_size: U32
    checksum: U32
    parent_uuid: Annotated[bytes, "16s"]
    parent_timestamp: U32
    reserved: U32
    parent_name_field: Annotated[bytes, "512s"]
    locator_field: Annotated[bytes, "192s"]
    reserved2: Annotated[bytes, "256s"]

    def pack_checked(self) -> bytes:
        """The header's bytes, with its checksum set."""
        self.checksum = 0
        self.checksum = _checksum(self.pack())
        return self.pack()

    @property
    def bitmap_size(self) -> int:
        """Bytes of the sector bitmap in front of each block: whole sectors."""
        return align_up(div_up(self.block_size // SECTOR, 8), SECTOR)

    @property
    def table_end(self) -> int:
        """The first place after the block allocation table."""
        return align_up(self.table_offset + 4 * self.max_table_entries, SECTOR)

    @property
    def parent_name(self) -> str:
        """The parent's file name as its creator called it, "" if there is none."""
        return self.parent_name_field.decode("utf-16-be", "replace").partition("\0")[0]

    @property
    def locators(self) -> Iterator[Locator]:
        """The parent locators that are in use and of a size that a path can have."""
        for offset in range(0, len(self.locator_field), Locator.SIZE):
            locator = Locator.unpack(self.locator_field, offset)
            if locator.code != bytes(4) and 0 < locator.data_length <= _MAX_PATH:
                yield locator


def decode_dynamic(data: bytes, footer: Footer) -> DynamicHeader:
    """The dynamic header in ``data``, judged beside its footer. Raises FormatError."""
    header = DynamicHeader.unpack(data)
    if header.cookie != _DYNAMIC_COOKIE:
        raise FormatError(f"Invalid header magic at {footer.data_offset:#x} of the VPC image")
    if not is_power_of_two(header.block_size) or not (
        SECTOR <= header.block_size <= _MAX_BLOCK_SIZE
    ):
        raise FormatError(f"Invalid block size {header.block_size}")
    if header.max_table_entries > _MAX_ENTRIES:
        raise FormatError(f"Max Table Entries too large ({header.max_table_entries})")
    if header.max_table_entries * header.block_size < footer.size:
        raise FormatError(
            f"Page table too small: {header.max_table_entries} blocks of {header.block_size} bytes "
            f"for a disk of {footer.size:#x} bytes"
        )
    return header


def locator_path(code: bytes, data: bytes) -> str | None:
    """The path that a parent locator's data says, "/"-separated; None for what cannot be used."""
    if code == b"W2ru":
        path = data.decode("utf-16-le", "replace").rstrip("\0")
        return path.replace("\\", "/").removeprefix("./") or None
    if code == b"MacX":
        path = data.decode("utf-8", "surrogateescape").rstrip("\0")
        return path.removeprefix("file://localhost").removeprefix("file://") or None
    return None


def file_name(path: str) -> str:
    """The last component of a path of any system."""
    return path.replace("\\", "/").rpartition("/")[2]


def disk_size(size: int, *, force: bool) -> tuple[int, Geometry]:
    """Size and geometry of a new image for which ``size`` bytes are asked.

    Without ``force`` the size is rounded up to what a geometry can express, as guests on Virtual PC
    see it; disks too large for that keep their size.
    """
    wanted = div_up(size, SECTOR)
    if wanted > MAX_SECTORS:
        raise UsageError("The image size is too large for file format 'vpc': at most 2040 GiB")
    if force or wanted > _MAX_GEOMETRY_SECTORS:
        return wanted * SECTOR, _MAX_GEOMETRY
    total, geometry = wanted, (0, 0, 0)
    while math.prod(geometry) < wanted:
        geometry = _geometry(total)
        total += 1
    if geometry == _MAX_GEOMETRY:
        return wanted * SECTOR, geometry
    return math.prod(geometry) * SECTOR, geometry


def _geometry(total: int) -> Geometry:
    """The algorithm of the specification's appendix."""
    total = min(total, _MAX_GEOMETRY_SECTORS)
    if total >= 65535 * 16 * 63:
        heads, sectors = 16, 255
        tracks = total // sectors
    else:
        sectors = 17
        tracks = total // sectors
        heads = max(4, div_up(tracks, 1024))
        if tracks >= heads * 1024 or heads > 16:
            heads, sectors = 16, 31
            tracks = total // sectors
        if tracks >= heads * 1024:
            heads, sectors = 16, 63
            tracks = total // sectors
    return tracks // heads, heads, sectors


def new_footer(
    size: int, geometry: Geometry, *, fixed: bool, force: bool, timestamp: int, uuid: bytes
) -> Footer:
    """The footer of a new image whose disk has ``size`` bytes."""
    cylinders, heads, sectors = geometry
    return Footer(
        cookie=COOKIE,
        features=_FEATURES,
        version=_VERSION,
        data_offset=_NOWHERE if fixed else Footer.SIZE,
        timestamp=timestamp,
        creator_app=b"qem2" if force else b"qemu",
        creator_version=0x00050003,
        creator_os=b"Wi2k",
        original_size=size,
        current_size=size,
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
        disk_type=TYPE_FIXED if fixed else TYPE_DYNAMIC,
        checksum=0,
        uuid=uuid,
        saved_state=0,
        reserved=b"",
    )


def new_dynamic(size: int) -> DynamicHeader:
    """The dynamic header of a new image whose disk has ``size`` bytes."""
    return DynamicHeader(
        cookie=_DYNAMIC_COOKIE,
        data_offset=_NOWHERE,
        table_offset=Footer.SIZE + DynamicHeader.SIZE,
        version=_VERSION,
        max_table_entries=div_up(size, BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        checksum=0,
        parent_uuid=b"",
        parent_timestamp=0,
        reserved=0,
        parent_name_field=b"",
        locator_field=b"",
        reserved2=b"",
    )
