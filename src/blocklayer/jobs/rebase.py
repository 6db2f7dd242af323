"""Rebase: an overlay gets another backing file, and reads as before.

1. Where the overlay itself holds nothing, what it showed of the old backing file is written into
   it, as far as the new backing file shows something else.
2. Data first, header last: until the header changes, the overlay reads the same over the old
   backing file, whatever was written so far.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec

from blocklayer.graph.driver import BackingReference, FormatDriver
from blocklayer.graph.extent import Kind
from blocklayer.graph.root import Root
from blocklayer.jobs.copying import Copier, CopyOptions
from blocklayer.jobs.plan import Piece, SamePlace, pieces_of, side_by_side, source_runs
from blocklayer.jobs.reading import Load, Reader, new_buffer
from blocklayer.jobs.threads import Threads
from blocklayer.units import MIB, align_down, align_up

_WINDOW_SIZE = 1 * MIB
_PAIRS_A_WINDOW = 256


async def rebase(
    overlay: Root,
    old: Root | None,
    new: Root | None,
    options: CopyOptions,
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Make ``overlay`` read over ``new`` as it does over ``old``, its backing node; then flush it.

    None stands for no backing file. The answer is how many bytes were written.
    """
    driver = overlay.node.driver
    if isinstance(driver, FormatDriver) and not driver.holds_zeros:
        # What reads as zeros over no backing file would not hide the new one.
        options = msgspec.structs.replace(options, sparse_size=0)
    comparison = _Comparison(overlay, old, new, progress)
    copier = Copier(overlay, options)
    with Threads(1) as threads:
        await copier.copy(comparison.differing(threads))
    if options.compress:
        await overlay.write_compressed(0, b"")
    await overlay.flush()
    return copier.done


async def change_backing(overlay: Root, reference: BackingReference | None) -> None:
    """Write to the header of ``overlay`` what its backing file is, and flush it."""
    driver = overlay.node.driver
    assert isinstance(driver, FormatDriver)
    async with overlay.request():
        await driver.change_backing(reference)
    await overlay.flush()


class _Pair(msgspec.Struct):
    """What ``[start, end)`` of the overlay, where it holds nothing, reads as before and after."""

    at: int
    before: Piece
    after: Piece
    start: int
    end: int


class _Comparison:
    def __init__(
        self,
        overlay: Root,
        old: Root | None,
        new: Root | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._overlay, self._old, self._new = overlay, old, new
        self._progress = progress
        driver = overlay.node.driver
        self._unit = driver.allocation_unit if isinstance(driver, FormatDriver) else 1
        self._reader = Reader()
        self._memory = bytearray(_WINDOW_SIZE)
        self._buffers = (memoryview(self._memory), new_buffer(_WINDOW_SIZE))
        self._done = 0
        """Up to here, what differs has been yielded."""

    async def differing(self, threads: Threads) -> AsyncIterator[Piece]:
        """What must be written into the overlay, in whole units."""
        window: list[_Pair] = []
        filled = 0
        async for pair in self._pairs():
            while pair.before.length:
                if filled == _WINDOW_SIZE or len(window) == _PAIRS_A_WINDOW:
                    for piece in await self._settle(window, threads):
                        yield piece
                    window, filled = [], 0
                first = pair.before.offset
                cut = min(pair.before.end, first + _WINDOW_SIZE - filled)
                before, after = pair.before.cut(first, cut), pair.after.cut(first, cut)
                window.append(_Pair(filled, before, after, pair.start, pair.end))
                filled += cut - first
                pair.before = pair.before.cut(cut, pair.before.end)
                pair.after = pair.after.cut(cut, pair.after.end)
        for piece in await self._settle(window, threads):
            yield piece

    async def _pairs(self) -> AsyncIterator[_Pair]:
        size = self._overlay.node.size
        same_place = SamePlace()
        after = _zeros(size) if self._new is None else pieces_of(self._new, size)
        async for before, now in side_by_side(self._unheld(), after):
            if before.source is None and now.source is None:
                continue
            if before.run is not None and not same_place(before, now):
                run = before.run
                yield _Pair(0, before, now, run.offset, run.end)

    async def _unheld(self) -> AsyncIterator[Piece]:
        """What the overlay shows of its old backing file."""
        overlay = self._overlay
        async for run, _ in source_runs(overlay, 0, overlay.node.size):
            if run.depth == 0 and run.present:
                continue
            old = self._old
            if old is None or run.kind is Kind.ZERO:
                yield Piece(run.offset, run.length, None, 0, run)
            else:
                # The overlay's own mapping changes as it is written, its backing node's does not.
                generation = old.node.generation
                yield Piece(run.offset, run.length, old, run.offset, run, generation)

    async def _settle(self, window: list[_Pair], threads: Threads) -> list[Piece]:
        """Read and compare a window; the answer is what of it must be written."""
        if not window:
            return []
        loads = []
        for side, placed in enumerate(
            (
                [(pair.at, pair.before) for pair in window],
                [(pair.at, pair.after) for pair in window],
            )
        ):
            loads.append(await self._reader.prepare(placed, self._buffers[side]))

        found = await threads.run(self._read_and_compare, window, loads)
        if self._progress is not None:
            self._progress(window[-1].before.end)
        pieces: list[Piece] = []
        for start, end in found:
            pieces += self._pieces(max(start, self._done), end)
            self._done = max(self._done, end)
        return pieces

    def _read_and_compare(
        self, window: list[_Pair], loads: list[list[Load]]
    ) -> list[tuple[int, int]]:
        for side in (0, 1):
            self._reader.fill(loads[side], self._buffers[side])
        return [found for pair in window for found in self._differences(pair)]

    def _differences(self, pair: _Pair) -> list[tuple[int, int]]:
        """The units that meet ``pair`` and differ, cut to where the overlay holds nothing."""
        found: list[tuple[int, int]] = []
        offset = pair.before.offset
        while offset < pair.before.end:
            stop = min(align_down(offset, self._unit) + self._unit, pair.before.end)
            at = pair.at + (offset - pair.before.offset)
            last = at + (stop - offset)
            if not self._memory.startswith(self._buffers[1][at:last], at):
                start = max(align_down(offset, self._unit), pair.start)
                end = min(align_up(stop, self._unit), pair.end)
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, end))
            offset = stop
        return found

    def _pieces(self, start: int, end: int) -> list[Piece]:
        """Pieces for ``[start, end)`` of the old backing file, zeros past its end."""
        size = 0 if self._old is None else self._old.node.size
        middle = min(max(size, start), end)
        pieces = []
        if start < middle:
            pieces.append(Piece(start, middle - start, self._old, start))
        if middle < end:
            pieces.append(Piece(middle, end - middle))
        return pieces


async def _zeros(size: int) -> AsyncIterator[Piece]:
    if size:
        yield Piece(0, size)
