"""The extents of a VMDK disk: flat ones, empty ones, and sparse ones with grains.

Offsets that extents take and give are guest offsets of the whole disk.

1. A sparse extent's tables change in memory first. They are written, the redundant copy before the
   one that is read, when everything that they name is on stable storage: otherwise a crash could
   show zeros where the backing file's data was, or leave a grain past the end of the file.
2. A grain that is stored lies behind the header and begins within the file.
"""

from __future__ import annotations

from blocklayer.codec.vmdk.sparse import UNALLOCATED, ZEROED, Header
from blocklayer.drivers.blocks import MAX_MESSAGES, new_block
from blocklayer.drivers.tables import PAGE_SIZE, Part, Space, TableCache
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.child import Child
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.units import SECTOR, align_down, align_up, div_up

_PAGE_WORDS = PAGE_SIZE // 4
_MAX_END = SECTOR << 32
"""Grain tables count in 32 bits of sectors."""


class PlainExtent:
    """``size`` bytes of the disk from guest ``start`` on; this one reads as zeros."""

    type = "ZERO"
    cluster_size = 0
    compressed = False

    def __init__(self, start: int, size: int) -> None:
        self.start = start
        self.size = size

    @property
    def end(self) -> int:
        """The first guest offset after the extent."""
        return self.start + self.size

    async def map(self, offset: int, length: int) -> Extent:
        """What is at ``offset``; ``length`` does not reach past ``end``."""
        return Extent(offset, length, Kind.ZERO)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Space for a write; only sparse extents, and writes in place, have any."""
        extent = await self.map(offset, length)
        if extent.kind is not Kind.DATA or extent.child is None or extent.host_offset is None:
            raise UnsupportedError("A VMDK extent of zeros cannot be written")
        return Allocation(offset, extent.length, extent.child, extent.host_offset)

    async def commit(self, allocation: Allocation) -> bool:
        """Show what was allocated; whether the mapping has changed."""
        return False

    def abort(self, allocation: Allocation) -> None:
        """Take back what was allocated."""

    async def write_back(self) -> None:
        """Bring changed tables to the file."""

    async def check(self, result: CheckResult) -> None:
        """Add what is wrong to ``result``."""


class FlatExtent(PlainExtent):
    """Guest bytes as they are, in ``child`` from ``host_offset`` on."""

    def __init__(self, start: int, size: int, child: Child, host_offset: int, type: str) -> None:
        super().__init__(start, size)
        self.child = child
        self.type = type
        self._host_offset = host_offset
        if host_offset + size > child.node.size:
            raise FormatError(
                f"The VMDK extent '{child.node.filename}' is too short: it ends at "
                f"{child.node.size:#x}, the disk needs it up to {host_offset + size:#x}"
            )

    async def map(self, offset: int, length: int) -> Extent:
        """The file knows best where it has holes."""
        place = self._host_offset + offset - self.start
        return Extent(offset, length, Kind.DATA, place, self.child, writable=True, recurse=True)


class SparseExtent(PlainExtent):
    """Grains, found through a directory of tables."""

    def __init__(self, start: int, child: Child, header: Header, type: str) -> None:
        super().__init__(start, header.size)
        self.child = child
        self.header = header
        self.type = type
        self.grain_size = self.cluster_size = header.grain_size
        self.compressed = header.compressed
        self.storage = child.node
        self._directory = TableCache(self.storage, "I", "little")
        self._tables = TableCache(self.storage, "I", "little")
        self._redundant: dict[int, int] = {}
        """The place of the copy of each table that was looked up."""
        unit = 1 if header.compressed else self.grain_size // SECTOR
        self.space = Space(self.storage, align_up(self.storage.size, unit * SECTOR))
        self._judge()

    def _judge(self) -> None:
        header, size = self.header, self.storage.size
        places = [header.directory_offset] + [header.redundant_offset] * header.redundant
        for place in places:
            # First the number itself: its product must not be compared before it is bounded.
            if place > size // SECTOR or place * SECTOR + 4 * header.table_count > size:
                raise FormatError(
                    f"The grain directory of '{self.storage.filename}' at sector {place:#x} is "
                    "past the end of the file"
                )

    @property
    def _table_span(self) -> int:
        return self.grain_size * self.header.table_entries

    async def _entry(self, directory_offset: int, index: int) -> int:
        """Where the table ``index`` of a directory is in the file, 0 if there is none."""
        first = index - index % _PAGE_WORDS
        count = min(_PAGE_WORDS, self.header.table_count - first)
        part = await self._directory.load(directory_offset * SECTOR + 4 * first, count)
        place = part.entries[index - first] * SECTOR
        if place and place + 4 * self.header.table_entries > self.storage.size:
            raise CorruptionError(
                f"Grain table {index} of '{self.storage.filename}' at {place:#x} is past its end"
            )
        return place

    async def _table_place(self, index: int) -> int:
        return await self._entry(self.header.directory_offset, index)

    async def table(self, offset: int) -> Part | None:
        """The table for ``offset`` within the extent, None if there is none."""
        index = offset // self._table_span
        place = await self._table_place(index)
        if not place:
            return None
        if self.header.redundant and place not in self._redundant:
            self._redundant[place] = await self._entry(self.header.redundant_offset, index)
        return await self._tables.load(place, self.header.table_entries)

    def _is_zeroed(self, entry: int) -> bool:
        return entry == ZEROED and self.header.zeroed

    def place(self, grain: int, entry: int) -> int:
        """Where a stored grain is in the file."""
        place = entry * SECTOR
        if place < 2 * SECTOR or place >= self.storage.size:
            raise CorruptionError(
                f"Grain {grain} of '{self.storage.filename}' is said to be at {place:#x}, outside "
                f"its data (the file has {self.storage.size:#x} bytes)"
            )
        return place

    def _kind(self, entry: int) -> Kind:
        if entry == UNALLOCATED:
            return Kind.UNALLOCATED
        if self._is_zeroed(entry):
            return Kind.ZERO
        return Kind.OPAQUE if self.compressed else Kind.DATA

    async def map(self, offset: int, length: int) -> Extent:
        """Grains of one kind, as far as one table tells."""
        within = offset - self.start
        table = await self.table(within)
        if table is None:
            index, span = within // self._table_span, self._table_span
            while index * span < within + length and not await self._table_place(index):
                index += 1
            return Extent(offset, min(length, index * span - within), Kind.UNALLOCATED)
        entries, grain_size = table.entries, self.grain_size
        index = within % self._table_span // grain_size
        entry = entries[index]
        kind = self._kind(entry)
        last = min(len(entries), index + div_up(within % grain_size + length, grain_size))
        stop = index + 1
        if kind is Kind.DATA:
            step = grain_size // SECTOR
            while stop < last and entries[stop] == entry + (stop - index) * step:
                stop += 1
        else:
            while stop < last and self._kind(entries[stop]) is kind:
                stop += 1
        length = min(length, (stop - index) * grain_size - within % grain_size)
        if kind in (Kind.UNALLOCATED, Kind.ZERO):
            return Extent(offset, length, kind)
        if kind is Kind.OPAQUE:
            return Extent(offset, length, kind, child=self.child, compressed=True)
        self.place(within // grain_size + stop - index - 1, entries[stop - 1])
        place = self.place(within // grain_size, entry) + within % grain_size
        return Extent(offset, length, kind, place, self.child, writable=True)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """A grain at the end of the file, or the one that is there."""
        extent = await self.map(offset, length)
        if extent.kind is Kind.DATA:
            return await super().allocate(offset, length)
        within = offset - self.start
        await self.need_table(within)
        place, zeros_from = await self.space.take(self.grain_size)
        if place + self.grain_size > _MAX_END:
            self.space.give_back(place, self.grain_size)
            raise UnsupportedError(f"'{self.storage.filename}' is full: 2 TiB are its limit")
        assert self.child.parent is not None
        if place >= zeros_from and self.child.parent.backing is None:
            return new_block(offset, length, self.grain_size, self.child, place, fresh=True)
        head = within % self.grain_size
        length = min(length, self.grain_size - head)
        # The last grain of an extent may be shorter: what follows is another extent's.
        room = min(self.grain_size, self.end - (offset - head))
        tail = room - head - length
        return Allocation(
            offset, length, self.child, place, head, tail, place >= zeros_from, token=place
        )

    async def need_table(self, within: int) -> Part:
        """The table for a write. Tables are made with the image, never later."""
        table = await self.table(within)
        if table is None:
            raise UnsupportedError(
                f"'{self.storage.filename}' has no grain table for {self.start + within:#x}: it "
                "cannot be written there"
            )
        return table

    async def set_entry(self, within: int, entry: int) -> None:
        """Change the table entry of the grain at ``within``."""
        table = await self.need_table(within)
        table.set(within % self._table_span // self.grain_size, entry)

    async def commit(self, allocation: Allocation) -> bool:
        """Enter a new grain."""
        if not isinstance(allocation.token, int):
            return False
        await self.set_entry(allocation.offset - self.start, allocation.token // SECTOR)
        return True

    def abort(self, allocation: Allocation) -> None:
        """The grain stays free."""
        if isinstance(allocation.token, int):
            self.space.give_back(allocation.token, self.grain_size)

    async def zero(self, offset: int, length: int) -> bool:
        """Say of whole grains that they read as zeros; whether the format can."""
        within = offset - self.start
        to_end = offset + length == self.end
        if not self.header.zeroed or within % self.grain_size:
            return False
        if length % self.grain_size and not to_end:
            return False
        for grain in range(within, within + length, self.grain_size):
            await self.set_entry(grain, ZEROED)
        return True

    @property
    def full(self) -> bool:
        """It is time for ``write_back``."""
        return self._tables.full

    async def write_back(self) -> None:
        """Bring changed tables to the file, and what they name before them."""
        await self._tables.write_back(self.space.settle, self._redundant)

    async def check(self, result: CheckResult) -> None:
        """All grains within the file."""
        for offset in range(0, self.size, self._table_span):
            try:
                table = await self.table(offset)
            except CorruptionError as error:
                self._report(result, str(error))
                continue
            if table is None or (table.uniform and table.entries[0] == UNALLOCATED):
                continue
            first = align_down(offset, self._table_span) // self.grain_size
            for grain, entry in enumerate(table.entries, first):
                if entry == UNALLOCATED or self._is_zeroed(entry):
                    continue
                try:
                    self.place(grain, entry)
                except CorruptionError as error:
                    self._report(result, str(error))

    @staticmethod
    def _report(result: CheckResult, message: str) -> None:
        result.corruptions += 1
        if len(result.messages) < MAX_MESSAGES:
            result.messages.append(f"ERROR: {message}")
