"""Extended L2 entries: a second 64-bit word beside each entry, and what it says of 32 subclusters.

The word is called a bitmap here. Bit ``n`` of its low half: subcluster ``n`` has its data in the
cluster; bit ``n`` of its high half: it reads as zeros. Neither: what is below shows through.

Public:
    COUNT                       subclusters of a cluster
    ALLOCATED, ZEROED           the bits of all of them
    between(first, end) -> bits      the low half's bits of subclusters ``[first, end)``
    bitmap_problem(entry, bitmap, geometry) -> str | None    why the two contradict each other
    subcluster_kind(entry, bitmap, index, geometry) -> ClusterKind
    run_end(bitmap, index) -> int    the first subcluster after ``index`` that is stored otherwise
    uniform(bitmap, index) -> bitmap    of a cluster that is all like subcluster ``index``
    load_l2_table(data, geometry) -> (entries, bitmaps | None)     whole tables, or parts of them
    store_l2_table(entries, bitmaps | None) -> bytes

1. No subcluster both has data and reads as zeros, and none has data where there is no cluster to
   have it in. A compressed cluster has no bits at all.
2. With standard entries there are no bitmaps: None stands for them.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    ClusterKind,
    load_table,
    store_table,
)

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.geometry import Geometry

COUNT: Final = 32
ALLOCATED: Final = (1 << COUNT) - 1
ZEROED: Final = ALLOCATED << COUNT


def between(first: int, end: int) -> int:
    """The bits of subclusters ``[first, end)``, in the low half."""
    return (1 << end) - (1 << first)


def bitmap_problem(entry: int, bitmap: int, geometry: Geometry) -> str | None:
    """Why the bitmap cannot belong to the entry, or None."""
    if not bitmap:
        return None
    if entry & COMPRESSED:
        return f"compressed cluster with subcluster bitmap {bitmap:#x}"
    if bitmap & bitmap >> COUNT & ALLOCATED:
        return f"subcluster bitmap {bitmap:#x} calls subclusters allocated and zero at once"
    if bitmap & ALLOCATED and not entry & geometry.held_mask:
        return f"subcluster bitmap {bitmap:#x} calls subclusters of no cluster allocated"
    return None


def subcluster_kind(entry: int, bitmap: int, index: int, geometry: Geometry) -> ClusterKind:
    """How subcluster ``index`` is stored, of a standard entry and a bitmap without a problem."""
    bits = bitmap >> index
    if bits & 1:
        return ClusterKind.NORMAL
    if bits >> COUNT & 1:
        held = entry & geometry.held_mask
        return ClusterKind.ZERO_ALLOC if held else ClusterKind.ZERO_PLAIN
    return ClusterKind.UNALLOCATED


def run_end(bitmap: int, index: int) -> int:
    """Where the run of subclusters stored like ``index`` ends."""
    allocated, zeroed = (bitmap & ALLOCATED) >> index, bitmap >> COUNT + index
    if allocated & 1:
        return index + _ones(allocated)
    if zeroed & 1:
        return index + _ones(zeroed)
    used = allocated | zeroed
    return index + (used & -used).bit_length() - 1 if used else COUNT


def _ones(bits: int) -> int:
    """How many of the lowest bits are set in a row."""
    return (bits ^ bits + 1).bit_length() - 1


def uniform(bitmap: int, index: int) -> int:
    """The bitmap of a cluster with all subclusters stored like ``index``."""
    bits = bitmap >> index
    if bits & 1:
        return ALLOCATED
    return ZEROED if bits >> COUNT & 1 else 0


def load_l2_table(
    data: bytes | bytearray | memoryview, geometry: Geometry
) -> tuple[array[int], array[int] | None]:
    """Entries and bitmaps of an L2 table's bytes (whole entries)."""
    words = load_table(data)
    return (words[::2], words[1::2]) if geometry.extended_l2 else (words, None)


def store_l2_table(entries: array[int], bitmaps: array[int] | None) -> bytes:
    """The inverse of `load_l2_table`."""
    if bitmaps is None:
        return store_table(entries)
    words = array("Q", bytes(16 * len(entries)))
    words[::2], words[1::2] = entries, bitmaps
    return store_table(words)
