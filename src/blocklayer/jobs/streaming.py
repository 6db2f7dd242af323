"""Streaming: the guest's view of one or more images, given as the bytes of a new image.

1. The plan is made once, from the sources' block status; what is then read follows the plan, not a
   second look. What has become zeros meanwhile is given as zeros, byte by byte.
2. The sources must not change from the plan to the last byte: whoever streams sees to that.
3. Memory: a few chunks, the plan (17 bytes a run of data), and 4 bytes a compressed cluster.
4. When ``chunks`` has ended or was closed, no thread touches a buffer or a file any more.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing

import msgspec

from blocklayer.errors import StorageError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.root import Root, requests
from blocklayer.graph.streams import ImageStream, Packed
from blocklayer.jobs.convert import top_pieces, total_size, whole_units
from blocklayer.jobs.copying import CHUNK_SIZE, DEFAULT_SPARSE_SIZE, DEFAULT_WORKERS
from blocklayer.jobs.filling import Filler
from blocklayer.jobs.pace import Pace
from blocklayer.jobs.plan import Chunk, Gatherer, Piece, pieces_within
from blocklayer.jobs.reading import Reader, Warn, new_buffer
from blocklayer.jobs.threads import Threads, in_order
from blocklayer.jobs.writing import gaps, spans
from blocklayer.units import MIB

_PLANNED_AT_ONCE = 1 << 40
"""Data that is not read yet takes no room: chunks of the plan end with their segments."""
_GIVEN_AT_ONCE = MIB // 4
"""Tables and compressed clusters are given in pieces of this size or somewhat more."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """How to stream."""

    sparse_size: int | None = None
    """As for a copy; None: zeros are those of the block status, unless all is read anyway."""
    top_only: bool = False
    """The image's backing file stands for those of the only source, whose top layer is given."""
    workers: int = DEFAULT_WORKERS
    bytes_per_s: int = 0
    salvage: Warn | None = None


class _Ranges:
    """Ranges that come in order, joined where they meet."""

    def __init__(self) -> None:
        self._bounds = array("Q")

    def add(self, start: int, end: int) -> None:
        if self._bounds and self._bounds[-1] == start:
            self._bounds[-1] = end
        else:
            self._bounds.extend((start, end))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        bounds = iter(self._bounds)
        return zip(bounds, bounds, strict=True)


class Streaming:
    """``sources``, one after the other, on their way into ``image``. For one use.

    ``progress`` is told of bytes done and in all, which depend on how often the disk is read.
    """

    def __init__(
        self,
        sources: Sequence[Root],
        image: ImageStream,
        options: StreamOptions,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sources = sources
        self.image = image
        self.options = options
        self.size = total_size(sources)
        assert image.size == self.size
        self._data = _Ranges()
        self._reader = Reader(options.salvage)
        self._progress = progress
        self._done = 0
        self._reads_first = image.measured or options.sparse_size not in (None, 0)
        self._total = self.size * (2 if self._reads_first else 1)

    async def plan(self) -> None:
        """Find out what there is; ``image.length`` is known afterwards, if it can be."""
        options, image = self.options, self.image
        limit = CHUNK_SIZE if self._reads_first else _PLANNED_AT_ONCE
        materialised = image.materialised or options.sparse_size == 0
        gatherer = Gatherer(image.unit, limit, materialise=materialised)
        async with aclosing(gatherer.chunks(self._pieces())) as chunks:
            if self._reads_first:
                sparse_size = options.sparse_size
                if sparse_size is None:
                    sparse_size = 0 if materialised else DEFAULT_SPARSE_SIZE
                await self._plan_by_reading(chunks, gatherer.limit, sparse_size)
            else:
                async for chunk in chunks:
                    for segment in chunk.segments:
                        segment.data = [(segment.offset, segment.end)]
                    self._note(chunk)
        image.settle()

    async def _plan_by_reading(
        self, chunks: AsyncGenerator[Chunk, None], capacity: int, sparse_size: int
    ) -> None:
        filled = self._filled(chunks, capacity, sparse_size, first=True)
        async with aclosing(filled):
            async for chunk, _ in filled:
                self._note(chunk)
                self._report(chunk.covered)

    def _pieces(self) -> AsyncIterator[Piece]:
        if self.options.top_only:
            # A unit is given whole or not at all.
            source = self.sources[0]
            return whole_units(top_pieces(source, self.size), source, self.image.unit)
        return pieces_within(self.sources, 0, self.size)

    def _note(self, chunk: Chunk) -> None:
        """Plan what the chunk holds, whose segments know their data."""
        unit, image = self.image.unit, self.image
        found: list[tuple[int, int, Packed | None]]
        found = [(start, end, None) for start, end in chunk.zeros]
        for segment in chunk.segments:
            found += [(start, end, None) for start, end in gaps(segment, unit)]
            found += [(start, end, segment.packed) for start, end in spans(segment, unit)]
        for start, end, packed in sorted(found, key=lambda entry: entry[0]):
            if packed is None:
                image.plan_zeros(start, end)
                continue
            self._data.add(start, end)
            if not packed:
                image.plan_data(start, end)
                continue
            for offset in range(start, end, unit):
                if offset in packed:
                    image.plan_packed(offset, len(packed[offset]))
                else:
                    image.plan_data(offset, min(offset + unit, end))

    async def chunks(self) -> AsyncGenerator[Buffer, None]:
        """The image's bytes; each piece is valid until the next one is asked for."""
        given = 0
        pace = Pace(self.options.bytes_per_s)
        async with aclosing(self._all()) as pieces:
            async for piece in pieces:
                await pace.wait()
                pace.charge(len(piece))
                given += len(piece)
                yield piece
        if self.image.length is not None and given != self.image.length:
            raise StorageError(
                f"The stream has {given:#x} bytes instead of {self.image.length:#x}", errno.EIO
            )

    async def _all(self) -> AsyncGenerator[Buffer, None]:
        for piece in _larger(self.image.head()):
            yield piece
        image, skips = self.image, self.image.skips_zeros
        gatherer = Gatherer(image.unit, CHUNK_SIZE, zeros_known=True, materialise=not skips)
        chunks = gatherer.chunks(self._planned())
        sparse_size = DEFAULT_SPARSE_SIZE if skips else 0
        async with (
            aclosing(chunks),
            aclosing(self._filled(chunks, gatherer.limit, sparse_size)) as filled,
        ):
            async for chunk, buffer in filled:
                for piece in _larger(self._given(chunk, buffer)):
                    yield piece
                self._report(chunk.covered)
        yield image.tail()

    async def _planned(self) -> AsyncGenerator[Piece, None]:
        for start, end in self._data:
            async for piece in pieces_within(self.sources, start, end):
                yield piece

    def _given(self, chunk: Chunk, buffer: memoryview) -> Iterator[Buffer]:
        for segment in chunk.segments:
            view = segment.view(buffer)
            for start, end in spans(segment, self.image.unit):
                part = view[start - segment.offset : end - segment.offset]
                yield from self.image.put(start, part, segment.packed)

    async def _filled(
        self,
        chunks: AsyncGenerator[Chunk, None],
        capacity: int,
        sparse_size: int,
        *,
        first: bool = False,
    ) -> AsyncGenerator[tuple[Chunk, memoryview], None]:
        """All ``chunks``, read; several at once, given in order."""
        image = self.image
        free: list[memoryview] = []
        with Threads(self.options.workers) as loaders:
            filler = Filler(
                self._reader,
                loaders,
                size=self.size,
                unit=image.unit,
                sparse_size=sparse_size,
                pack=image.pack if image.packs else None,
                wants_packed=(lambda offset: True) if first else image.wants_packed,
            )

            async def fill(chunk: Chunk) -> tuple[Chunk, memoryview]:
                buffer = free.pop() if free else new_buffer(capacity)
                async with requests(*self.sources):
                    await filler.fill(chunk, buffer)
                return chunk, buffer

            async with aclosing(in_order(chunks, fill, self.options.workers + 1)) as filled:
                async for chunk, buffer in filled:
                    yield chunk, buffer
                    free.append(buffer)

    def _report(self, length: int) -> None:
        self._done += length
        if self._progress is not None:
            self._progress(self._done, self._total)


def _larger(pieces: Iterator[Buffer]) -> Iterator[Buffer]:
    """The same bytes, small pieces joined."""
    kept: list[Buffer] = []
    length = 0
    for piece in pieces:
        if not kept and len(piece) >= _GIVEN_AT_ONCE:
            yield piece
            continue
        kept.append(piece)
        length += len(piece)
        if length >= _GIVEN_AT_ONCE:
            yield b"".join(kept)
            kept, length = [], 0
    if kept:
        yield b"".join(kept)
