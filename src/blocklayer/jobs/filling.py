"""Filling a chunk's buffer: read, told apart from zeros, compressed; the bulk of it in a thread.

1. One visit to a thread does all of a chunk.
2. Only whole units, or the disk's tail, are compressed.
"""

from __future__ import annotations

from collections.abc import Callable

from blocklayer.jobs.plan import Chunk, Segment, data_ranges
from blocklayer.jobs.reading import Load, Reader
from blocklayer.jobs.threads import Threads
from blocklayer.jobs.writing import spans

Pack = Callable[[memoryview], bytes | None]


class Filler:
    """Fills chunks for a target of ``size`` bytes that takes units of ``unit`` bytes.

    ``pack`` compresses a unit, if ``wants_packed`` says so of its offset; None: nothing is.
    """

    def __init__(
        self,
        reader: Reader,
        loaders: Threads,
        *,
        size: int,
        unit: int,
        sparse_size: int,
        pack: Pack | None = None,
        wants_packed: Callable[[int], bool] = lambda offset: True,
    ) -> None:
        self._reader = reader
        self._loaders = loaders
        self._size = size
        self._unit = unit
        self._sparse_size = sparse_size
        self._pack = pack
        self._wants_packed = wants_packed

    async def fill(self, chunk: Chunk, buffer: memoryview) -> None:
        """Fill ``buffer`` with the chunk's segments, find their data, and pack that."""
        loads = await self._reader.prepare(chunk.placed(), buffer)
        if chunk.segments:
            await self._loaders.run(self._fill, chunk, loads, buffer)

    def _fill(self, chunk: Chunk, loads: list[Load], buffer: memoryview) -> None:
        self._reader.fill(loads, buffer)
        for segment in chunk.segments:
            view = segment.view(buffer)
            segment.data = [
                (segment.offset + start, segment.offset + end)
                for start, end in data_ranges(view, self._sparse_size)
            ]
            if self._pack is not None:
                segment.packed = self._packed(self._pack, segment, view)

    def _packed(self, pack: Pack, segment: Segment, view: memoryview) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for start, end in spans(segment, self._unit):
            for offset in range(start, end, self._unit):
                stop = min(offset + self._unit, end)
                whole = offset % self._unit == 0 and (
                    stop - offset == self._unit or stop == self._size
                )
                if not whole or not self._wants_packed(offset):
                    continue
                at = offset - segment.offset
                packed = pack(view[at : at + (stop - offset)])
                if packed is not None:
                    found[offset] = packed
        return found
