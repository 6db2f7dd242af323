"""Free clusters of a Parallels image: holes of the file, and what lies behind its last cluster.

1. A cluster that was given up is handed out again only after the table that named it last has been
   replaced on stable storage (R2), and after every request that could still reach it has ended.
2. Holes are kept as ranges: there are no more of them than clusters in use.
"""

from __future__ import annotations

from collections.abc import Sequence

from blocklayer.drivers.tables import Space
from blocklayer.graph.node import Node


def find_holes(places: Sequence[int], start: int, size: int) -> tuple[list[tuple[int, int]], int]:
    """The gaps between clusters of ``size`` bytes at the sorted ``places``, whole clusters counted
    from ``start`` on; and where the last cluster ends.
    """
    holes: list[tuple[int, int]] = []
    end = start
    for place in places:
        if place > end:
            room = (place - end) // size * size
            if room:
                holes.append((end, end + room))
        end = max(end, start - (start - place - size) // size * size)
    return holes, end


class FreeClusters:
    """Hands out clusters of one image."""

    def __init__(
        self, node: Node, storage: Node, holes: list[tuple[int, int]], end: int, size: int
    ) -> None:
        self._node = node
        self._size = size
        self._holes = holes[::-1]
        self._given_up: list[tuple[int, int]] = []
        """(place, epoch) of clusters that the file's table may still name."""
        self._free: list[tuple[int, int]] = []
        """(place, epoch) of those that it does not."""
        self._reused = False
        self.space = Space(storage, end)

    def give_up(self, place: int) -> None:
        """The table in memory names the cluster no more."""
        self._given_up.append((place, self._node.graph.epochs.retire()))

    def begin_flush(self) -> int:
        """The table is about to be written and flushed; hand the answer to ``flushed``."""
        return len(self._given_up)

    def flushed(self, count: int) -> None:
        """It is on stable storage."""
        self._free += self._given_up[:count]
        del self._given_up[:count]

    async def take(self, wanted: int) -> tuple[int, int, int]:
        """Up to ``wanted`` clusters in a row: where, how many, and from which place on they are
        known to read as zeros.
        """
        size = self._size
        passed = self._node.graph.epochs.passed
        for position, (place, epoch) in enumerate(self._free):
            if passed(epoch):
                del self._free[position]
                self._reused = True
                return place, 1, place + size
        if self._holes:
            start, end = self._holes.pop()
            count = min(wanted, (end - start) // size)
            if start + count * size < end:
                self._holes.append((start + count * size, end))
            self._reused = True
            return start, count, start + count * size
        place, zeros_from = await self.space.take(wanted * size)
        return place, wanted, zeros_from

    def give_back(self, place: int, count: int) -> None:
        """What ``take`` gave is not used after all."""
        self._holes.append((place, place + count * self._size))

    async def settle(self) -> None:
        """Bring what was taken to stable storage, before the table names it."""
        if self._reused:
            self._reused = False
            self.space.touched()
        await self.space.settle()
