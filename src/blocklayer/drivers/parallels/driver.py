"""Parallels' expanding images: clusters of one file, found through one table.

1. A cluster's data are on stable storage before the table names it. Clusters that are given up
   read as zeros at once, and are used again as ``clusters`` says.
2. The image is marked as in use, durably, before its table changes in the file, and no more after
   the table is on stable storage. One found marked is checked before it is written.
3. A format extension (dirty bitmaps) does not survive the first change: it would not be true any
   more. One that forbids to be dropped makes the image read-only.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

from msgspec import Meta

from blocklayer.codec import parallels
from blocklayer.codec.parallels import Header
from blocklayer.drivers.blocks import BlockFormatDriver, FileOptions, new_run
from blocklayer.drivers.parallels.clusters import FreeClusters, find_holes
from blocklayer.drivers.tables import PAGE_SIZE, Part, TableCache
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.graph.options import Size
from blocklayer.units import MIB, div_up

PAGE_WORDS = PAGE_SIZE // 4
_MAX_EXTENSION = 4 * MIB
"""Bytes of a format extension that are looked at."""


class ParallelsCreateOptions(BaseCreateOptions):
    """``-o`` of ``qemu-img create -f parallels``."""

    cluster_size: Annotated[Size, Meta(description="Parallels image cluster size")] = (
        parallels.DEFAULT_CLUSTER_SIZE
    )

    def validate(self) -> None:
        """Raise UsageError if no such image can be made."""
        try:
            parallels.new_header(self.size, self.cluster_size)
        except FormatError as error:
            raise UsageError(str(error)) from None


class ParallelsDriver(BlockFormatDriver):
    """One Parallels image."""

    NAME: ClassVar[str] = "parallels"
    Options = FileOptions
    CreateOptions = ParallelsCreateOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """One of two magics stands at the start."""
        return 100 if head.startswith(parallels.MAGICS) else 0

    async def open(self) -> None:
        """Read and judge the header; the table is read when it is needed."""
        storage = self._storage = await self.open_file()
        data = await io.read(storage, 0, min(Header.SIZE, storage.size))
        header = self.header = parallels.decode_header(data)
        if header.table_end > storage.size:
            raise FormatError(
                f"The table of '{storage.filename}' ends at {header.table_end:#x}, past the end "
                f"of the file ({storage.size:#x} bytes)"
            )
        self.allocation_unit = self.zero_alignment = self.discard_alignment = header.cluster_size
        self.table = TableCache(storage, "I", "little")
        self._clusters: FreeClusters | None = None
        self._turn = asyncio.Lock()
        self._marked = False
        if not self.node.flags.read_only:
            await self._check_extension()
            if not self.node.flags.repair and self.was_in_use:
                await self._become_writer()

    async def _check_extension(self) -> None:
        place = self.header.ext_off * self.header.entry_size
        if not self.header.ext_off or place >= self._storage.size:
            return
        length = min(self.header.cluster_size, self._storage.size - place, _MAX_EXTENSION)
        if parallels.necessary_extension(await io.read(self._storage, place, length)):
            raise UnsupportedError(
                f"'{self._storage.filename}' has a format extension that forbids to change it: "
                "open it read-only"
            )

    @property
    def was_in_use(self) -> bool:
        """Whether the image was not closed as it should be."""
        return self.header.in_use == parallels.IN_USE and not self._marked

    async def _become_writer(self) -> None:
        found = await self.check(frozenset())
        if found.corruptions > 1:
            raise FormatError(
                f"'{self._storage.filename}' was not closed properly and is damaged: open it "
                "read-only and save its data, or run 'check -r all'"
            )
        # Nothing is wrong but the mark, which stays until the image is closed.
        self._marked = True

    async def close(self) -> None:
        """Write back the table, and take the mark away."""
        await self.write_back()
        if self._marked:
            await self.unmark()

    async def unmark(self) -> None:
        """Say in the file that the image is closed as it should be."""
        await io.flush(self._storage)
        await self.write_field(parallels.IN_USE_OFFSET, 4, parallels.CLOSED)
        self.header.in_use = parallels.CLOSED
        self._marked = False

    async def flush(self) -> None:
        """The table, then everything to stable storage."""
        count = self._clusters.begin_flush() if self._clusters else 0
        await self.write_back()
        await io.flush(self._storage)
        if self._clusters:
            self._clusters.flushed(count)

    async def write_back(self) -> None:
        """Bring the table to the file, and what it names to stable storage before it."""
        await self.table.write_back(self._settle)

    async def _settle(self) -> None:
        await self._mark()
        if self._clusters is not None:
            await self._clusters.settle()

    async def _mark(self) -> None:
        """Mark the image as in use, and drop its extension, durably."""
        async with self._turn:
            if self._marked:
                return
            await self.write_field(parallels.IN_USE_OFFSET, 4, parallels.IN_USE)
            if self.header.ext_off:
                await self.write_field(parallels.EXT_OFF_OFFSET, 8, 0)
            await io.flush(self._storage)
            self.header.in_use, self.header.ext_off = parallels.IN_USE, 0
            self._marked = True

    async def write_field(self, offset: int, size: int, value: int) -> None:
        """Change a field of the header in the file."""
        await io.write(self._storage, offset, value.to_bytes(size, "little"))

    @property
    def size(self) -> int:
        """The disk's size."""
        return self.header.size

    async def page(self, cluster: int) -> tuple[Part, int]:
        """The part of the table that has ``cluster``, and the cluster of its first word."""
        first = cluster - cluster % PAGE_WORDS
        count = min(PAGE_WORDS, self.header.bat_entries - first)
        return await self.table.load(Header.SIZE + 4 * first, count), first

    def info(self) -> None:
        """QEMU has nothing to say either."""

    def is_place(self, place: int) -> bool:
        """Whether a cluster can be at ``place``."""
        return self.header.data_offset <= place < self._storage.size

    def _check_place(self, cluster: int, word: int) -> int:
        place = word * self.header.entry_size
        if not self.is_place(place):
            raise CorruptionError(
                f"Cluster {cluster} of '{self._storage.filename}' at {place:#x} is outside its "
                "data: check it"
            )
        return place

    async def map(self, offset: int, length: int) -> Extent:
        """Clusters that follow one another in the file, or that all read as zeros."""
        header = self.header
        unit = header.cluster_size
        cluster, within = divmod(offset, unit)
        if cluster >= header.bat_entries:
            return Extent(offset, length, Kind.ZERO)
        limit = div_up(offset + length, unit)
        part, first = await self.page(cluster)
        words, start = part.entries, cluster - first
        word, stop = words[start], start + 1
        last = min(len(words), limit - first)
        step = unit // header.entry_size if word else 0
        while stop < last and words[stop] == word + (stop - start) * step:
            stop += 1
        length = min(length, (first + stop) * unit - offset)
        if not word:
            return Extent(offset, length, Kind.UNALLOCATED)
        # Every word of the run is judged by the last one, which is the largest.
        self._check_place(first + stop - 1, words[stop - 1])
        place = self._check_place(cluster, word) + within
        return Extent(offset, length, Kind.DATA, place, self.node.children["file"], writable=True)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Free clusters in a row, as many as one part of the table names."""
        if self.table.full:
            await self.write_back()
        header = self.header
        unit = header.cluster_size
        cluster = offset // unit
        if cluster >= header.bat_entries:
            raise UnsupportedError(
                f"The table of '{self._storage.filename}' ends before {offset:#x}: it cannot be "
                "written there"
            )
        clusters = self._clusters or await self._find_clusters()
        end = min(div_up(offset + length, unit), cluster - cluster % PAGE_WORDS + PAGE_WORDS)
        place, count, zeros_from = await clusters.take(min(end, header.bat_entries) - cluster)
        if place + count * unit > header.entry_size << 32:
            clusters.give_back(place, count)
            raise UnsupportedError(f"'{self._storage.filename}' is full: its table counts no more")
        child, fresh = self.node.children["file"], place >= zeros_from
        start, size = cluster * unit, count * unit
        return new_run(offset, length, start, size, child, place, fresh=fresh, bare=fresh)

    async def _find_clusters(self) -> FreeClusters:
        places, problem = await self.sorted_places()
        if problem is not None:
            raise CorruptionError(f"'{self._storage.filename}' is damaged ({problem}): check it")
        header = self.header
        holes, end = find_holes(places, header.data_offset, header.cluster_size)
        if self._clusters is None:
            self._clusters = FreeClusters(self.node, self._storage, holes, end, header.cluster_size)
        return self._clusters

    async def sorted_places(self) -> tuple[list[int], str | None]:
        """Where clusters are, in the order of the file; and what is wrong with that, if anything
        is.
        """
        import numpy

        parts = []
        for first in range(0, self.header.bat_entries, PAGE_WORDS):
            part, _ = await self.page(first)
            if part.uniform and not part.entries[0]:
                continue
            words = numpy.array(part.entries, dtype=numpy.uint64)
            parts.append(words[words != 0])
        if not parts:
            return [], None
        found = numpy.sort(numpy.concatenate(parts)) * numpy.uint64(self.header.entry_size)
        places: list[int] = found.tolist()
        for place in (places[0], places[-1]):
            if not self.is_place(place):
                return places, f"a cluster at {place:#x} is outside its data"
        close = numpy.flatnonzero(numpy.diff(found) < self.header.cluster_size)
        if len(close):
            return places, f"the cluster at {places[close[0]]:#x} is used twice"
        return places, None

    async def commit(self, allocation: Allocation) -> None:
        """Enter the clusters into the table."""
        assert isinstance(allocation.token, tuple)
        place, size = allocation.token
        unit, entry_size = self.header.cluster_size, self.header.entry_size
        cluster = allocation.offset // unit
        part, first = await self.page(cluster)
        for index in range(size // unit):
            part.set(cluster - first + index, (place + index * unit) // entry_size)
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The clusters stay free."""
        assert self._clusters is not None
        assert isinstance(allocation.token, tuple)
        place, size = allocation.token
        self._clusters.give_back(place, size // self.header.cluster_size)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Give up clusters: what has none reads as zeros."""
        await self.discard(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Give up clusters, and the space of the file that they had."""
        unit, end = self.header.cluster_size, offset + length
        clusters = self._clusters or await self._find_clusters()
        while offset < end:
            if self.table.full:
                await self.write_back()
            extent = await self.map(offset, end - offset)
            step = min(extent.length, end - offset)
            if extent.kind is Kind.DATA and extent.host_offset is not None:
                cluster, count = offset // unit, div_up(step, unit)
                part, first = await self.page(cluster)
                for index in range(count):
                    part.set(cluster - first + index, 0)
                    clusters.give_up(extent.host_offset + index * unit)
                self.node.mapping_changed()
                await io.discard(self._storage, extent.host_offset, count * unit)
            offset += step

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Every cluster within the file, and none used twice; mend what can be."""
        from blocklayer.drivers.parallels.check import check

        return await check(self, repair)

    def reset_clusters(self) -> None:
        """A repair has changed which clusters are free."""
        self._clusters = None

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """Header and an empty table."""
        assert isinstance(options, ParallelsCreateOptions)
        header = parallels.new_header(options.size, options.cluster_size)
        end = header.data_offset
        await io.write_zeroes(target, 0, min(target.size, end))
        if target.size < end:
            await io.truncate(target, end)
        # Last, so that an image half made is none.
        await io.write(target, 0, header.pack())
