"""Backup beside a guest that writes: the target is what the disk was at the start, exactly."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blocklayer.errors import LockedError, StorageError, UsageError
from blocklayer.graph import bitmaps, edit
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.backup import Backup, BackupOptions
from blocklayer.jobs.group import Group
from blocklayer.jobs.starting import place_backup, start_backup
from blocklayer.units import KIB
from jobs.live import SIZE, Guest, Stage, play

BEGUN = ["created", "running", "paused", "running"]
DONE = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
FAILED = ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]


async def begin(
    stage: Stage, group: Group, guest: Guest, node: Node, target: Node, options: BackupOptions
) -> tuple[Backup, bytes]:
    """A backup of what the guest had written at that moment; both."""
    async with edit.changing(stage.graph):
        job = await place_backup(group, node, target, options, identifier=f"b-{node.name}")
        return job, bytes(guest.content)


async def content(node: Node) -> bytes:
    reader = Root(node, "the test", Permission.CONSISTENT_READ)
    try:
        return await reader.read(0, node.size)
    finally:
        await reader.close()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_full_backup_is_what_was_there_at_the_start(
    tmp_path: Path, seed: int, compress: bool
) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        target = await stage.disk("target")
        guest.start()
        await guest.at_least(10)
        group = stage.group()
        job, then = await begin(stage, group, guest, top, target, BackupOptions(compress=compress))
        # The guest is ahead of the job, so that much is saved before it is overwritten.
        await guest.at_least(5 * seed)
        group.start()
        await job.ended.wait()
        assert job.error is None
        assert job.done == job.total > 0
        assert root.node is top
        assert target.busy is top.busy is None
        assert await content(target) == then
        await guest.at_least(10)
        await guest.stop()
        await guest.check()

    assert play(tmp_path, scene) == BEGUN + DONE


@pytest.mark.parametrize("seed", range(4))
def test_the_top_layer_only(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        await stage.image("target")
        target = await stage.open("target", backing=base.name)
        guest.start()
        group = stage.group()
        job, then = await begin(stage, group, guest, top, target, BackupOptions(sync="top"))
        group.start()
        await job.ended.wait()
        assert job.error is None
        await guest.stop()
        assert await content(target) == then
        await guest.check()
        held = [extent async for extent in stage_runs(target)]
        assert sum(length for depth, length in held if depth == 0) < SIZE

    play(tmp_path, scene)


async def stage_runs(node: Node):  # type: ignore[no-untyped-def]
    from blocklayer.graph import resolve

    async for run in resolve.runs(node, 0, node.size):
        yield (run.depth if run.present else 9), run.length


@pytest.mark.parametrize("seed", range(4))
def test_sync_none_saves_only_what_is_overwritten(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        await stage.image("target")
        target = await stage.open("target", backing=top.name)
        group = stage.group()
        job, then = await begin(stage, group, guest, top, target, BackupOptions(sync="none"))
        group.start()
        guest.start()
        for _ in range(5):
            await guest.at_least(10)
            # What is not saved yet shows through from the disk in use.
            assert await content(target) == then
        await guest.stop()
        job.cancel(force=False)
        await job.ended.wait()
        assert str(job.error) == "Operation canceled"
        assert await content(target) == then
        await guest.check()

    heard = play(tmp_path, scene)
    assert heard == [*BEGUN, "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_incremental_backups_restores_every_moment(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        guest = Guest(root, seed)
        bitmap = bitmaps.add(disk, "b")
        guest.start()
        moments = []
        below: Node | None = None
        for number in range(4):
            await stage.image(f"t{number}")
            target = await stage.open(f"t{number}", backing=below.name if below else None)
            if below is None:
                options = BackupOptions(bitmap=bitmap, bitmap_mode="always")
            else:
                options = BackupOptions(sync="incremental", bitmap=bitmap)
            group = stage.group()
            job, then = await begin(stage, group, guest, disk, target, options)
            assert bitmap.busy
            group.start()
            await job.ended.wait()
            assert job.error is None
            assert not bitmap.busy
            moments.append((target, then))
            below = target
            await guest.at_least(5)
        await guest.stop()
        await guest.check()
        for target, then in moments:
            assert await content(target) == then
            assert target.size == SIZE

    play(tmp_path, scene)


@pytest.mark.parametrize("mode", ["on-success", "never", "always"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_what_becomes_of_the_bitmap(tmp_path: Path, mode: str, fails: bool, seed: int) -> None:
    """After any outcome: what differs from the target, or was written since, is dirty."""

    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        guest = Guest(root, seed)
        bitmap = bitmaps.add(disk, "b")
        guest.start()
        await guest.at_least(30)
        before = bitmap.bits.copy()
        target = await stage.disk("target")
        group = stage.group()
        options = BackupOptions(sync="bitmap", bitmap=bitmap, bitmap_mode=mode)  # type: ignore[arg-type]
        job, then = await begin(stage, group, guest, disk, target, options)
        if fails:
            job.pace.set(64 * KIB)
        group.start()
        await guest.at_least(8)
        if fails:
            job.cancel()
        await job.ended.wait()
        await guest.stop()
        now, saved = bytes(guest.content), await content(target)
        size = bitmap.granularity
        for index in range(SIZE // size):
            part = slice(index * size, (index + 1) * size)
            if not before.get(index) and now[part] == then[part]:
                continue
            dirty = bitmap.bits.get(index)
            if now[part] != then[part]:
                assert dirty, "written since"
            elif mode == "never" or (fails and mode == "on-success"):
                assert dirty, "as if nothing had been"
            elif saved[part] != then[part]:
                assert dirty, "not saved"
        if not fails:
            changed = [i for i in range(SIZE // size) if before.get(i)]
            for index in changed:
                part = slice(index * size, (index + 1) * size)
                assert saved[part] == then[part]
        if mode == "always" and fails:
            assert bitmap.bits.count < before.count + SIZE // size

    play(tmp_path, scene)


def test_several_disks_at_one_moment(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disks = [await stage.disk(f"disk{i}") for i in range(3)]
        targets = [await stage.disk(f"target{i}") for i in range(3)]
        guests = [Guest(stage.attach(disk), i) for i, disk in enumerate(disks)]
        for guest in guests:
            guest.start()
        await guests[0].at_least(20)
        group = stage.group()
        async with edit.changing(stage.graph):
            jobs = [
                await place_backup(group, disk, target, BackupOptions(), identifier=disk.name)
                for disk, target in zip(disks, targets, strict=True)
            ]
            moment = [bytes(guest.content) for guest in guests]
        group.start()
        for job in jobs:
            await job.ended.wait()
            assert job.error is None
        for guest, target, then in zip(guests, targets, moment, strict=True):
            await guest.stop()
            await guest.check()
            assert await content(target) == then

    play(tmp_path, scene)


def fail_writes(monkeypatch: pytest.MonkeyPatch, node: Node, number: int = 28) -> None:
    """Let all writes to the image of ``node`` fail from now on."""
    from blocklayer.drivers.file import FileDriver
    from blocklayer.drivers.host.fileio import FileIO

    driver = node.children["file"].node.driver
    full = driver.thread_safe_io()  # type: ignore[attr-defined]
    for name in ("write", "write_all"):
        genuine = getattr(FileIO, name)

        def no_room(self: FileIO, *args: object, way: object = genuine) -> None:
            if self is full:
                raise OSError(number, "No space left on device")
            way(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(FileIO, name, no_room)
    genuine_write = FileDriver.write

    async def write(self: FileDriver, offset: int, buffers: object) -> None:
        if self is driver:
            raise StorageError("No space left on device", number)
        await genuine_write(self, offset, buffers)  # type: ignore[arg-type]

    monkeypatch.setattr(FileDriver, "write", write)


def test_a_failed_save_fails_the_guests_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        before = await root.read(0, SIZE)
        target = await stage.disk("target")
        group = stage.group()
        job = await start_backup(group, top, target, BackupOptions(sync="none"), identifier="b")
        group.start()
        with monkeypatch.context() as patch:
            fail_writes(patch, target)
            offset = next(i for i in range(0, SIZE, 65536) if any(before[i : i + 65536]))
            with pytest.raises(StorageError, match="could not be saved") as failure:
                await root.write(offset, b"x" * 512)
            assert failure.value.errno == 28
        assert await root.read(0, SIZE) == before
        assert job.error is None
        # The target has room again: so has the guest.
        await root.write(offset, b"x" * 512)
        job.cancel()
        await job.ended.wait()
        assert (await content(target))[offset : offset + 65536] == before[offset : offset + 65536]

    play(tmp_path, scene)


def test_a_failed_save_breaks_the_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 3, await root.read(0, SIZE))
        target = await stage.disk("target")
        group = stage.group()
        options = BackupOptions(sync="none", on_cbw_error="break-snapshot")
        job = await start_backup(group, top, target, options, identifier="b")
        group.start()
        with monkeypatch.context() as patch:
            fail_writes(patch, target)
            guest.start()
            await guest.at_least(20)
            await job.ended.wait()
        await guest.stop()
        assert "could not be saved" in str(job.error)
        await guest.check()

    assert play(tmp_path, scene) == [*BEGUN, *FAILED]


def test_a_full_target_stops_the_job_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(stage: Stage) -> None:
        from blocklayer.jobs.background import Policies
        from blocklayer.jobs.states import Status

        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 5, await root.read(0, SIZE))
        target = await stage.disk("target")
        group = stage.group()
        options = BackupOptions(policies=Policies(on_target_error="enospc"))
        job, then = await begin(stage, group, guest, top, target, options)
        with monkeypatch.context() as patch:
            fail_writes(patch, target)
            group.start()
            while job.status is not Status.PAUSED or not job.paused_by_user:
                await asyncio.sleep(0.01)
            assert job.io_status == "nospace"
        job.resume()
        await job.ended.wait()
        assert job.error is None
        assert await content(target) == then

    assert "BLOCK_JOB_ERROR" in play(tmp_path, scene)


@pytest.mark.parametrize("seed", range(3))
def test_a_snapshot_of_the_source_in_the_middle_of_it(tmp_path: Path, seed: int) -> None:
    """The disk moves to an overlay while it is being backed up: the moment stays the moment."""

    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        target = await stage.disk("target")
        overlay = await stage.disk("overlay")
        guest.start()
        group = stage.group()
        job, then = await begin(stage, group, guest, top, target, BackupOptions())
        async with edit.changing(stage.graph):
            edit.append(top, overlay)
        await guest.at_least(10)
        group.start()
        await job.ended.wait()
        assert job.error is None
        assert root.node is overlay
        assert await content(target) == then
        await guest.stop()
        await guest.check()

    play(tmp_path, scene)


def test_two_backups_of_one_disk(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        root = stage.attach(top)
        guest = Guest(root, 9, await root.read(0, SIZE))
        guest.start()
        running = []
        for name in ("t1", "t2"):
            target = await stage.disk(name)
            group = stage.group()
            async with edit.changing(stage.graph):
                job = await place_backup(group, top, target, BackupOptions(), identifier=name)
                then = bytes(guest.content)
            await guest.at_least(5)
            running.append((group, job, target, then))
        for group, _, _, _ in running:
            group.start()
        for _, job, target, then in running:
            await job.ended.wait()
            assert job.error is None
            assert await content(target) == then
        await guest.stop()
        await guest.check()

    play(tmp_path, scene)


def test_what_was_saved_is_given_up_in_the_source(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        await root.write(0, b"x" * SIZE)
        target = await stage.disk("target")
        group = stage.group()
        options = BackupOptions(discard_source=True)
        job = await start_backup(group, disk, target, options, identifier="b")
        group.start()
        await job.ended.wait()
        assert job.error is None
        assert await content(target) == b"x" * SIZE
        assert await root.read(0, SIZE) == bytes(SIZE)

    play(tmp_path, scene)


def test_what_cannot_be_backed_up(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        root = stage.attach(top)
        await stage.image("small", size=SIZE // 2)
        small = await stage.open("small")
        target = await stage.disk("target")
        read_only = await stage.disk("ro")
        read_only.flags.read_only = True
        before = set(stage.graph.nodes)
        plain = BackupOptions()
        for other, options, error, message in (
            (small, plain, UsageError, "different sizes"),
            (top, plain, UsageError, "Source and target cannot be the same"),
            (base, plain, UsageError, "part of what is to be backed up"),
            (read_only, plain, LockedError, "Could not create node: Block node 'ro' is read-only"),
            (
                target, BackupOptions(min_cluster_size=1000), UsageError,
                "Could not create node: Cannot create block-copy-state: min-cluster-size needs",
            ),
            (
                target, BackupOptions(max_chunk=1000), UsageError,
                r"Required max-chunk \(1000\) is less than backup cluster size \(65536\)",
            ),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                await start_backup(stage.group(), top, other, options, identifier="b")
            assert set(stage.graph.nodes) == before
        group = stage.group()
        job = await start_backup(group, top, target, plain, identifier="b")
        with pytest.raises(LockedError, match="Node 'target' is busy: block device is in use"):
            await start_backup(stage.group(), top, target, plain, identifier="c")
        await group.discard()
        assert set(stage.graph.nodes) == before
        assert root.node is top
        assert job.ended.is_set()
        assert not list(stage.jobs)

    play(tmp_path, scene)
