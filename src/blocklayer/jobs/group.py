"""Groups: jobs that take effect together or not at all. A job on its own is a group of one.

1. When the work of all jobs is done they wait, then are pending, all at once. Unless one of them
   asks to be finalized by hand, they are finalized there and then.
2. When one fails or is cancelled, the others are cancelled; ``abort`` runs for each, after the work
   of all of them has ended.
3. Nothing here raises into the loop: what failed a job is its ``error``.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator

from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import events
from blocklayer.graph.graph import is_well_formed_id
from blocklayer.jobs.job import Job
from blocklayer.jobs.states import Status


class Jobs:
    """All jobs by id, in the order in which they began."""

    def __init__(self) -> None:
        self._by_id: dict[str, Job] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._by_id.values()))

    def find(self, identifier: str) -> Job | None:
        """The job of that id."""
        return self._by_id.get(identifier)

    def check_id(self, identifier: str) -> str:
        """``identifier`` if a new job may have it. Raises UsageError."""
        if not is_well_formed_id(identifier):
            raise UsageError(f"Invalid job ID '{identifier}'")
        if identifier in self._by_id:
            raise UsageError(f"Job ID '{identifier}' already in use")
        return identifier

    def enter(self, job: Job) -> None:
        """A new job; its id was checked."""
        self._by_id[job.id] = job

    def remove(self, job: Job) -> None:
        """Forget a job that is over."""
        self._by_id.pop(job.id, None)

    async def cancel_all(self) -> None:
        """Cancel what can be cancelled, and wait until no job is at work."""
        for job in self:
            if job.status not in (Status.CONCLUDED, Status.NULL, Status.ABORTING):
                job.cancel()
        for job in self:
            if job.status is not Status.NULL:
                await job.ended.wait()


class Group:
    """Jobs that share their fate."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs_of_all = jobs
        self.jobs: list[Job] = []
        self._at_work: set[Job] = set()
        self._failed = False
        self._decided = False
        """Results are taking effect: it is too late to fail."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Task[None] | None = None

    def add(self, job: Job) -> None:
        """Enter a new job; it does not begin yet."""
        job.group = self
        self.jobs.append(job)
        self.jobs_of_all.enter(job)
        job.move(Status.CREATED)

    def start(self) -> None:
        """Let all jobs begin."""
        for job in self.jobs:
            self._at_work.add(job)
            job.move(Status.RUNNING)
            self._spawn(job)

    def _spawn(self, job: Job) -> None:
        task = asyncio.create_task(self._live(job), name=f"job {job.id}")
        # The loop keeps no hold of its own on tasks.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def discard(self) -> None:
        """The jobs do not come to begin: give back what they hold."""
        for job in list(self.jobs):
            await _quietly(job.abort, job)
            await _quietly(job.clean, job)
            self.withdraw(job)

    def withdraw(self, job: Job) -> None:
        """``job``, which has given back what it held, does not come to begin."""
        self.jobs.remove(job)
        job.move(Status.NULL)
        self.jobs_of_all.remove(job)
        job.ended.set()

    async def _live(self, job: Job) -> None:
        await job.work()
        self._at_work.discard(job)
        if job.error is not None or job.cancelled or self._failed:
            self.fail(job)
            return
        _stand_up(job)
        job.move(Status.WAITING)
        if all(other.status is Status.WAITING for other in self.jobs):
            self._become_pending()

    def _become_pending(self) -> None:
        by_hand = False
        for job in self.jobs:
            job.move(Status.PENDING)
            if not job.auto_finalize:
                by_hand = True
                if job.is_block_job:
                    job.graph.notify(events.BlockJobPending(type=job.TYPE, id=job.id))
        if not by_hand:
            self._end(self._take_effect())

    def fail(self, cause: Job) -> None:
        """``cause`` has failed or is cancelled: so are the others."""
        if self._decided:
            return
        if cause.error is None:
            cause.give_up()
        self._failed = True
        for job in self.jobs:
            if job is not cause:
                job.give_up()
        if not self._at_work:
            self._end(self._take_back())

    async def finalize(self) -> None:
        """Let the pending jobs take effect, and wait until they have."""
        self._end(self._take_effect())
        assert self._ending is not None
        await asyncio.shield(self._ending)

    def _end(self, ending: object) -> None:
        assert asyncio.iscoroutine(ending)
        if self._ending is not None:
            ending.close()
            return
        self._ending = asyncio.create_task(ending)

    async def _take_effect(self) -> None:
        for job in self.jobs:
            try:
                await job.prepare()
            except BlockError as error:
                job.error = error
                self._failed = True
            if self._failed:
                for other in self.jobs:
                    other.cancelled = other.cancelled or other.error is None
                await self._take_back()
                return
        self._decided = True
        for job in self.jobs:
            await _quietly(job.commit, job)
        for job in self.jobs:
            await self._conclude(job)

    async def _take_back(self) -> None:
        for job in self.jobs:
            _stand_up(job)
            job.move(Status.ABORTING)
        for job in self.jobs:
            await _quietly(job.abort, job)
        for job in self.jobs:
            await self._conclude(job)

    async def _conclude(self, job: Job) -> None:
        await _quietly(job.clean, job)
        cancelled = job.cancelled and job.error is None
        job.tell(events.BlockJobCancelled if cancelled else events.BlockJobCompleted)
        if cancelled:
            job.error = BlockError("Operation canceled")
            job.error.errno = errno.ECANCELED
        job.move(Status.CONCLUDED)
        if job.auto_dismiss:
            job.dismiss()
        job.ended.set()


def _stand_up(job: Job) -> None:
    """From a pause to where the status table goes on."""
    if job.status is Status.PAUSED:
        job.move(Status.RUNNING)
    elif job.status is Status.STANDBY:
        job.move(Status.READY)


async def _quietly(part: object, job: Job) -> None:
    """One of the parts that come after the decision: an error there is the job's error."""
    assert callable(part)
    try:
        await part()
    except BlockError as error:
        job.error = job.error or error
