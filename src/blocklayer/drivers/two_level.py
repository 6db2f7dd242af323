"""Tables in two levels, as qcow and QED have them: an L1 table that never moves names L2 tables.

Entries are 64 bits; 0 names nothing. What the other values mean is the driver's business.

1. An L2 table is in the file, and reads as zeros there, before the L1 table names it; it holds its
   entries on stable storage before the L1 table is written.
2. All entries of a run that is set lie in one page: they change together or not at all.
3. Space that is taken for tables and data is named in the file only after it is on stable storage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from blocklayer.drivers.tables import PAGE_SIZE, Part, Space, TableCache
from blocklayer.graph import io
from blocklayer.graph.node import Node

PAGE_ENTRIES: Final = PAGE_SIZE // 8
_ABSENT_MAX: Final = PAGE_ENTRIES
"""L1 entries that one look for a gap's end goes through."""


class TwoLevelTable:
    """The entries of all clusters of one image, by cluster number."""

    def __init__(
        self,
        storage: Node,
        space: Space,
        byte_order: str,
        *,
        l1_offset: int,
        l1_entries: int,
        l2_entries: int,
        alignment: int,
        check_table: Callable[[int, int], None],
    ) -> None:
        """New tables begin at multiples of ``alignment``. ``check_table(index, place)`` raises
        CorruptionError where no table can be.
        """
        self._storage = storage
        self._space = space
        self._l1 = TableCache(storage, "Q", byte_order)
        self._l2 = TableCache(storage, "Q", byte_order)
        self._l1_offset = l1_offset
        self.l1_entries = l1_entries
        self.l2_entries = l2_entries
        self._alignment = alignment
        self._check_table = check_table
        self._growing = asyncio.Lock()

    async def _l1_part(self, index: int) -> tuple[Part, int]:
        first = index - index % PAGE_ENTRIES
        count = min(PAGE_ENTRIES, self.l1_entries - first)
        return await self._l1.load(self._l1_offset + 8 * first, count), first

    async def l1_entry(self, index: int) -> int:
        """What the L1 table says of the L2 table ``index``, right or wrong."""
        part, first = await self._l1_part(index)
        return part.entries[index - first]

    async def l1_page(self, first: int) -> Part:
        """The entries of the L1 table from ``first`` on, a multiple of ``PAGE_ENTRIES``."""
        return (await self._l1_part(first))[0]

    async def l2_page(self, place: int, first: int) -> Part:
        """The entries from ``first`` on, a multiple of ``PAGE_ENTRIES``, of the table there."""
        count = min(PAGE_ENTRIES, self.l2_entries - first)
        return await self._l2.load(place + 8 * first, count)

    async def page(self, cluster: int) -> tuple[Part | None, int]:
        """The part that has ``cluster``'s entry, None if there is no table; and the first cluster
        of the part. Do not keep the part over an ``await``.
        """
        index, within = divmod(cluster, self.l2_entries)
        place = await self.l1_entry(index)
        if not place:
            return None, cluster - within
        self._check_table(index, place)
        return await self.l2_page(place, within - within % PAGE_ENTRIES), self.page_start(cluster)

    def page_start(self, cluster: int) -> int:
        """The first cluster of the part that has ``cluster``'s entry."""
        return cluster - cluster % self.l2_entries % PAGE_ENTRIES

    def page_end(self, cluster: int) -> int:
        """The cluster after the last one whose entry is in the same part."""
        table = cluster - cluster % self.l2_entries + self.l2_entries
        return min(self.page_start(cluster) + PAGE_ENTRIES, table)

    async def absent_end(self, cluster: int, limit: int) -> int:
        """The first cluster from ``cluster`` on, which has no table, that has one; or ``limit``,
        or less.
        """
        index = cluster // self.l2_entries
        part, first = await self._l1_part(index)
        stop = min(len(part.entries), -(-limit // self.l2_entries) - first)
        at = index - first + 1
        while at < stop and not part.entries[at]:
            at += 1
        return min(limit, (first + at) * self.l2_entries)

    async def set(self, cluster: int, values: Sequence[int]) -> None:
        """Change the entries from ``cluster`` on, all of one part; make their table if needed."""
        part, first = await self._needed_page(cluster)
        for index, value in enumerate(values, cluster - first):
            part.set(index, value)

    async def _needed_page(self, cluster: int) -> tuple[Part, int]:
        part, first = await self.page(cluster)
        if part is not None:
            return part, first
        async with self._growing:
            await self._make_table(cluster // self.l2_entries)
        part, first = await self.page(cluster)
        assert part is not None, "tables are never taken away"
        return part, first

    async def _make_table(self, index: int) -> None:
        if await self.l1_entry(index):
            return
        length = 8 * self.l2_entries
        place, zeros_from = await self._space.take(length, self._alignment)
        try:
            if place < zeros_from:
                await io.write_zeroes(self._storage, place, length)
            part, first = await self._l1_part(index)
        except BaseException:
            self._space.give_back(place, length)
            raise
        part.set(index - first, place)

    async def set_l1(self, index: int, place: int) -> None:
        """Change an entry of the L1 table: a repair does."""
        part, first = await self._l1_part(index)
        part.set(index - first, place)

    @property
    def full(self) -> bool:
        """It is time for ``write_back``."""
        return self._l1.full or self._l2.full

    async def write_back(self) -> None:
        """Bring changed tables to the file, and what they name to stable storage before them."""
        await self._l2.write_back(self._space.settle)
        await self._l1.write_back(self._settle_tables)

    async def _settle_tables(self) -> None:
        await io.flush(self._storage)
