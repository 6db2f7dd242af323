"""Metadata contexts: what a BLOCK_STATUS can ask of an export.

1. The extents of an answer are not empty, cover the range without gaps from its start, and end
   where it ends at the latest; there is at least one, and at most ``MAX_EXTENTS``.
2. Neighbours with the same flags are one extent.
3. Without extended headers no extent is longer than 32 bits can say.
"""

from __future__ import annotations

from typing import Final

from blocklayer.codec.nbd.constants import (
    BASE_ALLOCATION,
    DIRTY,
    MAX_EXTENTS,
    QEMU_ALLOCATION_DEPTH,
    QEMU_DIRTY_BITMAP,
    Allocation,
)
from blocklayer.codec.nbd.messages import Extents
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.extent import Kind, Run
from blocklayer.graph.node import Node
from blocklayer.graph.resolve import status
from blocklayer.units import GIB, MIB

_MAX_WALK: Final = 65536
"""Runs looked at for one answer: a client may ask again, others must not wait for it."""
_MAX_SHORT: Final = 4 * GIB - 64 * MIB
"""The longest extent in 32 bits, with a round end."""


class Context:
    """One context of an export."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def extents(
        self, node: Node, offset: int, length: int, *, limit: int, wide: bool
    ) -> Extents:
        """Up to ``limit`` extents from ``offset`` on. ``wide``: lengths of 64 bits are fine."""
        raise AssertionError(type(self).__name__)

    def close(self) -> None:
        """The export is gone."""


class _Collector:
    """Joins neighbours, and knows when there is enough."""

    def __init__(self, limit: int, wide: bool) -> None:
        self.extents: Extents = []
        self._limit = min(limit, MAX_EXTENTS)
        self._longest = 2**63 if wide else _MAX_SHORT

    def add(self, length: int, flags: int) -> bool:
        """Take one more; False: the answer is full, and this one was cut or left out."""
        extents = self.extents
        if extents and extents[-1][1] == flags and extents[-1][0] + length <= self._longest:
            extents[-1] = (extents[-1][0] + length, flags)
            return True
        if len(extents) >= self._limit:
            return False
        extents.append((min(length, self._longest), flags))
        return length <= self._longest


class _StatusContext(Context):
    """A context that is found by walking the runs of the node."""

    def flags(self, run: Run) -> int:
        """What it says of ``run``."""
        raise AssertionError(type(self).__name__)

    async def extents(
        self, node: Node, offset: int, length: int, *, limit: int, wide: bool
    ) -> Extents:
        """See ``Context``."""
        collector, end = _Collector(limit, wide), offset + length
        for _ in range(_MAX_WALK):
            run = await status(node, offset, end - offset)
            if not collector.add(run.end - offset, self.flags(run)):
                break
            offset = run.end
            if offset >= end:
                break
        return collector.extents


class AllocationContext(_StatusContext):
    """``base:allocation``: what is a hole, what reads as zeros."""

    def __init__(self) -> None:
        super().__init__(BASE_ALLOCATION)

    def flags(self, run: Run) -> int:
        """A mapped place whose storage has a hole reads as zeros, and counts as allocated."""
        if run.kind is not Kind.ZERO:
            return 0
        return int(Allocation.ZERO if run.hole else Allocation.HOLE | Allocation.ZERO)


class DepthContext(_StatusContext):
    """``qemu:allocation-depth``: which layer holds the data; 1 is the topmost, 0 none."""

    def __init__(self) -> None:
        super().__init__(QEMU_ALLOCATION_DEPTH)

    def flags(self, run: Run) -> int:
        """The layer's number."""
        return run.depth + 1 if run.present else 0


class BitmapContext(Context):
    """``qemu:dirty-bitmap:NAME``; the bitmap, which is loaded, stays as it is while exported."""

    def __init__(self, bitmap: DirtyBitmap) -> None:
        super().__init__(f"{QEMU_DIRTY_BITMAP}{bitmap.name}")
        self._bitmap = bitmap
        bitmap.users += 1

    def close(self) -> None:
        """The bitmap may be changed again."""
        self._bitmap.users -= 1

    async def extents(
        self, node: Node, offset: int, length: int, *, limit: int, wide: bool
    ) -> Extents:
        """See ``Context``."""
        collector, end = _Collector(limit, wide), offset + length
        bits, shift = self._bitmap.bits, self._bitmap.shift
        last = ((end - 1) >> shift) + 1
        while offset < end:
            index = offset >> shift
            dirty = index < bits.length and bits.get(index)
            find = bits.next_clear if dirty else bits.next_set
            within = min(last, bits.length)
            stop = find(index, within) if index < within else last
            # What the bitmap does not cover counts as clean.
            stop = last if not dirty and stop >= within else stop
            reached = min(stop << shift, end)
            if not collector.add(reached - offset, DIRTY if dirty else 0):
                break
            offset = reached
        return collector.extents
