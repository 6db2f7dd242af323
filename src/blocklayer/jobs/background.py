"""Bringing everything that a bitmap calls dirty to a job's target, while others write on.

1. A range is clean from the moment before it is read: what is written meanwhile makes it dirty
   again, and it will be copied again.
2. No byte is being copied twice at once, so no older copy can land on a newer one.
3. A range that could not be copied is dirty again before anybody is told.
"""

from __future__ import annotations

import asyncio
from typing import Final, Literal

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.root import requests
from blocklayer.jobs.copying import CHUNK_SIZE
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.ranges import RangeCopier, ReadError
from blocklayer.jobs.threads import crew

RETRY_S: Final = 0.1
"""How long a failed range is left alone when errors are ignored."""


class Policies(msgspec.Struct, frozen=True):
    """What a failed request does to the job."""

    on_source_error: OnError = "report"
    on_target_error: OnError = "report"


class Background:
    """Copies what is dirty in ``todo``, for ``job``."""

    def __init__(
        self,
        job: Job,
        ranges: RangeCopier,
        todo: DirtyBitmap,
        policies: Policies,
        *,
        max_chunk: int = CHUNK_SIZE,
    ) -> None:
        self.job = job
        self.ranges = ranges
        self.todo = todo
        self.policies = policies
        self.max_chunk = max_chunk
        self._cursor = 0
        self._in_flight = 0

    @property
    def behind(self) -> int:
        """Bytes still to be copied, but for what is being copied just now."""
        return min(self.todo.count, self.todo.size)

    async def catch_up(self) -> None:
        """Copy until nothing is dirty. Guests may write on: then it takes until they pause."""
        while self.todo.count:
            await crew(self.ranges.workers, self._work)
            if self.todo.count:
                # What is left is in somebody else's hands.
                await self.ranges.until_others_end()

    async def finish(self) -> None:
        """Copy the rest, with both ends drained."""
        while (found := self._next()) is not None:
            await self._copy(*found)

    async def _work(self) -> None:
        while self.todo.count:
            async with self.job.step(), requests(self.ranges.source, self.ranges.target):
                found = self._next()
                if found is None:
                    # The others are at the rest of it.
                    return
                failure = await self._try(*found)
            if failure is not None:
                await asyncio.sleep(RETRY_S)

    def _next(self) -> tuple[int, int] | None:
        """A dirty range that nobody works at: the first from the cursor on."""
        for start in (self._cursor, 0):
            for offset, length in self.todo.runs(start):
                length = min(length, self._chunk_size(offset))
                if self.ranges.is_free(offset, length):
                    self._cursor = offset + length
                    return offset, length
            if not self._cursor:
                break
        return None

    def _chunk_size(self, offset: int) -> int:
        """How much to take at once: up to a whole number of chunks, so that units stay whole."""
        size = self.job.pace.portion(self.max_chunk)
        return max(size, self.todo.granularity) - offset % self.todo.granularity

    async def _try(self, offset: int, length: int) -> BlockError | None:
        """Copy a range; an error that the policy lets pass is the answer."""
        try:
            await self._copy(offset, length)
        except BlockError as error:
            reading = isinstance(error, ReadError)
            policy = self.policies.on_source_error if reading else self.policies.on_target_error
            operation: Literal["read", "write"] = "read" if reading else "write"
            if self.job.judge(policy, operation, error) == "report":
                raise
            return error
        return None

    async def _copy(self, offset: int, length: int) -> None:
        async with self.ranges.claim(offset, length):
            self.todo.reset_dirty(offset, length)
            self._in_flight += length
            try:
                await self.ranges.copy(offset, length)
            except BaseException:
                self.todo.set_dirty(offset, length)
                raise
            finally:
                self._in_flight -= length
        self.job.done += length
        self.update_total()
        self.job.pace.charge(length)

    def update_total(self) -> None:
        """The job's total: what is done, being done and still to do."""
        self.job.total = self.job.done + self._in_flight + self.behind
