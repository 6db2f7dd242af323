"""Entries of L1, L2 and refcount tables: 64-bit words and what they say.

Public:
    load_table(data) -> array('Q'), store_table(table) -> bytes       whole tables, big endian
    clear_bits, set_bits(table, bits) -> array('Q'), any_bits(table, bits) -> bool   of every word
    ClusterKind: UNALLOCATED NORMAL ZERO_PLAIN ZERO_ALLOC COMPRESSED
    decode_l2(entry, geometry) -> (ClusterKind, host_offset)          CorruptionError if invalid
    l2_problem(entry, geometry) -> str | None                         the same verdict, for check
    misplaced(entry, guest_offset) -> str | None       the further verdict on one with a data file
    encode_l2(host_offset, *, copied, zero=False) -> int
    decode_compressed(entry, geometry) -> (host_offset, length)       length is an upper bound
    encode_compressed(host_offset, length, geometry) -> int
    decode_l1(entry, geometry) -> l2_table_offset, l1_problem(entry, geometry) -> str | None
    encode_l1(l2_table_offset, *, copied) -> int
    decode_refcount_table_entry(entry, geometry) -> refcount_block_offset,
    refcount_table_problem(entry, geometry) -> str | None
    COPIED, COMPRESSED, ZERO, OFFSET_MASK, MAX_FILE_OFFSET and the masks of reserved bits

1. Nothing is masked away silently: an entry with reserved bits set, or a misaligned offset, is
   corrupt, and `decode_*` raises rather than follow it.
2. Offset 0 means unallocated, except with a data file, where the copied bit makes it an offset.
"""

from __future__ import annotations

import enum
import sys
from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.errors import CorruptionError

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.geometry import Geometry

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00

L1_RESERVED: Final = 0x7F00_0000_0000_01FF
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED: Final = 0x1FF

# The format allows 64 bits for a refcount block, files have 63.
MAX_FILE_OFFSET: Final = 1 << 63

_ALL_BITS: Final = (1 << 64) - 1
_SECTOR_BITS: Final = 9
_SECTOR_SIZE: Final = 1 << _SECTOR_BITS


class ClusterKind(enum.Enum):
    """What a standard L2 entry says of its cluster."""

    UNALLOCATED = "unallocated"
    NORMAL = "normal"
    ZERO_PLAIN = "zero"
    # Reads as zeros, and keeps a host cluster.
    ZERO_ALLOC = "zero, allocated"
    COMPRESSED = "compressed"


# Plain names: looking an enumeration's member up costs more than deciding which one it is.
_UNALLOCATED = ClusterKind.UNALLOCATED
_NORMAL = ClusterKind.NORMAL
_ZERO_PLAIN = ClusterKind.ZERO_PLAIN
_ZERO_ALLOC = ClusterKind.ZERO_ALLOC
_COMPRESSED = ClusterKind.COMPRESSED


def load_table(data: bytes | bytearray | memoryview) -> array[int]:
    """A table's bytes (a multiple of 8) as native 64-bit words."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def store_table(table: array[int]) -> bytes:
    """The inverse of `load_table`; `table` is left as it is."""
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def clear_bits(words: array[int], bits: int) -> array[int]:
    """The words with ``bits`` cleared; all of them at once, as one long number."""
    mask = int.from_bytes(array("Q", (~bits & _ALL_BITS,)) * len(words), "little")
    return _words(int.from_bytes(words.tobytes(), "little") & mask, len(words))


def any_bits(words: array[int], bits: int) -> bool:
    """Whether one of ``bits`` is set in one of the words."""
    mask = int.from_bytes(array("Q", (bits,)) * len(words), "little")
    return bool(int.from_bytes(words.tobytes(), "little") & mask)


def set_bits(words: array[int], bits: int) -> array[int]:
    """The words with ``bits`` set."""
    mask = int.from_bytes(array("Q", (bits,)) * len(words), "little")
    return _words(int.from_bytes(words.tobytes(), "little") | mask, len(words))


def _words(number: int, count: int) -> array[int]:
    words = array("Q")
    words.frombytes(number.to_bytes(count * 8, "little"))
    return words


def decode_l2(entry: int, geometry: Geometry) -> tuple[ClusterKind, int]:
    """Kind and host offset (0 where there is none); for COMPRESSED the first byte's offset."""
    if entry == 0:
        return _UNALLOCATED, 0
    problem = l2_problem(entry, geometry)
    if problem is not None:
        raise CorruptionError(f"L2 entry {entry:#018x}: {problem}")
    if entry & COMPRESSED:
        return _COMPRESSED, decode_compressed(entry, geometry)[0]
    host_offset = entry & OFFSET_MASK
    has_cluster = entry & geometry.held_mask
    if entry & ZERO:
        return (_ZERO_ALLOC if has_cluster else _ZERO_PLAIN), host_offset
    return (_NORMAL if has_cluster else _UNALLOCATED), host_offset


def l2_problem(entry: int, geometry: Geometry) -> str | None:
    """Why the entry cannot be followed, or None.

    The copied bit is not judged: it is a hint about a refcount that only check can compare.
    """
    if entry & COMPRESSED:
        if geometry.data_file:
            return "compressed cluster in an image with a data file"
        host_offset, _ = decode_compressed(entry, geometry)
        if host_offset >= geometry.max_compressed_offset:
            return f"compressed data at {host_offset:#x}, past the format's limit"
        return None
    if entry & L2_RESERVED:
        return f"reserved bits {entry & L2_RESERVED:#x} are set"
    if entry & ZERO and (geometry.version == 2 or geometry.extended_l2):
        why = "version 2" if geometry.version == 2 else "extended L2 entries"
        return f"zero flag is set in an image with {why}"
    if entry & OFFSET_MASK & geometry.cluster_mask:
        return f"host offset {entry & OFFSET_MASK:#x} is not aligned to a cluster"
    return None


def misplaced(entry: int, guest_offset: int) -> str | None:
    """Why the entry of the cluster at ``guest_offset`` cannot be followed into a data file.

    There every cluster lies at its guest offset, or, reading as zeros, nowhere.
    """
    host_offset = entry & OFFSET_MASK
    held = host_offset or (entry & COPIED and not entry & ZERO)
    if held and host_offset != guest_offset:
        return f"places the cluster at {host_offset:#x} of the data file, not at its guest offset"
    return None


def encode_l2(host_offset: int, *, copied: bool, zero: bool = False) -> int:
    """A standard entry; a plain zero cluster is `encode_l2(0, copied=False, zero=True)`."""
    return host_offset | (COPIED if copied else 0) | (ZERO if zero else 0)


def decode_compressed(entry: int, geometry: Geometry) -> tuple[int, int]:
    """Host offset of the first byte, and the most bytes the compressed data can have."""
    width = geometry.compressed_offset_bits
    descriptor = entry & ~(COPIED | COMPRESSED)
    host_offset = descriptor & ((1 << width) - 1)
    sectors = (descriptor >> width) + 1
    return host_offset, (sectors << _SECTOR_BITS) - (host_offset & (_SECTOR_SIZE - 1))


def encode_compressed(host_offset: int, length: int, geometry: Geometry) -> int:
    """The entry for `length` compressed bytes at `host_offset`, which the caller allocated."""
    assert 0 < length < 2 * geometry.cluster_size
    assert host_offset + length <= geometry.max_compressed_offset
    last_sector = (host_offset + length - 1) >> _SECTOR_BITS
    additional_sectors = last_sector - (host_offset >> _SECTOR_BITS)
    return COMPRESSED | (additional_sectors << geometry.compressed_offset_bits) | host_offset


def decode_l1(entry: int, geometry: Geometry) -> int:
    """Offset of the L2 table, 0 when there is none."""
    problem = l1_problem(entry, geometry)
    if problem is not None:
        raise CorruptionError(f"L1 entry {entry:#018x}: {problem}")
    return entry & OFFSET_MASK


def l1_problem(entry: int, geometry: Geometry) -> str | None:
    """Why the entry cannot be followed, or None."""
    if entry & L1_RESERVED:
        return f"reserved bits {entry & L1_RESERVED:#x} are set"
    if entry & OFFSET_MASK & geometry.cluster_mask:
        return f"L2 table offset {entry & OFFSET_MASK:#x} is not aligned to a cluster"
    return None


def encode_l1(l2_table_offset: int, *, copied: bool) -> int:
    return l2_table_offset | (COPIED if copied else 0)


def decode_refcount_table_entry(entry: int, geometry: Geometry) -> int:
    """Offset of the refcount block, 0 when there is none."""
    problem = refcount_table_problem(entry, geometry)
    if problem is not None:
        raise CorruptionError(f"refcount table entry {entry:#018x}: {problem}")
    return entry


def refcount_table_problem(entry: int, geometry: Geometry) -> str | None:
    """Why the entry cannot be followed, or None."""
    if entry & REFCOUNT_TABLE_RESERVED:
        return f"reserved bits {entry & REFCOUNT_TABLE_RESERVED:#x} are set"
    if entry & geometry.cluster_mask:
        return f"refcount block offset {entry:#x} is not aligned to a cluster"
    if entry >= MAX_FILE_OFFSET:
        return f"refcount block offset {entry:#x} is past what a file can have"
    return None
