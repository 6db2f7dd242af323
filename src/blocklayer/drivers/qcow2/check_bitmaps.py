"""Subcluster bitmaps as ``check`` looks at them: those of a whole L2 table at once.

Public:
    Contradictions(count).any(entries, bitmaps) -> bool     of tables of ``count`` entries
    contradiction(entry, geometry) -> str      what check says of one

1. A table is looked at as one long number of 64-bit lanes. No step carries from one lane to the
   next: ``_nonzero`` adds to values below 2^63 only.
2. The answer is that of ``codec.qcow2.subclusters.bitmap_problem``, asked of every entry, without
   a data file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import COMPRESSED, OFFSET_MASK
from blocklayer.codec.qcow2.subclusters import ALLOCATED, COUNT

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.geometry import Geometry

_TOP: Final = 1 << 63


def contradiction(entry: int, geometry: Geometry) -> str:
    """What to say of an entry, not compressed, whose bitmap cannot belong to it."""
    if entry & geometry.held_mask:
        return (
            f" offset={entry & OFFSET_MASK:x}: Allocated cluster has corrupted subcluster "
            "allocation bitmap"
        )
    return ": Unallocated cluster has non-zero subcluster allocation map"


class Contradictions:
    """Finds tables in which a bitmap cannot belong to its entry."""

    def __init__(self, count: int) -> None:
        self._none = bytes(8 * count)
        ones = int.from_bytes((b"\0" * 7 + b"\1") * count, "big")
        self._allocated = ALLOCATED * ones
        self._offsets = OFFSET_MASK * ones
        self._compressed = COMPRESSED * ones
        self._top = _TOP * ones
        self._below_top = (_TOP - 1) * ones

    def any(self, entries: bytes, bitmaps: bytes) -> bool:
        """Whether there is one in the table; both are big-endian words."""
        if bitmaps == self._none:
            return False
        words, bits = int.from_bytes(entries, "big"), int.from_bytes(bitmaps, "big")
        allocated = bits & self._allocated
        zeroed = bits >> COUNT & self._allocated
        if allocated & zeroed:
            return True
        without_cluster = self._top & ~self._nonzero(words & self._offsets)
        if self._nonzero(allocated) & without_cluster:
            return True
        compressed = (words & self._compressed) << 1
        return bool(self._nonzero(allocated | zeroed) & compressed)

    def _nonzero(self, lanes: int) -> int:
        """The top bit of each lane that is not 0."""
        return lanes + self._below_top & self._top
