"""Following a job: progress, waiting for its states, and calling it off.

1. The daemon is asked how far a job is; its events only say when to ask sooner. An event that is
   lost delays what is shown, and nothing else.
2. Whoever waits owns the job's end: it is dismissed here, and Ctrl-C or a timeout cancels it first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Annotated, Any, Final

from blocklayer.cli import console
from blocklayer.cli.common import ProgressStyle
from blocklayer.cli.live.verb import Verb, bandwidth
from blocklayer.cli.options import Option
from blocklayer.errors import BlockError, UsageError
from blocklayer.qmp.client import Client, CommandFailed

_POLL_S: Final = 0.2
CANCELLED: Final = "Operation canceled"
"""The error of a job that was called off, in the daemon's words."""
WAITING: Final = "Waiting"
"""The headline in help texts for options about waiting for the job."""


class JobFailed(BlockError):  # noqa: N818 - what happened
    """The job ended with an error."""


class TimedOut(BlockError):  # noqa: N818 - what happened
    """The job took longer than was allowed, and was cancelled."""


class Job:
    """A job of the daemon's that we started with ``auto-dismiss`` off. Use with ``async with``."""

    def __init__(self, client: Client, identifier: str) -> None:
        self._client = client
        self.id = identifier
        self._news = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._over = False
        self._finishing = False

    async def __aenter__(self) -> Job:
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Called off: cancel the job and wait until it has ended."""
        try:
            if kind is not None and not self._over:
                await self.cancel(force=True)
        finally:
            assert self._listener is not None
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)

    async def reaches(self, *states: str, told: Callable[[int, int], None]) -> str:
        """Wait until the job's status is one of ``states`` or it has ended; the status.

        A job that has ended is dismissed. Raises JobFailed with its error.
        """
        while True:
            self._news.clear()
            entry = await self._entry()
            told(entry["current-progress"], entry["total-progress"])
            if entry["status"] == "concluded":
                self._over = True
                await self._client.execute("job-dismiss", {"id": self.id})
                if "error" in entry:
                    raise JobFailed(f"job '{self.id}' failed: {entry['error']}")
                return "concluded"
            if entry["status"] in states:
                return str(entry["status"])
            await self._news_or_time()

    async def ends(self) -> None:
        """Wait until the job is over, finalizing it where that is asked for. Raises JobFailed.

        A job that was cancelled, or that dismisses itself, is over without an error.
        """
        while True:
            self._news.clear()
            entry = await self._find()
            status = None if entry is None else entry["status"]
            if status == "pending":
                await self.finalize()
                continue
            if entry is None or status == "null":
                return
            if status == "concluded":
                await self._client.execute("job-dismiss", {"id": self.id})
                if "error" in entry and entry["error"] != CANCELLED:
                    raise JobFailed(f"job '{self.id}' failed: {entry['error']}")
                return
            await self._news_or_time()

    async def complete(self) -> None:
        """Let a ready job pivot."""
        await self._client.execute("job-complete", {"id": self.id})

    async def finalize(self) -> None:
        """Let a pending job take effect."""
        await self._client.execute("job-finalize", {"id": self.id})

    async def stop(self) -> None:
        """Let a ready job end without pivot: its target is a copy of this moment."""
        await self._client.execute("block-job-cancel", {"device": self.id})

    async def cancel(self, *, force: bool) -> None:
        """End the job whatever it is at, and wait until it is gone."""
        try:
            await self._client.execute("block-job-cancel", {"device": self.id, "force": force})
            await self.reaches(told=_nobody)
        except (CommandFailed, JobFailed):
            # It had ended by itself, or its error is that it was cancelled.
            pass

    async def drop(self) -> None:
        """Have the job cancelled, and leave it to end by itself."""
        self._over = True
        await self._client.execute("block-job-cancel", {"device": self.id, "force": True})

    def keep(self) -> None:
        """Leave the job as it is: it is the user's from now on."""
        self._over = True

    async def _find(self) -> dict[str, Any] | None:
        for entry in await self._client.execute("query-jobs"):
            if entry["id"] == self.id:
                return dict(entry)
        return None

    async def _entry(self) -> dict[str, Any]:
        entry = await self._find()
        if entry is None:
            self._over = True
            raise JobFailed(f"job '{self.id}' has gone; somebody else dismissed it")
        return entry

    async def _news_or_time(self) -> None:
        """Wait for an event of a job, but not for long."""
        try:
            await asyncio.wait_for(self._news.wait(), _POLL_S)
        except TimeoutError:
            pass

    async def _listen(self) -> None:
        async for event in self._client.events():
            if event["event"].startswith(("JOB_", "BLOCK_JOB_")):
                self._news.set()


def _nobody(done: int, total: int) -> None:
    """Told how far a job is that nobody watches."""


class JobVerb(Verb, kw_only=True):
    """A verb that starts a job on a disk and may wait for its end."""

    bandwidth: Annotated[
        str | None,
        Option("move so much a second at most: MiB/s, or bytes with a suffix", value="RATE"),
    ] = None
    bytes: Annotated[bool, Option("a plain RATE is in bytes a second")] = False
    wait: Annotated[bool, Option("wait until the job has ended", group=WAITING)] = False
    progress: ProgressStyle = None
    verbose: Annotated[bool, Option("with --wait: show progress", group=WAITING)] = False
    timeout: Annotated[
        str | None,
        Option("with --wait: cancel the job after so many seconds", value="S", group=WAITING),
    ] = None
    async_: Annotated[
        bool,
        Option("with --wait: do not wait until a cancelled job has ended", group=WAITING),
    ] = False

    @property
    def waits(self) -> bool:
        """Whether to wait for the end."""
        return self.wait or bool(self.verbose or self.progress or self.timeout)

    @property
    def speed(self) -> int:
        """The limit in bytes a second; 0 is none."""
        return bandwidth(self.bandwidth, self.bytes)

    @property
    def limit_s(self) -> float | None:
        """``--timeout`` in seconds. Raises UsageError."""
        if self.timeout is None:
            return None
        try:
            seconds = float(self.timeout)
        except ValueError:
            seconds = 0
        if not 0 < seconds < 1e9:
            raise UsageError(f"Invalid timeout '{self.timeout}': expected seconds, more than 0")
        return seconds

    @property
    def style(self) -> str | None:
        """How progress is shown: a bar where people look at it."""
        import sys

        if self.progress is not None:
            return self.progress
        seen = sys.stdout is not None and sys.stdout.isatty() and self.output == "human"
        return "bar" if self.verbose or seen else None

    async def followed(
        self, job: Job, work: Callable[[Callable[[int, int], None]], Coroutine[Any, Any, str]]
    ) -> str:
        """``work(told)`` under the progress bar and the time limit; what it answers."""
        with console.Progress(self.style, aside=self.output == "json") as progress:
            try:
                async with asyncio.timeout(self.limit_s):
                    return await work(progress.update)
            except TimeoutError:
                if self.async_:
                    await job.drop()
                raise TimedOut(
                    f"job '{job.id}' was cancelled: it took more than {self.timeout} s"
                ) from None

    def left_behind(self) -> str:
        return "the job was cancelled, the disk goes on as it was" if self.waits else ""


def job_id(kind: str, disk: str) -> str:
    """The id of a job of ours: ``commit-disk0``."""
    return f"{kind}-" + "".join(
        c if c.isascii() and (c.isalnum() or c in "-._") else "." for c in disk
    )
