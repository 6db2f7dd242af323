"""What to copy: pieces of guest data, gathered into chunks that are read and written as one.

1. Pieces come in order of target offset and do not overlap. What lies between two pieces is not
   touched.
2. A segment begins and ends on the target's allocation unit wherever the pieces around it allow, so
   that no cluster of the target is filled twice.
3. A chunk holds at most ``limit`` bytes of data, and never two segments of one allocation unit:
   chunks may then be in flight side by side, each under one claim.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Final

import msgspec

from blocklayer.graph import resolve
from blocklayer.graph.driver import ProtocolDriver
from blocklayer.graph.extent import Kind, Run
from blocklayer.graph.io import is_zero
from blocklayer.graph.root import Root
from blocklayer.units import SECTOR, align_down, align_up

_RUNS_A_REQUEST = 64
_SEGMENTS_A_CHUNK = 256
FIXED: Final = -2
"""In place of a generation: the bytes stay where they are, whatever else of the graph changes."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes for ``[offset, offset + length)`` of the target: ``data``, ``source``'s, or zeros.

    ``run`` tells where the source's bytes (or zeros) were found at ``generation`` of its node;
    without it, or later, the source is read the long way.
    """

    offset: int
    length: int
    source: Root | None = None
    source_offset: int = 0
    run: Run | None = None
    generation: int = -1
    data: memoryview | None = None
    """The bytes themselves, where they came from no disk."""

    @property
    def zero(self) -> bool:
        """Whether the bytes are zeros without being read."""
        return self.source is None and self.data is None

    @property
    def end(self) -> int:
        """The first offset after the piece."""
        return self.offset + self.length

    def cut(self, start: int, end: int) -> Piece:
        """The part of the piece within ``[start, end)``."""
        start, end = max(start, self.offset), min(end, self.end)
        return Piece(
            start,
            end - start,
            self.source,
            self.source_offset + (start - self.offset),
            self.run,
            self.generation,
            None if self.data is None else self.data[start - self.offset : end - self.offset],
        )


class Segment(msgspec.Struct, gc=False):
    """A run of the target's bytes without gaps; ``at`` is its place in the chunk's buffer."""

    offset: int
    end: int
    at: int
    pieces: list[Piece]
    data: list[tuple[int, int]] = []
    """What is not zero, as (start, end) within the target; known once it was read."""
    packed: dict[int, bytes] = {}
    """Units of the data that got smaller by compression, by offset."""

    def view(self, buffer: memoryview) -> memoryview:
        """The segment's part of the chunk's ``buffer``."""
        return buffer[self.at : self.at + (self.end - self.offset)]


class Chunk(msgspec.Struct, gc=False):
    """Segments to fill, and ranges to make zero, in order."""

    segments: list[Segment]
    zeros: list[tuple[int, int]]
    length: int = 0
    """Bytes of all segments: what the buffer holds."""
    covered: int = 0
    """Bytes of the target that are done with this chunk."""

    def placed(self) -> Iterator[tuple[int, Piece]]:
        """All pieces, with their places in the buffer."""
        for segment in self.segments:
            at = segment.at
            for piece in segment.pieces:
                yield at, piece
                at += piece.length

    @property
    def start(self) -> int:
        """The first target offset that the chunk's segments change."""
        return self.segments[0].offset

    @property
    def end(self) -> int:
        """The first target offset after all that the chunk's segments change."""
        return self.segments[-1].end


async def source_runs(source: Root, offset: int, length: int) -> AsyncIterator[tuple[Run, int]]:
    """All runs of a range of ``source``, each with the generation at which it was true."""
    end = offset + length
    while offset < end:
        found: list[tuple[Run, int]] = []
        async with source.request():
            node = source.node
            while offset < end and len(found) < _RUNS_A_REQUEST:
                run = await resolve.status(node, offset, end - offset)
                found.append((run, node.generation))
                offset = run.end
        for pair in found:
            yield pair


def piece_of(run: Run, generation: int, source: Root, shift: int = 0) -> Piece:
    """The piece that copies ``run`` of ``source`` to the same offset plus ``shift``."""
    if run.kind is Kind.ZERO:
        return Piece(run.offset + shift, run.length, None, 0, run)
    return Piece(run.offset + shift, run.length, source, run.offset, run, generation)


async def pieces_of(source: Root, size: int) -> AsyncIterator[Piece]:
    """All of ``source``, and zeros from its end on to ``size``."""
    async for run, generation in source_runs(source, 0, min(source.node.size, size)):
        yield piece_of(run, generation, source)
    if source.node.size < size:
        yield Piece(source.node.size, size - source.node.size)


async def pieces_within(
    sources: Sequence[Root], start: int, end: int
) -> AsyncGenerator[Piece, None]:
    """``[start, end)`` of ``sources``, one after the other, each rounded up to whole sectors."""
    shift = 0
    for source in sources:
        size = source.node.size
        first, last = max(start - shift, 0), min(end - shift, size)
        if first < last:
            async for run, generation in source_runs(source, first, last - first):
                yield piece_of(run, generation, source, shift)
        first, shift = max(start, shift + size), shift + align_up(size, SECTOR)
        last = min(end, shift)
        if first < last:
            yield Piece(first, last - first)


async def side_by_side(
    first: AsyncIterator[Piece], second: AsyncIterator[Piece]
) -> AsyncIterator[tuple[Piece, Piece]]:
    """Pieces of two that start at the same offset, cut where either ends; up to the earlier end."""
    one, other = await anext(first, None), await anext(second, None)
    while one is not None and other is not None:
        end = min(one.end, other.end)
        start = max(one.offset, other.offset)
        if start < end:
            yield one.cut(start, end), other.cut(start, end)
        if one.end == end:
            one = await anext(first, None)
        if other.end == end:
            other = await anext(second, None)


class SamePlace:
    """Tells pieces that are the same bytes of the same storage, such as a common backing file."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, one: Piece, other: Piece) -> bool:
        """Whether reading both would read the same place twice."""
        a, b = one.run, other.run
        if a is None or b is None or a.kind is not Kind.DATA or b.kind is not Kind.DATA:
            return False
        if a.storage is None or b.storage is None or a.host_offset is None or b.host_offset is None:
            return False
        place = a.host_offset + (one.source_offset - a.offset)
        if place != b.host_offset + (other.source_offset - b.offset):
            return False
        if a.storage is b.storage:
            return True
        key = (a.storage.name, b.storage.name)
        if key not in self._known:
            identities = [
                node.driver.identity() if isinstance(node.driver, ProtocolDriver) else None
                for node in (a.storage, b.storage)
            ]
            self._known[key] = identities[0] is not None and identities[0] == identities[1]
        return self._known[key]


class Gatherer:
    """Pieces in, chunks out.

    ``zeros_known``: the target reads as zeros already where nothing was written, so zeros outside
    the units of data are left out. ``materialise``: zeros are data like any other.
    """

    def __init__(
        self, unit: int, limit: int, *, zeros_known: bool = False, materialise: bool = False
    ) -> None:
        self.unit = unit
        self.limit = max(align_down(limit, unit), unit)
        self.zeros_known = zeros_known
        self.materialise = materialise
        self._chunk = Chunk([], [])
        self._segment: Segment | None = None
        self._zero: tuple[int, int] | None = None
        """Zeros before the next piece; their end may be needed to fill that piece's first unit."""

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[Chunk, None]:
        """Gather ``pieces`` into chunks."""
        async for piece in pieces:
            if piece.zero and not self.materialise:
                self._take_zero(piece.offset, piece.end)
                if len(self._chunk.zeros) >= _SEGMENTS_A_CHUNK:
                    yield self._finish_chunk()
                continue
            for chunk in self._take_data(piece):
                yield chunk
        self._end_zero()
        chunk = self._finish_chunk()
        if chunk.segments or chunk.covered:
            yield chunk

    def _take_zero(self, start: int, end: int) -> None:
        segment = self._segment
        if segment is not None and segment.end == start:
            fill = min(align_up(start, self.unit), end)
            self._extend(segment, Piece(start, fill - start))
            start = fill
        if start < end:
            if self._zero is not None and self._zero[1] == start:
                start = self._zero[0]
            else:
                self._end_zero()
            self._zero = (start, end)
            self._segment = None

    def _end_zero(self) -> None:
        if self._zero is not None:
            start, end = self._zero
            if not self.zeros_known:
                self._chunk.zeros.append((start, end))
            self._chunk.covered += end - start
            self._zero = None

    def _take_data(self, piece: Piece) -> Iterator[Chunk]:
        """Add a piece of data; yields each chunk that this fills (a piece may be a whole disk)."""
        lead = self._leading_zeros(piece.offset)
        for part in (lead, piece):
            while part is not None and part.length:
                if self._must_finish(part.offset):
                    yield self._finish_chunk()
                segment = self._segment
                if segment is None or segment.end != part.offset:
                    segment = Segment(part.offset, part.offset, self._chunk.length, [], [])
                    self._segment = segment
                    self._chunk.segments.append(segment)
                # Cut where a unit ends, so that the next chunk starts with a whole one.
                cut = align_down(segment.end + self.limit - self._chunk.length, self.unit)
                cut = min(max(cut, align_down(segment.end, self.unit) + self.unit), part.end)
                self._extend(segment, part.cut(part.offset, cut))
                part = part.cut(cut, part.end) if cut < part.end else None

    def _leading_zeros(self, offset: int) -> Piece | None:
        """Take from the zeros before ``offset`` what its unit needs to be filled from its start."""
        zero = self._zero
        if zero is None:
            return None
        lead = None
        if zero[1] == offset:
            start = max(align_down(offset, self.unit), zero[0])
            lead = Piece(start, offset - start)
            self._zero = (zero[0], start) if start > zero[0] else None
        self._end_zero()
        return lead

    def _must_finish(self, offset: int) -> bool:
        """Whether data at ``offset`` belongs to another chunk than the data before."""
        chunk, unit = self._chunk, self.unit
        if not chunk.segments:
            return False
        goes_on = self._segment is not None and self._segment.end == offset
        if goes_on and offset % unit:
            # There was room for the rest of the unit when the unit began.
            return False
        rest = align_down(offset, unit) + unit - offset
        if self.limit - chunk.length < rest:
            return True
        if goes_on:
            return False
        shares_unit = align_down(offset, unit) < align_up(chunk.segments[-1].end, unit)
        return shares_unit or len(chunk.segments) >= _SEGMENTS_A_CHUNK

    def _extend(self, segment: Segment, piece: Piece) -> None:
        if piece.length:
            segment.pieces.append(piece)
            segment.end = piece.end
            self._chunk.length += piece.length
            self._chunk.covered += piece.length

    def _finish_chunk(self) -> Chunk:
        chunk, self._chunk, self._segment = self._chunk, Chunk([], []), None
        return chunk


def data_ranges(view: memoryview, sparse_size: int) -> list[tuple[int, int]]:
    """What is left of ``view`` without zero runs of ``sparse_size`` bytes or more, as (start, end).

    Runs are made of blocks of the largest power of two in ``sparse_size``; 0 finds no zeros.
    """
    length = len(view)
    if not sparse_size or not length:
        return [(0, length)] if length else []
    block = 1 << (sparse_size.bit_length() - 1)
    whole = align_down(length, block)
    # One word of each block tells nearly all data from zeros; only the others are compared.
    words = view[:whole].cast("Q")[:: block // 8].tolist() if whole else []
    if whole == length and 0 not in words:
        return [(0, length)]
    if is_zero(view):
        return []
    suspects = [index * block for index, word in enumerate(words) if not word]
    if whole < length:
        suspects.append(whole)
    return _without(
        [at for at in suspects if is_zero(view[at : at + block])], block, length, sparse_size
    )


def _without(holes: list[int], block: int, length: int, least: int) -> list[tuple[int, int]]:
    """``[0, length)`` without the runs of ``least`` bytes or more among the blocks at ``holes``."""
    ranges: list[tuple[int, int]] = []
    start = position = 0
    while position < len(holes):
        first = holes[position]
        end = first
        while position < len(holes) and holes[position] == end:
            end += block
            position += 1
        if end - first >= least:
            if first > start:
                ranges.append((start, first))
            start = end
    if start < length:
        ranges.append((start, length))
    return ranges


def sparse_size_error(size: int) -> str | None:
    """Why ``size`` cannot be a sparse size, or None."""
    if size % SECTOR or not 0 <= size <= 16 << 20:
        return (
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up "
            "to 16777216. Select 0 to disable sparse detection (fully allocates output)."
        )
    return None
