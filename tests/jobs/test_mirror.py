"""Mirror and active commit beside a guest that writes: exact copies, and nothing lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blocklayer.drivers.host.fileio import FileIO
from blocklayer.errors import UsageError
from blocklayer.graph import edit
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.background import Policies
from blocklayer.jobs.mirror import MirrorOptions
from blocklayer.jobs.starting import start_active_commit, start_mirror
from blocklayer.jobs.states import Status
from jobs.live import READ_WRITE, SIZE, Guest, Stage, play


async def until_ready(job: object) -> None:
    while job.status not in (Status.READY, Status.CONCLUDED, Status.NULL):  # type: ignore[attr-defined]
        await asyncio.sleep(0)


READY = ["created", "running", "ready", "BLOCK_JOB_READY"]
DONE = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
@pytest.mark.parametrize("seed", range(4))
def test_pivot_beside_a_guest(tmp_path: Path, copy_mode: str, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        target = await stage.disk("target")
        guest.start()
        group = stage.group()
        job = await start_mirror(
            group, top, target, MirrorOptions(copy_mode=copy_mode), identifier="m"
        )
        group.start()
        await guest.at_least(20)
        await until_ready(job)
        await guest.at_least(20)
        job.complete()
        await job.ended.wait()
        assert job.error is None
        assert root.node is target
        await guest.at_least(20)
        await guest.stop()
        await guest.check()
        assert base.busy is top.busy is target.busy is None

    assert play(tmp_path, scene) == READY + DONE


@pytest.mark.parametrize("seed", range(4))
def test_a_soft_cancel_leaves_a_copy_of_the_moment(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        target = await stage.disk("target")
        guest.start()
        group = stage.group()
        job = await start_mirror(group, top, target, MirrorOptions(), identifier="m")
        group.start()
        await until_ready(job)
        await guest.at_least(10)
        await guest.stop()
        job.cancel(force=False)
        await job.ended.wait()
        assert root.node is top
        await guest.check(target)
        await guest.check()

    assert play(tmp_path, scene) == READY + DONE


@pytest.mark.parametrize("when", ["at once", "at work", "ready"])
def test_cancelled_at_any_time_the_guest_stays(tmp_path: Path, when: str) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 7, await root.read(0, SIZE))
        target = await stage.disk("target")
        guest.start()
        group = stage.group()
        job = await start_mirror(
            group, top, target, MirrorOptions(copy_mode="write-blocking"), identifier="m"
        )
        group.start()
        if when == "at work":
            await guest.at_least(3)
        elif when == "ready":
            await until_ready(job)
        job.cancel()
        await job.ended.wait()
        assert str(job.error) == "Operation canceled"
        assert root.node is top
        await guest.at_least(10)
        await guest.stop()
        await guest.check()

    heard = play(tmp_path, scene)
    assert heard[-4:] == ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


@pytest.mark.parametrize("seed", range(4))
def test_an_active_commit_moves_the_guest_to_its_base(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "middle", "top", seed=seed)
        # A guest that lets nobody else write, as a device does.
        root = Root(nodes[-1], "the guest", READ_WRITE, Permission.CONSISTENT_READ)
        guest = Guest(root, seed, await root.read(0, SIZE))
        guest.start()
        group = stage.group()
        job = await start_active_commit(
            group, nodes[-1], nodes[0], MirrorOptions(base=nodes[0]), identifier="c"
        )
        group.start()
        await guest.at_least(20)
        await until_ready(job)
        await guest.at_least(20)
        job.complete()
        await job.ended.wait()
        assert job.error is None
        assert root.node is nodes[0]
        assert not nodes[0].read_only
        await guest.at_least(20)
        await guest.stop()
        await guest.check()

    assert play(tmp_path, scene) == READY + DONE


def test_an_active_commit_that_is_given_up_changes_nothing(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 5, await root.read(0, SIZE))
        guest.start()
        group = stage.group()
        job = await start_active_commit(group, top, base, MirrorOptions(base=base), identifier="c")
        with pytest.raises(UsageError, match="Need a root block node"):
            await start_active_commit(
                stage.group(), top, base, MirrorOptions(base=base), identifier="d"
            )
        group.start()
        await until_ready(job)
        job.cancel()
        await job.ended.wait()
        assert root.node is top
        assert base.read_only
        await guest.at_least(10)
        await guest.stop()
        await guest.check()

    play(tmp_path, scene)


def test_only_the_top_layer_and_only_what_is_written(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        root = stage.attach(top)
        for name, options in (
            ("t1", MirrorOptions(base=base)),
            ("t2", MirrorOptions(everything=False)),
        ):
            guest = Guest(root, 5, await root.read(0, SIZE))
            await stage.image(name)
            target = await stage.open(name, backing=base.name if name == "t1" else None)
            job_group = stage.group()
            job = await start_mirror(job_group, top, target, options, identifier=name)
            guest.start()
            job_group.start()
            await until_ready(job)
            await guest.at_least(10)
            await guest.stop()
            job.cancel(force=False)
            await job.ended.wait()
            if name == "t2":
                edit.set_backing(target, top)
            await guest.check(target)

    play(tmp_path, scene)


def test_what_cannot_be_mirrored(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        root = stage.attach(top)
        await stage.image("small", size=SIZE // 2)
        small = await stage.open("small")
        before = set(stage.graph.nodes)
        for node, target, message in (
            (top, small, "different sizes"),
            (top, top, "into itself"),
            (top, base, "part of what is to be mirrored"),
            (base, small, "Need a root block node"),
        ):
            with pytest.raises(UsageError, match=message):
                await start_mirror(stage.group(), node, target, MirrorOptions(), identifier="m")
        assert set(stage.graph.nodes) == before
        assert root.node is top
        assert not list(stage.jobs)

    play(tmp_path, scene)


def test_a_full_target_stops_the_job_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 5, await root.read(0, SIZE))
        target = await stage.disk("target")
        group = stage.group()
        options = MirrorOptions(policies=Policies(on_target_error="enospc"))
        job = await start_mirror(group, top, target, options, identifier="m")
        full = target.children["file"].node.driver.thread_safe_io()  # type: ignore[attr-defined]

        with monkeypatch.context() as patch:
            for name in ("write", "write_all"):
                genuine = getattr(FileIO, name)

                def no_room(self: FileIO, *args: object, way: object = genuine) -> None:
                    if self is full:
                        raise OSError(28, "No space left on device")
                    way(self, *args)  # type: ignore[operator]

                patch.setattr(FileIO, name, no_room)
            group.start()
            while job.status is not Status.PAUSED:
                await asyncio.sleep(0.01)
            assert job.io_status == "nospace"
        job.resume()
        await until_ready(job)
        job.complete()
        await job.ended.wait()
        assert root.node is target
        await guest.check()

    assert "BLOCK_JOB_ERROR" in play(tmp_path, scene)
