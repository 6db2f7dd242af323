"""Jobs: long work with a name, that can be watched, paused, slowed, cancelled and completed.

1. Status changes and verbs follow the tables in ``jobs.states``; a verb that is not taken changes
   nothing (R7).
2. A job does its work in ``run``. Then come, for all jobs of its group together, ``prepare``, which
   may fail, and ``commit``, which may not; or, if any of them failed or was cancelled, ``abort``
   for each. ``clean`` follows in every case, once.
3. Between two ``steps`` a job can be paused, slowed down and cancelled. When it is paused no step
   is in progress. A cancelled ``run`` meets ``asyncio.CancelledError`` and ends as soon as it can.
4. Events come in the order of QEMU's.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import events
from blocklayer.jobs.pace import Pace
from blocklayer.jobs.states import FOLLOWS, TAKES, Status

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.jobs.group import Group

OnError = Literal["report", "ignore", "enospc", "stop", "auto"]


class Job(ABC):
    """One job. Subclasses say what it does; ``jobs.group.start`` sets it going."""

    TYPE: ClassVar[events.JobType]
    is_block_job: ClassVar[bool] = True
    """Listed by ``query-block-jobs``, and sends the ``BLOCK_JOB_…`` events."""

    def __init__(
        self,
        graph: Graph,
        identifier: str,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        self.graph = graph
        self.id = identifier
        self.status = Status.UNDEFINED
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.pace = Pace(speed)
        self.done = 0
        """Bytes (or what else the job counts) that are finished."""
        self.total = 0
        self.error: BlockError | None = None
        self.cancelled = False
        """Given up: nothing of it is to take effect."""
        self.io_status: Literal["ok", "failed", "nospace"] = "ok"
        self.paused_by_user = False
        self.ended = asyncio.Event()
        """Set once the job is concluded and its part of the graph is given back."""
        self.group: Group
        self._pauses = 0
        self._steps = 0
        self._going = asyncio.Event()
        self._going.set()
        self._told: asyncio.Event = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    @abstractmethod
    async def run(self) -> None:
        """Do the work; whatever it raises fails the job."""

    async def prepare(self) -> None:
        """The last part that may fail; what it changed, ``abort`` takes back."""

    async def commit(self) -> None:
        """Let the result take effect."""

    async def abort(self) -> None:
        """The job has failed or was cancelled: leave things as they were."""

    async def clean(self) -> None:
        """Give back what the job holds of the graph."""

    @property
    def paused(self) -> bool:
        """Asked to pause, whether it stands still already or not."""
        return self._pauses > 0

    @property
    def ready(self) -> bool:
        """Has caught up, and waits to be completed."""
        return self.status in (Status.READY, Status.STANDBY)

    @property
    def busy(self) -> bool:
        """At work just now."""
        return self.status is Status.RUNNING or self._steps > 0

    def move(self, status: Status) -> None:
        """Enter ``status``, and tell."""
        assert status in FOLLOWS[self.status], f"{self.id}: {self.status} to {status}"
        self.status = status
        self.graph.notify(events.JobStatusChange(id=self.id, status=status.value))

    def check_verb(self, verb: str) -> None:
        """Raise UsageError unless ``verb`` is taken now."""
        if self.status not in TAKES[verb]:
            raise UsageError(
                f"Job '{self.id}' in state '{self.status.value}' cannot accept command verb "
                f"'{verb}'"
            )

    def pause(self) -> None:
        """The user's pause: stop after the steps in progress, until ``resume``."""
        self.check_verb("pause")
        if self.paused_by_user:
            raise UsageError("Job is already paused")
        self.paused_by_user = True
        self.hold()

    def resume(self) -> None:
        """Undo ``pause``; requests that had stopped the job with an error are tried again."""
        if not self.paused_by_user:
            raise UsageError("Can't resume a job that was not paused")
        self.check_verb("resume")
        self.paused_by_user = False
        self.io_status = "ok"
        self.release()

    def hold(self) -> None:
        """Let no step begin; nests with ``release``."""
        self._pauses += 1
        self._going.clear()
        self._stand_still()

    def release(self) -> None:
        """Undo one ``hold``."""
        self._pauses -= 1
        if not self._pauses:
            if self.status is Status.PAUSED:
                self.move(Status.RUNNING)
            elif self.status is Status.STANDBY:
                self.move(Status.READY)
            self._going.set()

    def _stand_still(self) -> None:
        """Show that the job is paused, once no step is in progress."""
        if self._steps or not self._pauses:
            return
        if self.status is Status.RUNNING:
            self.move(Status.PAUSED)
        elif self.status is Status.READY:
            self.move(Status.STANDBY)

    def set_speed(self, bytes_per_s: int) -> None:
        """Limit the job; 0: no limit."""
        self.check_verb("set-speed")
        if bytes_per_s < 0:
            raise UsageError("Parameter 'speed' expects a non-negative value")
        self.pace.set(bytes_per_s)

    @asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """One piece of the work: waits while the job is paused or was too fast (``pace.charge``).
        What is inside the block is not interrupted by a pause.
        """
        await self.pace.wait()
        while self._pauses:
            self._stand_still()
            await self._going.wait()
        self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1
            self._stand_still()

    def become_ready(self) -> None:
        """The job has caught up."""
        if self.status is Status.PAUSED:
            # Paused at the very end: it is ready, and stands by.
            self.move(Status.RUNNING)
        self.move(Status.READY)
        self.tell(events.BlockJobReady)
        self._stand_still()

    @property
    def told_to_complete(self) -> bool:
        """Whether ``complete`` was called."""
        return self._told.is_set()

    async def until_told(self) -> None:
        """Wait for ``complete``."""
        await self._told.wait()

    def complete(self) -> None:
        """A ready job is to end, with its full effect."""
        self.check_verb("complete")
        if self.cancelled:
            raise UsageError(f"The active block job '{self.id}' cannot be completed")
        self._told.set()

    def cancel(self, *, force: bool = True) -> None:
        """Give the job up; it ends in its own time (``ended``).

        Without ``force`` a job that can end early with a result of its own may do so.
        """
        self.check_verb("cancel")
        if not force and self.cancel_softly():
            return
        self.group.fail(self)

    def cancel_softly(self) -> bool:
        """End early with what there is; False if that would be worth nothing."""
        return False

    def give_up(self) -> None:
        """Mark as cancelled, and stop the work if it is still going on."""
        self.cancelled = True
        if self._work is not None:
            self._work.cancel()

    def fail_with(self, error: BlockError) -> None:
        """Something that happened outside ``run`` fails the job."""
        self.error = self.error or error
        if self._work is not None:
            self._work.cancel()
        else:
            self.group.fail(self)

    async def finalize(self) -> None:
        """Let a pending job, and its group, take effect; returns when they have."""
        self.check_verb("finalize")
        await self.group.finalize()

    def dismiss(self) -> None:
        """Forget a concluded job."""
        self.check_verb("dismiss")
        self.move(Status.NULL)
        self.group.jobs_of_all.remove(self)

    def judge(
        self, policy: OnError, operation: Literal["read", "write"], error: BlockError
    ) -> Literal["ignore", "report", "stop"]:
        """What ``policy`` makes of ``error``: told to all, and with "stop" the job is paused."""
        no_space = error.errno == errno.ENOSPC
        if policy in ("enospc", "auto"):
            policy = "stop" if no_space else "report"
        action: Literal["ignore", "report", "stop"] = policy  # type: ignore[assignment]
        self.graph.notify(events.BlockJobError(device=self.id, operation=operation, action=action))
        if action == "stop":
            if self.io_status == "ok":
                self.io_status = "nospace" if no_space else "failed"
            if not self.paused_by_user:
                self.paused_by_user = True
                self.hold()
        return action

    def tell(self, event: type[events.BlockJobEvent]) -> None:
        """Send one of the block job's events, with the numbers of now."""
        if not self.is_block_job:
            return
        extra: dict[str, str] = {}
        if event is events.BlockJobCompleted and self.error is not None:
            extra["error"] = str(self.error)
        self.graph.notify(
            event(
                type=self.TYPE, device=self.id, len=self.total, offset=self.done,
                speed=self.pace.bytes_per_s, **extra,
            )
        )  # fmt: skip

    async def work(self) -> None:
        """Carry ``run`` out; notes how it ended, and raises nothing."""
        if self.cancelled:
            return
        self._work = asyncio.ensure_future(self.run())
        try:
            await self._work
        except asyncio.CancelledError:
            self.cancelled = True
        except BlockError as error:
            self.error = error
        except OSError as error:
            # What the system refused outside any driver is an error like any other.
            self.error = BlockError(str(error))
            self.error.errno = error.errno or errno.EIO
        finally:
            self._work = None


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which goes on to its end even if the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        task.result()
        raise
