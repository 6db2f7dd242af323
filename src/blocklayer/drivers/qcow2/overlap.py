"""Overlap checks: no write may land on metadata of another kind.

A broken image can point anywhere. Before a range is written, it is compared with where the header,
the tables and the snapshots are; a hit means that the image is corrupt, and stops the write.

1. Checked are: every range that the allocator hands out, every metadata write, and, once for each
   loaded L2 slice and again when metadata moved, all clusters that plain writes may go to.
2. ``version`` moves whenever metadata takes a cluster that it did not hold before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.errors import CorruptionError

HEADER: Final = 1 << 0
ACTIVE_L1: Final = 1 << 1
ACTIVE_L2: Final = 1 << 2
REFCOUNT_TABLE: Final = 1 << 3
REFCOUNT_BLOCK: Final = 1 << 4
SNAPSHOT_TABLE: Final = 1 << 5
INACTIVE_L1: Final = 1 << 6
INACTIVE_L2: Final = 1 << 7
BITMAP_DIRECTORY: Final = 1 << 8

# By the names of the option's members.
KINDS: Final = {
    "main-header": HEADER,
    "active-l1": ACTIVE_L1,
    "active-l2": ACTIVE_L2,
    "refcount-table": REFCOUNT_TABLE,
    "refcount-block": REFCOUNT_BLOCK,
    "snapshot-table": SNAPSHOT_TABLE,
    "inactive-l1": INACTIVE_L1,
    "inactive-l2": INACTIVE_L2,
    "bitmap-directory": BITMAP_DIRECTORY,
}
_WORDS: Final = {
    HEADER: "qcow2_header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
}

_CONSTANT: Final = HEADER | ACTIVE_L1 | REFCOUNT_TABLE | SNAPSHOT_TABLE | BITMAP_DIRECTORY
_CACHED: Final = _CONSTANT | ACTIVE_L2 | REFCOUNT_BLOCK | INACTIVE_L1
TEMPLATES: Final = {
    "none": 0,
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | INACTIVE_L2,
}


class Overlap:
    """Which clusters hold metadata, of the kinds that are to be guarded."""

    def __init__(self, kinds: int, cluster_size: int) -> None:
        self.kinds = kinds
        self.version = 1
        self.complete = False
        """All metadata of the image has been entered."""
        self._cluster_size = cluster_size
        # Keyed by offset with the copied bit, as L2 entries have it: whole slices compare at once.
        self._owners: dict[int, int] = {}

    def add(self, kind: int, offset: int, length: int) -> None:
        """Metadata of ``kind`` lies there."""
        if not kind & self.kinds:
            return
        for key in self._keys(offset, length):
            self._owners[key] = self._owners.get(key, 0) | kind
        self.version += 1

    def remove(self, kind: int, offset: int, length: int) -> None:
        """It does not any more."""
        for key in self._keys(offset, length):
            left = self._owners.get(key, 0) & ~kind
            if left:
                self._owners[key] = left
            else:
                self._owners.pop(key, None)

    def clear(self) -> None:
        """Forget everything; the image is to be looked at anew."""
        self._owners.clear()
        self.complete = False
        self.version += 1

    def check(self, offset: int, length: int, own: int = 0) -> None:
        """Raise CorruptionError if a write there hits metadata, other than of kind ``own``."""
        keys = self._keys(offset, length)
        if self._owners.keys().isdisjoint(keys):
            return
        for key in keys:
            hit = self._owners.get(key, 0) & ~own
            if hit:
                self._refuse(key & ~COPIED, hit)

    def check_entries(self, entries: Iterable[int]) -> None:
        """Raise CorruptionError if one of these standard L2 entries lets writes hit metadata."""
        if self._owners.keys().isdisjoint(entries):
            return
        for entry in entries:
            if entry in self._owners:
                self._refuse(entry & ~COPIED, self._owners[entry])

    def _keys(self, offset: int, length: int) -> range:
        start = offset - offset % self._cluster_size
        return range(COPIED | start, COPIED | (offset + length), self._cluster_size)

    def _refuse(self, offset: int, kinds: int) -> None:
        lowest = kinds & -kinds
        raise CorruptionError(
            f"Preventing invalid write at host offset {offset:#x} (overlaps with {_WORDS[lowest]})"
        )
