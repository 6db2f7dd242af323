"""Jobs: legal moves only, events in order, groups that share their fate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError, StorageError, UsageError
from blocklayer.graph.events import Event, JobStatusChange
from blocklayer.graph.graph import Graph
from blocklayer.jobs.group import Group, Jobs
from blocklayer.jobs.job import Job
from blocklayer.jobs.states import TAKES, Status


class Steps(Job):
    """Works through steps that the test lets go one by one."""

    TYPE = "stream"

    def __init__(self, graph: Graph, identifier: str, **options: bool | int) -> None:
        super().__init__(graph, identifier, **options)  # type: ignore[arg-type]
        self.gate = asyncio.Semaphore(0)
        self.count = 3
        self.fails_at: int | None = None
        self.fails_to_prepare = False
        self.goes_ready = False
        self.parts: list[str] = []

    async def run(self) -> None:
        self.total = self.count
        for number in range(self.count):
            async with self.step():
                await self.gate.acquire()
                if number == self.fails_at:
                    raise StorageError("it broke", 5)
                self.done += 1
        if self.goes_ready:
            self.become_ready()
            await self.until_told()

    async def prepare(self) -> None:
        self.parts.append("prepare")
        if self.fails_to_prepare:
            raise StorageError("it broke late", 5)

    async def commit(self) -> None:
        self.parts.append("commit")

    async def abort(self) -> None:
        self.parts.append("abort")

    async def clean(self) -> None:
        self.parts.append("clean")

    def go(self, steps: int = 100) -> None:
        """Let ``steps`` happen."""
        for _ in range(steps):
            self.gate.release()


class Stage:
    """A graph, its jobs, and what was heard."""

    def __init__(self) -> None:
        self.graph = Graph(REGISTRY)
        self.jobs = Jobs()
        self.heard: list[str] = []
        self.graph.listeners.append(self._hear)

    def _hear(self, event: Event) -> None:
        if isinstance(event, JobStatusChange):
            self.heard.append(event.status)
        else:
            self.heard.append(event.NAME)

    def job(self, identifier: str = "j", **options: bool | int) -> Steps:
        """A new job in a group of its own, not started."""
        return self.group(Steps(self.graph, self.jobs.check_id(identifier), **options))

    def group(self, *jobs: Steps) -> Steps:
        """Put jobs into one group."""
        group = Group(self.jobs)
        for job in jobs:
            group.add(job)
        return jobs[0]


def played(play: Callable[[Stage], Awaitable[None]]) -> list[str]:
    """What is heard during ``play``."""

    async def main() -> list[str]:
        stage = Stage()
        await play(stage)
        return stage.heard

    return asyncio.run(main())


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_job_that_succeeds() -> None:
    async def play(stage: Stage) -> None:
        job = stage.job()
        job.group.start()
        job.go()
        await job.ended.wait()
        assert job.parts == ["prepare", "commit", "clean"]
        assert stage.jobs.find("j") is None

    assert played(play) == [
        "created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip


def test_a_job_that_is_ready_pauses_and_completes() -> None:
    async def play(stage: Stage) -> None:
        job = stage.job()
        job.goes_ready = True
        job.group.start()
        with pytest.raises(UsageError, match="in state 'running' cannot accept command verb 'comp"):
            job.complete()
        job.go()
        await settle()
        job.pause()
        with pytest.raises(UsageError, match="already paused"):
            job.pause()
        job.resume()
        job.complete()
        await job.ended.wait()

    assert played(play) == [
        "created", "running", "ready", "BLOCK_JOB_READY", "standby", "ready", "waiting", "pending",
        "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip


def test_a_pause_takes_hold_between_steps() -> None:
    async def play(stage: Stage) -> None:
        job = stage.job()
        job.group.start()
        await settle()
        job.pause()
        assert (job.status, job.paused) == (Status.RUNNING, True)
        job.go(1)
        await settle()
        assert (job.status, job.done) == (Status.PAUSED, 1)
        job.go()
        await settle()
        assert job.done == 1
        job.resume()
        await job.ended.wait()

    assert played(play)[2:5] == ["paused", "running", "waiting"]


def test_by_hand() -> None:
    async def play(stage: Stage) -> None:
        job = stage.job(auto_finalize=False, auto_dismiss=False)
        job.group.start()
        job.go()
        await settle()
        assert job.parts == []
        await job.finalize()
        assert job.status is Status.CONCLUDED
        job.dismiss()
        with pytest.raises(UsageError, match="in state 'null'"):
            job.dismiss()

    assert played(play)[3:] == [
        "pending", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED", "concluded", "null",
    ]  # fmt: skip


@pytest.mark.parametrize("paused", [False, True])
def test_cancelled(paused: bool) -> None:
    async def play(stage: Stage) -> None:
        job = stage.job(auto_dismiss=False)
        job.group.start()
        job.go(1)
        await settle()
        if paused:
            job.pause()
            job.go(1)
            await settle()
            assert job.status is Status.PAUSED
        job.cancel()
        await job.ended.wait()
        assert job.parts == ["abort", "clean"]
        assert str(job.error) == "Operation canceled"

    heard = [word for word in played(play) if word != "paused"]
    assert heard == [
        "created", "running", *["running"] * paused, "aborting", "BLOCK_JOB_CANCELLED", "concluded",
    ]  # fmt: skip


@pytest.mark.parametrize("late", [False, True])
def test_failed(late: bool) -> None:
    async def play(stage: Stage) -> None:
        job = stage.job(auto_dismiss=False)
        job.fails_at, job.fails_to_prepare = (None, True) if late else (1, False)
        job.group.start()
        job.go()
        await job.ended.wait()
        assert "commit" not in job.parts
        assert job.parts[-2:] == ["abort", "clean"]
        assert isinstance(job.error, BlockError)

    assert played(play)[-3:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded"]


def test_a_group_shares_its_fate() -> None:
    async def play(stage: Stage) -> None:
        one, two = Steps(stage.graph, "one"), Steps(stage.graph, "two")
        stage.group(one, two)
        one.group.start()
        one.go()
        await settle()
        assert one.status is Status.WAITING
        two.go(1)
        two.fails_at = 1
        two.go()
        await two.ended.wait()
        await one.ended.wait()
        assert one.parts == two.parts == ["abort", "clean"]
        assert str(one.error) == "Operation canceled"
        assert str(two.error) == "it broke"

    played(play)


def test_a_group_pending_by_hand_is_finalized_as_one() -> None:
    async def play(stage: Stage) -> None:
        one = Steps(stage.graph, "one", auto_finalize=False)
        two = Steps(stage.graph, "two")
        stage.group(one, two)
        one.group.start()
        one.go()
        await settle()
        two.go()
        await settle()
        assert (one.status, two.status) == (Status.PENDING, Status.PENDING)
        await two.finalize()
        assert one.parts == two.parts == ["prepare", "commit", "clean"]

    played(play)


def test_ids() -> None:
    async def play(stage: Stage) -> None:
        stage.job("a")
        with pytest.raises(UsageError, match="already in use"):
            stage.job("a")
        with pytest.raises(UsageError, match="Invalid job ID '9'"):
            stage.job("9")

    played(play)


VERBS = sorted(TAKES)


@given(st.lists(st.one_of(st.sampled_from(VERBS), st.just("go"), st.just("settle"))), st.booleans())
def test_any_sequence_of_verbs_makes_legal_moves_only(verbs: list[str], ready: bool) -> None:
    async def play(stage: Stage) -> None:
        job = stage.job(auto_finalize=False, auto_dismiss=False)
        job.goes_ready = ready
        job.group.start()
        for verb in verbs:
            legal = verb in TAKES and job.status in TAKES[verb]
            before = job.status
            try:
                match verb:
                    case "go":
                        job.go(1)
                    case "settle":
                        await settle()
                    case "set-speed":
                        job.set_speed(10**9)
                    case "finalize":
                        await job.finalize()
                    case "change":
                        job.check_verb("change")
                    case _:
                        getattr(job, verb)()
            except UsageError:
                assert not legal or verb in ("pause", "resume", "complete")
                assert job.status is before
        if job.status is not Status.NULL:
            await stage.jobs.cancel_all()
        assert job.parts[-1] == "clean"
        assert job.parts.count("clean") == 1
        assert ("commit" in job.parts) != ("abort" in job.parts)

    played(play)
