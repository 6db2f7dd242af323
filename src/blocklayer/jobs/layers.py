"""Copying what layers of a chain hold into another layer of it, once over the whole disk.

1. What is wanted of a range is found out when its turn has come, under a claim that keeps writers
   away until it is copied; so nothing that a guest wrote is ever covered by something older.
2. Nobody writes to the layers that are copied from: where their bytes are, they stay.
3. Ranges begin and end on the target's allocation unit: no two workers meet in one.
4. Nothing waits for a drained section to end while one waits for it: steps are short.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Literal

from blocklayer.errors import BlockError
from blocklayer.graph import resolve
from blocklayer.graph.extent import Run
from blocklayer.graph.root import Root, requests
from blocklayer.jobs.background import RETRY_S
from blocklayer.jobs.copying import CHUNK_SIZE
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.plan import FIXED, Piece, piece_of
from blocklayer.jobs.ranges import RangeCopier, ReadError, as_kind
from blocklayer.jobs.threads import crew
from blocklayer.units import align_down

_RUNS_A_STEP: Final = 64
"""How many runs to look at before others get their turn."""

Wanted = Callable[[Run], bool]


class LayerCopier(RangeCopier):
    """Copies of ``source`` the runs that ``wanted`` says; layers hold them that nobody writes."""

    def __init__(self, source: Root, target: Root, wanted: Wanted, **options: Any) -> None:
        super().__init__(source, target, **options)
        self.wanted = wanted

    async def pieces(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """What is wanted of the range."""
        try:
            async for run in resolve.runs(self.source.node, offset, length):
                if self.wanted(run):
                    yield piece_of(run, FIXED, self.source)
        except BlockError as error:
            raise as_kind(ReadError, error) from error


class Sweep:
    """One pass over a disk, for ``job``, several ranges at a time.

    ``tries_again`` says what becomes of a range whose error is ignored: it is tried again, or given
    up, and the pass fails in the end.
    """

    def __init__(
        self, job: Job, copier: LayerCopier, on_error: OnError, *, tries_again: bool
    ) -> None:
        self.job = job
        self.copier = copier
        self._on_error = on_error
        self._tries_again = tries_again
        self._cursor = 0
        self._planning = asyncio.Lock()
        self._failure: BlockError | None = None

    async def run(self) -> None:
        """Copy all that is wanted. Raises ReadError or WriteError."""
        self.job.total = self.copier.source.node.size
        await crew(self.copier.workers, self._work)
        if self._failure is not None:
            raise self._failure

    async def _work(self) -> None:
        found: tuple[int, int] | None = None
        while True:
            failure = None
            async with self.job.step(), requests(self.copier.source, self.copier.target):
                found = found or await self._next()
                if found is None:
                    return
                if found[1]:
                    failure = await self._try(*found)
            if failure is None:
                found = None
            elif self._tries_again or self.job.paused:
                await asyncio.sleep(RETRY_S)
            else:
                self._failure = self._failure or failure
                found = None
            # Looking at layers that hold little may not wait for anything.
            await asyncio.sleep(0)

    async def _next(self) -> tuple[int, int] | None:
        """The next range with something wanted: its offset and length, 0 where none is in sight.

        None at the end of the disk.
        """
        copier, node = self.copier, self.copier.source.node
        async with self._planning:
            size, begin = node.size, self._cursor
            offset = begin
            for _ in range(_RUNS_A_STEP):
                if offset >= size:
                    break
                try:
                    run = await resolve.status(node, offset, size - offset)
                except BlockError:
                    # Whoever copies it meets the error, and knows what to do about it.
                    return self._take(begin, offset, offset + copier.unit)
                if copier.wanted(run):
                    end = offset + self.job.pace.portion(CHUNK_SIZE)
                    return self._take(begin, offset, end)
                offset = run.end
            self._skip(begin, offset)
            return None if offset >= size else (offset, 0)

    def _take(self, begin: int, offset: int, end: int) -> tuple[int, int]:
        start = max(align_down(offset, self.copier.unit), begin)
        self._skip(begin, start)
        stop = max(align_down(end, self.copier.unit), align_down(start, self.copier.unit))
        stop = stop if stop > start else start + self.copier.unit - start % self.copier.unit
        self._cursor = min(stop, self.copier.source.node.size)
        return start, self._cursor - start

    def _skip(self, begin: int, end: int) -> None:
        self._cursor = end
        self.job.done += end - begin

    async def _try(self, offset: int, length: int) -> BlockError | None:
        """Copy a range; an error that the policy lets pass is the answer."""
        try:
            async with self.copier.claim(offset, length):
                await self.copier.copy(offset, length)
        except BlockError as error:
            operation: Literal["read", "write"] = (
                "read" if isinstance(error, ReadError) else "write"
            )
            if self.job.judge(self._on_error, operation, error) == "report":
                raise
            return error
        self.job.done += length
        self.job.pace.charge(length)
        return None
