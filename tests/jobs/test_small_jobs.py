"""Jobs that are no block jobs: create, amend, and internal snapshots of several disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocklayer.drivers import REGISTRY
from blocklayer.errors import StorageError
from blocklayer.graph import snapshots
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.amend import Amend
from blocklayer.jobs.create import Create
from blocklayer.jobs.disk_snapshots import SnapshotDelete, SnapshotLoad, SnapshotSave
from blocklayer.jobs.job import Job
from jobs.live import READ_WRITE, SIZE, Guest, Stage, play
from oracles import Oracle

DONE = ["created", "running", "waiting", "pending", "concluded", "null"]
FAILED = ["created", "running", "aborting", "concluded", "null"]


async def through(stage: Stage, job: Job) -> None:
    group = stage.group()
    group.add(job)
    group.start()
    await job.ended.wait()


def test_create(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "new.qcow2"

    async def scene(stage: Stage) -> None:
        file = {"driver": "file", "filename": str(path)}
        await through(
            stage,
            Create(stage.graph, REGISTRY.load("file"), str(path), {"size": 0}, identifier="j"),
        )
        values = {"size": 1 << 20, "cluster_size": 4096, "compat": "v3", "lazy_refcounts": True}
        qcow2 = REGISTRY.load("qcow2")
        for storage, given, message in (
            (file, values, None),
            (file, {**values, "size": 1}, "Image size must be a multiple of 512 bytes"),
            (file, {**values, "cluster_size": 1000}, "Cluster size must be a power of two"),
            ("nope", values, "Cannot find device='nope' nor node-name='nope'"),
        ):
            job = Create(stage.graph, qcow2, storage, given, identifier="j")
            await through(stage, job)
            assert (job.error is None) == (message is None)
            assert message is None or message in str(job.error)
            assert job.done == job.total == 1
        assert not stage.graph.nodes

    assert play(tmp_path, scene) == DONE * 2 + FAILED * 3
    said = qemu_img.json("info", "--output=json", path)
    assert (said["virtual-size"], said["cluster-size"]) == (1 << 20, 4096)
    qemu_img("check", path)


def test_amend(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = Root(disk, "the guest", READ_WRITE, Permission.CONSISTENT_READ)
        guest = Guest(root, 1)
        guest.start()
        await guest.at_least(10)
        await through(stage, Amend(disk, {"refcount_bits": 64}, identifier="j"))
        await guest.stop()
        await guest.check()

    assert play(tmp_path, scene) == DONE
    qemu_img("check", tmp_path / "disk.qcow2")


def test_snapshots_of_several_disks(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(stage: Stage) -> None:
        disks = [await stage.disk(name) for name in ("a", "b", "c")]
        guests = [
            Guest(Root(disk, "the guest", READ_WRITE, Permission.CONSISTENT_READ), number)
            for number, disk in enumerate(disks)
        ]
        for guest in guests:
            guest.start()
            await guest.at_least(10)
        await through(stage, SnapshotSave(disks, "s1", identifier="save"))
        for guest in guests:
            await guest.at_least(5)
            await guest.stop()
        again = SnapshotSave(disks[:1], "s1", identifier="again")
        await through(stage, again)
        assert str(again.error) == "Snapshot 's1' already exists in one or more devices"
        missing = SnapshotLoad(disks, "s2", identifier="missing")
        await through(stage, missing)
        assert str(missing.error) == "Snapshot 's2' does not exist in one or more devices"
        await through(stage, SnapshotSave(disks, "s2", identifier="save2"))
        await through(stage, SnapshotLoad(disks, "s1", identifier="load"))
        await through(stage, SnapshotLoad(disks, "s2", identifier="load2"))
        for guest in guests:
            await guest.check()
        await through(stage, SnapshotDelete(disks, "s1", identifier="delete"))
        for disk in disks:
            assert [each.name for each in snapshots.listed(disk)] == ["s2"]

    assert play(tmp_path, scene) == DONE + FAILED * 2 + DONE * 4
    for name in "abc":
        qemu_img("check", tmp_path / f"{name}.qcow2")


@pytest.mark.parametrize("kind", [SnapshotSave, SnapshotLoad])
def test_one_disk_fails_and_none_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[SnapshotSave | SnapshotLoad]
) -> None:
    async def scene(stage: Stage) -> None:
        disks = [await stage.disk(name) for name in ("a", "b")]
        roots = [stage.attach(disk) for disk in disks]
        await through(stage, SnapshotSave(disks, "s1", identifier="save"))
        for root in roots:
            await root.write(0, b"now" * 512)

        async def fail(name: str) -> None:
            raise StorageError("no more", 5)

        last = disks[1].driver
        assert isinstance(last, FormatDriver)
        genuine = last.snapshot_apply
        calls: list[str] = []

        async def fail_once(identifier: str) -> None:
            calls.append(identifier)
            if len(calls) == 1:
                await fail(identifier)
            await genuine(identifier)

        with monkeypatch.context() as patch:
            if kind is SnapshotSave:
                patch.setattr(last, "snapshot_create", fail)
            else:
                patch.setattr(last, "snapshot_apply", fail_once)
            job = kind(disks, "s2" if kind is SnapshotSave else "s1", identifier="j")
            await through(stage, job)
        assert "no more" in str(job.error)
        for disk, root in zip(disks, roots, strict=True):
            assert await root.read(0, 1536) == b"now" * 512
            assert await root.read(1536, SIZE - 1536) == bytes(SIZE - 1536)
            assert [each.name for each in snapshots.listed(disk)] == ["s1"]

    assert play(tmp_path, scene) == DONE + FAILED


@pytest.mark.parametrize("kind", [SnapshotSave, SnapshotLoad])
def test_cancelled_it_takes_back_what_it_did(
    tmp_path: Path, kind: type[SnapshotSave | SnapshotLoad]
) -> None:
    async def scene(stage: Stage) -> None:
        disks = [await stage.disk(name) for name in ("a", "b")]
        root = stage.attach(disks[0])
        await through(stage, SnapshotSave(disks, "s1", identifier="save"))
        await root.write(0, b"now" * 512)
        job = kind(disks, "s2" if kind is SnapshotSave else "s1", identifier="j")
        group = stage.group()
        group.add(job)
        genuine = job.act

        async def act() -> None:
            job.cancel()
            await genuine()

        job.act = act  # type: ignore[method-assign]
        group.start()
        await job.ended.wait()
        assert str(job.error) == "Operation canceled"
        assert await root.read(0, 1536) == b"now" * 512
        for disk in disks:
            assert [each.name for each in snapshots.listed(disk)] == ["s1"]

    assert play(tmp_path, scene) == DONE + FAILED
