"""VHDX: blocks of 1 to 256 MiB, found through one table that is changed through the log.

1. The table in the file changes at ``flush`` only, through the log. What a crash takes away is
   what was not flushed; space that no table word names is simply used again.
2. Blocks lie behind all metadata and within the file; a table word that says otherwise is corrupt.
3. The first write after opening gives the image new identities: until then, no block may be
   written past this driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import ClassVar

from blocklayer.codec.vhdx import structure
from blocklayer.codec.vhdx.log import SECTOR as LOG_SECTOR
from blocklayer.codec.vhdx.structure import (
    ALIGNMENT,
    FILE_MAGIC,
    READS_ZERO,
    REGION_OFFSETS,
    REGION_SIZE,
    STATE_FULLY_PRESENT,
    Metadata,
    Regions,
    make_word,
    word_offset,
    word_problem,
    word_state,
)
from blocklayer.drivers.blocks import MAX_MESSAGES, BlockFormatDriver, FileOptions, new_block
from blocklayer.drivers.tables import PAGE_SIZE, Part, Space, TableCache
from blocklayer.drivers.vhdx.create import VhdxCreateOptions, write_image
from blocklayer.drivers.vhdx.log import Headers, Log, replay
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.units import align_up

_PAGE_WORDS = PAGE_SIZE // 8


class VhdxDriver(BlockFormatDriver):
    """One VHDX image."""

    NAME: ClassVar[str] = "vhdx"
    Options = FileOptions
    CreateOptions = VhdxCreateOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """The file identifier."""
        return 100 if head.startswith(FILE_MAGIC) else 0

    async def open(self) -> None:
        """Headers, then the log, then what the log may have changed."""
        self._storage = storage = await self.open_file()
        if storage.size < ALIGNMENT or await io.read(storage, 0, 8) != FILE_MAGIC:
            raise FormatError(f"'{storage.filename}' is not in VHDX format")
        self._turn = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._headers = Headers(storage)
        await self._headers.load()
        self._replayed = await replay(self.node, storage, self._headers)
        self._regions = await self._read_regions()
        self._metadata = await self._read_metadata(self._regions)
        if self._metadata.has_parent:
            raise UnsupportedError(f"'{storage.filename}' is a differencing VHDX: not supported")
        if 8 * self._metadata.table_words > self._regions.table_length:
            raise FormatError(
                f"The VHDX block table has {self._regions.table_length:#x} bytes, a disk of "
                f"{self._metadata.size:#x} bytes needs {8 * self._metadata.table_words:#x}"
            )
        self.allocation_unit = self._metadata.block_size
        self._table = TableCache(storage, "Q", "little")
        self._space: Space | None = None
        if not self.node.flags.read_only:
            self._log = Log(self.node, storage, self._headers)
        self._identified = False

    async def _read_regions(self) -> Regions:
        for offset in REGION_OFFSETS:
            data = await io.read(self._storage, offset, REGION_SIZE)
            if structure.regions_sound(data):
                return structure.decode_regions(data, self._headers.current, self._storage.size)
        raise FormatError("No valid VHDX region table found")

    async def _read_metadata(self, regions: Regions) -> Metadata:
        start = regions.metadata_offset
        table = await io.read(self._storage, start, structure.METADATA_TABLE_SIZE)
        length = structure.metadata_length(table, regions.metadata_length)
        return structure.decode_metadata(await io.read(self._storage, start, length))

    async def close(self) -> None:
        """Bring everything to its place and leave no log behind."""
        if self.node.flags.read_only:
            return
        await self._write_back()
        await self._log.finish()

    async def flush(self) -> None:
        """The table through the log, then everything to stable storage."""
        if not self.node.flags.read_only and await self._write_back():
            # Writing the log has flushed what was written before it.
            return
        await io.flush(self._storage)

    async def _write_back(self) -> bool:
        """Write changed parts of the table; whether there were any."""
        # One at a time: who finds nothing changed must not return before it is written.
        async with self._writing:
            updates: list[tuple[int, bytes]] = []
            for part in self._table.changed():
                first = part.first_changed * 8 // LOG_SECTOR
                last = part.last_changed * 8 // LOG_SECTOR
                data = self._table.encode(part.entries)
                updates += [
                    (part.host_offset + place, data[place : place + LOG_SECTOR])
                    for place in range(first * LOG_SECTOR, (last + 1) * LOG_SECTOR, LOG_SECTOR)
                ]
                part.clean()
            if not updates:
                return False
            # If this fails the node takes no more writes: the parts need not be marked again.
            await self._log.write(updates, self._settle)
            return True

    async def _settle(self) -> None:
        # New space that a crash takes away is restored by the log, which knows the file's size.
        if self._space is not None:
            await self._space.settle_reused()

    @property
    def size(self) -> int:
        """The disk's size."""
        return self._metadata.size

    async def _page(self, index: int) -> tuple[Part, int]:
        """The part of the table that has word ``index``, and the index of its first word."""
        first = index - index % _PAGE_WORDS
        # The region is whole MiB long: every part is there to its end.
        return await self._table.load(self._regions.table_offset + 8 * first, _PAGE_WORDS), first

    def _place(self, block: int, word: int) -> int | None:
        """Where the block is in the file; None if it reads as zeros."""
        problem = word_problem(word)
        if problem is None and word_state(word) in READS_ZERO:
            return None
        place = word_offset(word)
        needed = min(self._metadata.block_size, self._metadata.size - self._block_start(block))
        if problem is None:
            problem = self._place_problem(place, needed)
        if problem is not None:
            raise CorruptionError(
                f"VHDX block {block} of '{self._storage.filename}', table word {word:#x}: {problem}"
            )
        return place

    def _block_start(self, block: int) -> int:
        return block * self._metadata.block_size

    def _place_problem(self, place: int, length: int) -> str | None:
        header, regions = self._headers.current, self._regions
        if place + length > self._storage.size:
            return f"it ends at {place + length:#x}, past the end of the file"
        for low, size in (
            (0, ALIGNMENT),
            (header.log_offset, header.log_length),
            (regions.table_offset, regions.table_length),
            (regions.metadata_offset, regions.metadata_length),
        ):
            if place < low + size and low < place + length:
                return f"it overlaps metadata at {low:#x}"
        return None

    async def map(self, offset: int, length: int) -> Extent:
        """One block that is stored, or as many as read as zeros."""
        block_size, end = self._metadata.block_size, offset + length
        block, within = divmod(offset, block_size)
        place = await self._find(block)
        if place is not None:
            child = self.node.children["file"]
            length = min(length, block_size - within)
            place += within
            return Extent(offset, length, Kind.DATA, place, child, writable=self._identified)
        last = -(-end // block_size)
        block = await self._next_stored(block + 1, last)
        return Extent(offset, min(end, self._block_start(block)) - offset, Kind.ZERO)

    async def _find(self, block: int) -> int | None:
        index = self._metadata.table_index(block)
        part, first = await self._page(index)
        return self._place(block, part.entries[index - first])

    async def _next_stored(self, block: int, stop: int) -> int:
        """The first block from ``block`` on that does not just read as zeros; ``stop`` if none."""
        geometry = self._metadata
        while block < stop:
            part, first = await self._page(geometry.table_index(block))
            words = part.entries
            # Most of a large table says the same, and says that nothing is stored.
            if words[0] in READS_ZERO and part.uniform:
                block = max(block + 1, geometry.first_block(first + len(words)))
                continue
            while block < stop and (index := geometry.table_index(block) - first) < len(words):
                if words[index] not in READS_ZERO:
                    return block
                block += 1
        return stop

    async def _stored(self) -> AsyncIterator[tuple[int, int | CorruptionError]]:
        """All stored blocks with their places, or with what is wrong with them."""
        block, blocks = -1, self._metadata.blocks
        while (block := await self._next_stored(block + 1, blocks)) < blocks:
            try:
                place = await self._find(block)
            except CorruptionError as error:
                yield block, error
            else:
                if place is not None:
                    yield block, place

    async def allocate(self, offset: int, length: int) -> Allocation:
        """A new block at the end; or, for the first write, the place of a stored one."""
        await self._identify()
        block_size, child = self._metadata.block_size, self.node.children["file"]
        block, head = divmod(offset, block_size)
        stored = await self._find(block)
        if stored is not None:
            return Allocation(offset, min(length, block_size - head), child, stored + head)
        space = self._space or await self._find_space()
        place, zeros_from = await space.take(block_size)
        return new_block(offset, length, block_size, child, place, fresh=place >= zeros_from)

    async def _identify(self) -> None:
        async with self._turn:
            if not self._identified:
                await self._headers.mark_written()
                self._identified = True
                self.node.mapping_changed()

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """As a write does, give the image a new identity first."""
        await self._identify()
        await super().zero(offset, length, unmap=unmap)

    async def _find_space(self) -> Space:
        end = self._storage.size
        async for _, found in self._stored():
            if isinstance(found, CorruptionError):
                raise found
            end = max(end, found + self._metadata.block_size)
        if self._space is None:
            self._space = Space(self._storage, align_up(end, ALIGNMENT))
        return self._space

    async def commit(self, allocation: Allocation) -> None:
        """Enter a new block into the table."""
        if not isinstance(allocation.token, int):
            return
        index = self._metadata.table_index(allocation.offset // self._metadata.block_size)
        part, first = await self._page(index)
        part.set(index - first, make_word(STATE_FULLY_PRESENT, allocation.token))
        self.node.mapping_changed()
        if self._table.full:
            await self._write_back()

    async def abort(self, allocation: Allocation) -> None:
        """A new block stays free."""
        if not isinstance(allocation.token, int):
            return
        assert self._space is not None
        self._space.give_back(allocation.token, self._metadata.block_size)

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Every word valid, every block within the file, and no two at one place."""
        result = CheckResult(messages=[])
        result.corruptions_fixed = int(self._replayed)
        places: list[tuple[int, int]] = []

        def report(message: str) -> None:
            result.corruptions += 1
            if len(result.messages) < MAX_MESSAGES:
                result.messages.append(f"ERROR {message}")

        async for block, found in self._stored():
            if isinstance(found, CorruptionError):
                report(str(found))
            else:
                places.append((found, block))
        places.sort()
        for (low, block), (high, other) in pairwise(places):
            if low + self._metadata.block_size > high:
                report(f"VHDX blocks {block} and {other} overlap at {high:#x}")
        return result

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """A new image."""
        assert isinstance(options, VhdxCreateOptions)
        await write_image(target, options)
