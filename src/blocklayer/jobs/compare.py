"""Compare: whether two disks read the same, and where the first difference is.

1. What both are known to hold as zeros, and what is the same place of the same file, is not read.
2. The difference reported is the first one in the disk, whichever worker meets one first. Its
   offset is that of the sector.
3. A disk that ends before the other reads as zeros from there on.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncGenerator, Callable

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph.extent import Kind
from blocklayer.graph.root import Root
from blocklayer.jobs.plan import Piece, SamePlace, pieces_of, side_by_side
from blocklayer.jobs.reading import Reader, TransferError, new_buffer
from blocklayer.jobs.threads import Threads, crew
from blocklayer.units import MIB, SECTOR, align_down

_CHUNK_SIZE = 1 * MIB
_PAIRS_A_CHUNK = 256
_WORKERS = 4


class Difference(enum.Enum):
    """What differs."""

    SIZE = "size"
    STATUS = "status"
    CONTENT = "content"


class Verdict(msgspec.Struct, frozen=True):
    """The first difference, or none, and whether the sizes are the same."""

    difference: Difference | None = None
    offset: int = 0
    sizes_differ: bool = False


class UnreadableError(BlockError):
    """One of the disks could not be read or, not ``reading``, mapped; ``side`` is 0 or 1."""

    def __init__(self, side: int, offset: int, error: BlockError, *, reading: bool) -> None:
        super().__init__(str(error))
        self.side = side
        self.reading = reading
        self.offset = offset
        self.errno = error.errno


class Pairs(msgspec.Struct):
    """Pieces of both disks to be read and compared, with their places in the buffers."""

    pairs: list[tuple[int, Piece, Piece]]
    length: int = 0
    reached: int = 0
    """The offset up to which all is compared or taken by a chunk."""

    def offset_of(self, position: int) -> int:
        """The guest offset of the sector at ``position`` of the buffers."""
        at, piece, _ = next(pair for pair in reversed(self.pairs) if pair[0] <= position)
        return align_down(piece.offset + (position - at), SECTOR)


async def compare(
    one: Root,
    other: Root,
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Compare two disks; ``strict`` also compares sizes and what is allocated."""
    return await _Comparison((one, other), strict, progress).run()


class _Comparison:
    def __init__(
        self, roots: tuple[Root, Root], strict: bool, progress: Callable[[int], None] | None
    ) -> None:
        self._roots = roots
        self._sizes = [root.node.size for root in roots]
        self._strict = strict
        self._progress = progress
        self._reader = Reader()
        self._same_place = SamePlace()
        self._found: tuple[int, Difference] | None = None
        self._taking = asyncio.Lock()

    async def run(self) -> Verdict:
        differ = self._sizes[0] != self._sizes[1]
        if self._strict and differ:
            return Verdict(Difference.SIZE, 0, differ)
        chunks = self._chunks()
        try:
            with Threads(_WORKERS) as threads:
                await crew(_WORKERS, lambda: self._work(chunks, threads))
        finally:
            await chunks.aclose()
        if self._found is None:
            return Verdict(None, 0, differ)
        offset, difference = self._found
        return Verdict(difference, offset, differ)

    def _report(self, offset: int, difference: Difference) -> None:
        if self._found is None or offset < self._found[0]:
            self._found = (offset, difference)

    async def _work(self, chunks: AsyncGenerator[Pairs, None], threads: Threads) -> None:
        # The first is a bytearray, since only that can compare a part of itself without copying.
        memory = bytearray(_CHUNK_SIZE)
        buffers = (memoryview(memory), new_buffer(_CHUNK_SIZE))
        while True:
            async with self._taking:
                # Chunks are taken in order: what lies before a difference is in hand already.
                chunk = None if self._found else await anext(chunks, None)
            if chunk is None:
                return
            for side in (0, 1):
                await self._read(side, chunk, buffers[side], threads)
            position = await threads.run(first_difference, memory, buffers[1], chunk.length)
            if position is not None:
                self._report(chunk.offset_of(position), Difference.CONTENT)
            if self._progress is not None:
                self._progress(chunk.reached)

    async def _read(self, side: int, chunk: Pairs, buffer: memoryview, threads: Threads) -> None:
        placed = [(at, other if side else one) for at, one, other in chunk.pairs]
        try:
            async with self._roots[side].request():
                loads = await self._reader.prepare(placed, buffer)
                if loads:
                    await threads.run(self._reader.fill, loads, buffer)
        except TransferError as error:
            raise UnreadableError(side, error.offset, error, reading=True) from error

    async def _chunks(self) -> AsyncGenerator[Pairs, None]:
        """What must be read, in chunks."""
        size = max(self._sizes)
        chunk = Pairs([])
        async for one, other in side_by_side(self._tagged(0, size), self._tagged(1, size)):
            if self._strict and self._status(one) != self._status(other):
                yield chunk
                self._report(one.offset, Difference.STATUS)
                return
            while one.source is not None or other.source is not None:
                if self._same_place(one, other):
                    break
                if chunk.length == _CHUNK_SIZE or len(chunk.pairs) == _PAIRS_A_CHUNK:
                    yield chunk
                    chunk = Pairs([])
                cut = min(one.end, one.offset + _CHUNK_SIZE - chunk.length)
                chunk.pairs.append(
                    (chunk.length, one.cut(one.offset, cut), other.cut(one.offset, cut))
                )
                chunk.length += cut - one.offset
                if cut == one.end:
                    break
                one, other = one.cut(cut, one.end), other.cut(cut, other.end)
            chunk.reached = one.end
        yield chunk

    async def _tagged(self, side: int, size: int) -> AsyncGenerator[Piece, None]:
        """The pieces of one side; an error says which side it was."""
        offset = 0
        try:
            async for piece in pieces_of(self._roots[side], size):
                yield piece
                offset = piece.end
        except BlockError as error:
            raise UnreadableError(side, offset, error, reading=False) from error

    @staticmethod
    def _status(piece: Piece) -> tuple[object, ...]:
        """What strict mode compares of a run: QEMU's block status, the end of the disk included."""
        run = piece.run
        if run is None:
            return ()
        ends = run.end == run.layer.size
        return run.kind is Kind.ZERO, run.present, run.compressed, run.host_offset is None, ends


def first_difference(one: bytearray, other: memoryview, length: int) -> int | None:
    """Where ``one`` and ``other`` first differ within ``length``, to the sector; None: nowhere."""
    if one.startswith(other[:length]):
        return None
    start, end = 0, length
    while end - start > SECTOR:
        middle = align_down((start + end + SECTOR) // 2, SECTOR)
        if one.startswith(other[start:middle], start):
            start = middle
        else:
            end = middle
    return start
