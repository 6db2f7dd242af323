"""Persistent bitmaps: the header extension, the directory it points at, and bitmap tables.

Public:
    BitmapsExtension(nb_bitmaps, reserved, bitmap_directory_size, bitmap_directory_offset)
    decode_bitmaps_extension(data) -> BitmapsExtension
    validate_bitmaps_extension(extension, cluster_size) -> None
    BitmapEntry(...).encode() -> bytes; .in_use, .auto, .extra_data_compatible
    decode_directory(data, count) -> list[BitmapEntry], encode_directory(entries) -> bytes
    validate_entry(entry, geometry, disk_size) -> None
    table_entries_needed(disk_size, granularity_bits, geometry) -> int
    bitmap_table_problem(entry, geometry) -> str | None
    decode_bitmap_table_entry(entry, geometry) -> (host_offset, all_ones)
    FLAG_IN_USE FLAG_AUTO FLAG_EXTRA_DATA_COMPATIBLE, MAX_BITMAPS, MAX_DIRECTORY_SIZE,
    MAX_TABLE_ENTRIES, MAX_TABLE_DATA_SIZE, MIN/MAX_GRANULARITY_BITS, MAX_NAME_SIZE
    Whole tables load and store with `entries.load_table` and `entries.store_table`.

1. decode then encode gives the same bytes, unknown extra data and unknown flags included.
2. A directory is exactly as long as the extension says: entries that end short of it, or past
   it, are an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2.entries import OFFSET_MASK
from blocklayer.errors import CorruptionError, FormatError
from blocklayer.record import U8, U16, U32, U64, Record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blocklayer.codec.qcow2.geometry import Geometry

FLAG_IN_USE: Final = 1 << 0
FLAG_AUTO: Final = 1 << 1
FLAG_EXTRA_DATA_COMPATIBLE: Final = 1 << 2
_KNOWN_FLAGS: Final = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_DATA_COMPATIBLE

TYPE_DIRTY_TRACKING: Final = 1

MAX_BITMAPS: Final = 65535
MAX_DIRECTORY_SIZE: Final = 1024 * MAX_BITMAPS
MAX_NAME_SIZE: Final = 1023
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31
MAX_TABLE_ENTRIES: Final = 0x800_0000
MAX_TABLE_DATA_SIZE: Final = 0x2000_0000

ALL_ONES: Final = 1 << 0
_TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE


class BitmapsExtension(Record, byte_order=">"):
    """The data of the bitmaps header extension."""

    nb_bitmaps: U32
    reserved: U32
    bitmap_directory_size: U64
    bitmap_directory_offset: U64


class _FixedFields(Record, byte_order=">"):
    bitmap_table_offset: U64
    bitmap_table_size: U32
    flags: U32
    type: U8
    granularity_bits: U8
    name_size: U16
    extra_data_size: U32


class BitmapEntry(msgspec.Struct, kw_only=True):
    """One bitmap as the directory describes it; bitmap_table_size counts entries."""

    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int = 0
    type: int = TYPE_DIRTY_TRACKING
    granularity_bits: int
    name: str
    extra_data: bytes = b""

    @property
    def in_use(self) -> bool:
        return bool(self.flags & FLAG_IN_USE)

    @property
    def auto(self) -> bool:
        return bool(self.flags & FLAG_AUTO)

    @property
    def extra_data_compatible(self) -> bool:
        return bool(self.flags & FLAG_EXTRA_DATA_COMPATIBLE)

    def encode(self) -> bytes:
        """The entry, padded to a multiple of 8."""
        name = self.name.encode("utf-8", "surrogateescape")
        fixed = _FixedFields(
            bitmap_table_offset=self.bitmap_table_offset,
            bitmap_table_size=self.bitmap_table_size,
            flags=self.flags,
            type=self.type,
            granularity_bits=self.granularity_bits,
            name_size=len(name),
            extra_data_size=len(self.extra_data),
        )
        entry = fixed.pack() + self.extra_data + name
        return entry + bytes(-len(entry) % 8)


def decode_bitmaps_extension(data: bytes) -> BitmapsExtension:
    """The extension's fields; FormatError unless it has exactly their length."""
    if len(data) != BitmapsExtension.SIZE:
        raise FormatError(
            f"bitmaps_ext: Invalid extension length {len(data)}, not {BitmapsExtension.SIZE}"
        )
    return BitmapsExtension.unpack(data)


def validate_bitmaps_extension(extension: BitmapsExtension, cluster_size: int) -> None:
    """FormatError unless the directory it points at could be read."""
    if extension.reserved:
        raise FormatError(f"bitmaps_ext: Reserved field is {extension.reserved:#x}, not zero")
    if not 1 <= extension.nb_bitmaps <= MAX_BITMAPS:
        raise FormatError(
            f"bitmaps_ext: nb_bitmaps is {extension.nb_bitmaps}, not 1 to {MAX_BITMAPS}"
        )
    if extension.bitmap_directory_offset % cluster_size:
        raise FormatError(
            f"bitmaps_ext: bitmap directory offset {extension.bitmap_directory_offset:#x} "
            "is not aligned to a cluster"
        )
    if extension.bitmap_directory_size > MAX_DIRECTORY_SIZE:
        raise FormatError(
            f"bitmaps_ext: bitmap_directory_size {extension.bitmap_directory_size} exceeds "
            f"{MAX_DIRECTORY_SIZE}"
        )


def decode_directory(data: bytes | bytearray | memoryview, count: int) -> list[BitmapEntry]:
    """The `count` entries that fill `data` exactly; names are unique."""
    entries: list[BitmapEntry] = []
    names: set[str] = set()
    offset = 0
    for _ in range(count):
        entry, offset = _decode_entry(data, offset)
        if entry.name in names:
            raise FormatError(f"bitmap directory has two bitmaps named '{entry.name}'")
        names.add(entry.name)
        entries.append(entry)
    if offset != len(data):
        raise FormatError(
            f"bitmap directory of {len(data)} bytes ends at {offset:#x} with {count} entries"
        )
    return entries


def encode_directory(entries: Iterable[BitmapEntry]) -> bytes:
    """The whole directory."""
    return b"".join(entry.encode() for entry in entries)


def validate_entry(entry: BitmapEntry, geometry: Geometry, disk_size: int) -> None:
    """FormatError unless the bitmap could be loaded for a disk of `disk_size` bytes."""
    where = f"bitmap '{entry.name}': "
    table_data_size = entry.bitmap_table_size << geometry.cluster_bits
    if not 1 <= len(entry.name.encode("utf-8", "surrogateescape")) <= MAX_NAME_SIZE:
        raise FormatError(f"{where}name is empty or longer than {MAX_NAME_SIZE} bytes")
    if entry.type != TYPE_DIRTY_TRACKING:
        raise FormatError(f"{where}unknown type {entry.type}")
    if entry.flags & ~_KNOWN_FLAGS:
        raise FormatError(f"{where}reserved flags {entry.flags & ~_KNOWN_FLAGS:#x} are set")
    if not MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS:
        raise FormatError(f"{where}granularity_bits {entry.granularity_bits} is not 9 to 31")
    if entry.bitmap_table_offset == 0 or entry.bitmap_table_offset & geometry.cluster_mask:
        raise FormatError(f"{where}table offset {entry.bitmap_table_offset:#x} is not aligned")
    if entry.bitmap_table_offset >= geometry.max_host_offset:
        raise FormatError(f"{where}table offset {entry.bitmap_table_offset:#x} is too large")
    if (
        not 1 <= entry.bitmap_table_size <= MAX_TABLE_ENTRIES
        or table_data_size > MAX_TABLE_DATA_SIZE
    ):
        raise FormatError(f"{where}table of {entry.bitmap_table_size} entries is out of range")
    needed = table_entries_needed(disk_size, entry.granularity_bits, geometry)
    # A bitmap in use may describe another size: it was not saved, and is never read.
    if entry.bitmap_table_size != needed and not entry.in_use:
        raise FormatError(f"{where}table of {entry.bitmap_table_size} entries, not {needed}")


def table_entries_needed(disk_size: int, granularity_bits: int, geometry: Geometry) -> int:
    """Clusters of bits that describe a disk of `disk_size` bytes."""
    bits = (disk_size + (1 << granularity_bits) - 1) >> granularity_bits
    return geometry.cluster_count((bits + 7) >> 3)


def bitmap_table_problem(entry: int, geometry: Geometry) -> str | None:
    """Why the table entry cannot be followed, or None."""
    if entry & _TABLE_RESERVED:
        return f"reserved bits {entry & _TABLE_RESERVED:#x} are set"
    host_offset = entry & OFFSET_MASK
    if host_offset & geometry.cluster_mask:
        return f"host offset {host_offset:#x} is not aligned to a cluster"
    if host_offset and entry & ALL_ONES:
        return "all-ones flag is set beside a host offset"
    return None


def decode_bitmap_table_entry(entry: int, geometry: Geometry) -> tuple[int, bool]:
    """Host offset (0: no cluster), and whether a missing cluster reads as ones."""
    problem = bitmap_table_problem(entry, geometry)
    if problem is not None:
        raise CorruptionError(f"bitmap table entry {entry:#018x}: {problem}")
    return entry & OFFSET_MASK, bool(entry & ALL_ONES)


def _decode_entry(data: bytes | bytearray | memoryview, offset: int) -> tuple[BitmapEntry, int]:
    fixed = _FixedFields.unpack(data, offset)
    extra_start = offset + _FixedFields.SIZE
    name_start = extra_start + fixed.extra_data_size
    end = name_start + fixed.name_size
    padded_end = end + (-(end - offset) % 8)
    if padded_end > len(data):
        raise FormatError(
            f"bitmap directory entry at {offset:#x} ends at {padded_end:#x}, past the "
            f"directory ({len(data):#x})"
        )
    if any(data[end:padded_end]):
        raise FormatError(f"bitmap directory entry at {offset:#x} has padding that is not zero")
    entry = BitmapEntry(
        bitmap_table_offset=fixed.bitmap_table_offset,
        bitmap_table_size=fixed.bitmap_table_size,
        flags=fixed.flags,
        type=fixed.type,
        granularity_bits=fixed.granularity_bits,
        name=bytes(data[name_start:end]).decode("utf-8", "surrogateescape"),
        extra_data=bytes(data[extra_start:name_start]),
    )
    return entry, padded_end
