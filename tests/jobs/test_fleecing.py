"""Fleecing: a reader that sees one moment of a disk while its guest writes on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blocklayer.drivers.copy_before_write import CopyBeforeWriteDriver
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.errors import StorageError, UnsupportedError, UsageError
from blocklayer.graph import bitmaps, edit, resolve
from blocklayer.graph.extent import Kind
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.backup import BackupOptions
from blocklayer.jobs.starting import start_backup
from blocklayer.units import KIB
from jobs.live import SIZE, Guest, Stage, play
from jobs.test_backup import content, fail_writes

CLUSTER = 64 * KIB


async def add(stage: Stage, **options: object) -> Node:
    node = await open_options(
        stage.graph,
        {name.replace("_", "-"): value for name, value in options.items()},
        Flags(read_only=False, discard_unmap=True),
    )
    node.held = True
    return node


async def fleece(stage: Stage, disk: Node, **options: object) -> tuple[Node, Node]:
    """The filter above ``disk``, whose users move to it, and the view of this moment."""
    async with edit.changing(stage.graph):
        filter_node = await add(
            stage, driver="copy-before-write", node_name="cbw", file=disk.name, **options
        )
        edit.insert_above(disk, filter_node)
    view = await add(stage, driver="snapshot-access", node_name="view", file="cbw")
    return filter_node, view


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_reader_sees_the_moment(tmp_path: Path, seed: int, backing: bool) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        await stage.image("target")
        target = await stage.open("target", backing=top.name if backing else None)
        then = bytes(guest.content)
        _, view = await fleece(stage, top, target=target.name)
        assert root.node.name == "cbw"
        reader = Root(view, "the reader", Permission.CONSISTENT_READ)
        chance = random.Random(seed)
        guest.start()
        for _ in range(60):
            length = chance.choice((512, 5000, 70_000, 1_500_000))
            offset = chance.randrange(SIZE - length)
            assert await reader.read(offset, length) == then[offset : offset + length]
            await guest.at_least(1)
        assert await reader.read(0, SIZE) == then
        runs = [run async for run in resolve.runs(view, 0, SIZE)]
        for run in runs:
            if run.kind is Kind.ZERO:
                assert not any(then[run.offset : run.end])
        assert sum(run.length for run in runs) == SIZE
        await guest.stop()
        await guest.check()
        with pytest.raises(UnsupportedError, match="takes no writes"):
            await Root(view, "a writer", Permission.WRITE).write(0, b"x")

    play(tmp_path, scene)


def test_several_readers_and_guests_at_once(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        first = Guest(root, 1)
        first.start()
        await first.at_least(30)
        await first.stop()
        then = bytes(first.content)
        target = await stage.disk("target")
        _, view = await fleece(stage, disk, target=target.name)

        async def read(seed: int) -> None:
            chance = random.Random(seed)
            reader = Root(view, "the reader", Permission.CONSISTENT_READ)
            for _ in range(40):
                offset = chance.randrange(SIZE - 100_000)
                assert await reader.read(offset, 100_000) == then[offset : offset + 100_000]

        async def overwrite(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(60):
                offset = chance.randrange(SIZE - 40_000)
                await root.write(offset, chance.randbytes(40_000))
                await asyncio.sleep(0)

        await asyncio.gather(*map(read, range(3)), *map(overwrite, range(10, 13)))

    play(tmp_path, scene)


def test_only_what_a_bitmap_names(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        bitmap = bitmaps.add(disk, "b")
        await root.write(CLUSTER, b"a" * CLUSTER)
        bitmap.disable()
        target = await stage.disk("target")
        filter_node, view = await fleece(
            stage, disk, target=target.name, bitmap={"node": "disk", "name": "b"}
        )
        await root.write(0, b"b" * 3 * CLUSTER)
        reader = Root(view, "the reader", Permission.CONSISTENT_READ)
        assert await reader.read(CLUSTER, CLUSTER) == b"a" * CLUSTER
        for offset in (0, 2 * CLUSTER, CLUSTER - 1, 2 * CLUSTER - 1):
            with pytest.raises(StorageError, match="part of the point in time") as failure:
                await reader.read(offset, 2)
            assert failure.value.errno == 13
        saved = [run async for run in resolve.runs(target, 0, SIZE) if run.present]
        assert [(run.offset, run.length) for run in saved] == [(CLUSTER, CLUSTER)]
        with pytest.raises(StorageError, match="'q' not found"):
            await add(
                stage, driver="copy-before-write", node_name="c2", file="disk", target="target",
                bitmap={"node": "disk", "name": "q"},
            )  # fmt: skip
        assert "c2" not in stage.graph.nodes
        assert filter_node.parents

    play(tmp_path, scene)


def test_what_was_read_need_not_be_kept(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        await root.write(0, b"a" * 4 * CLUSTER)
        target = await stage.disk("target")
        _, view = await fleece(stage, disk, target=target.name)
        await root.write(0, b"b" * CLUSTER)
        reader = Root(view, "the reader", Permission.CONSISTENT_READ | Permission.WRITE)
        assert await reader.read(0, 2 * CLUSTER) == b"a" * 2 * CLUSTER
        await reader.discard(0, 2 * CLUSTER + 512)
        # The first has been given up, the second is not saved any more.
        await root.write(0, b"c" * 2 * CLUSTER)
        held = [run async for run in resolve.runs(target, 0, SIZE) if run.kind is Kind.DATA]
        assert held == []
        with pytest.raises(StorageError, match="not any more"):
            await reader.read(0, 512)
        assert await reader.read(2 * CLUSTER, 2 * CLUSTER) == b"a" * 2 * CLUSTER

    play(tmp_path, scene)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_what_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        await root.write(0, b"a" * SIZE)
        target = await stage.disk("target")
        _, view = await fleece(stage, disk, target=target.name, on_cbw_error=policy)
        reader = Root(view, "the reader", Permission.CONSISTENT_READ)
        with monkeypatch.context() as patch:
            fail_writes(patch, target)
            if policy == "break-snapshot":
                await root.write(0, b"b" * 512)
            else:
                for change in (
                    root.write(0, b"b" * 512), root.write_zeroes(0, 512), root.discard(0, CLUSTER)
                ):  # fmt: skip
                    with pytest.raises(StorageError, match="could not be saved"):
                        await change
        if policy == "break-snapshot":
            assert (await root.read(0, 512)) == b"b" * 512
            with pytest.raises(StorageError, match="The point in time is lost"):
                await reader.read(CLUSTER, 512)
            with pytest.raises(StorageError, match="The point in time is lost"):
                await resolve.status(view, 0, SIZE)
        else:
            assert await reader.read(0, SIZE) == b"a" * SIZE == await root.read(0, SIZE)
            await root.write(0, b"b" * 512)
            assert await reader.read(0, SIZE) == b"a" * SIZE

    play(tmp_path, scene)


@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
def test_a_target_that_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The guest waits no longer than it has to; the saving goes on, and drains wait for it."""

    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        await root.write(0, b"a" * SIZE)
        await add(stage, driver="memory", node_name="slow", size=SIZE)
        go_on = asyncio.Event()
        genuine = MemoryDriver.write

        async def write(self: MemoryDriver, offset: int, buffers: object) -> None:
            await go_on.wait()
            await genuine(self, offset, buffers)  # type: ignore[arg-type]

        monkeypatch.setattr(MemoryDriver, "write", write)
        filter_node, view = await fleece(
            stage, disk, target="slow", cbw_timeout=1, on_cbw_error=policy
        )
        driver = filter_node.driver
        assert isinstance(driver, CopyBeforeWriteDriver)
        driver.point.timeout_s = 0.001  # type: ignore[assignment]
        reader = Root(view, "the reader", Permission.CONSISTENT_READ)
        if policy == "break-snapshot":
            await root.write(0, b"b" * 512)
        else:
            with pytest.raises(StorageError, match="took longer") as failure:
                await root.write(0, b"b" * 512)
            assert failure.value.errno == 110
        asyncio.get_running_loop().call_later(0.02, go_on.set)
        async with edit.changing(stage.graph, disk):
            assert go_on.is_set()
        if policy == "break-snapshot":
            with pytest.raises(StorageError, match="is lost"):
                await reader.read(0, 512)
        else:
            await root.write(0, b"b" * 512)
            assert await reader.read(0, SIZE) == b"a" * SIZE

    play(tmp_path, scene)


def test_what_is_cut_off_is_saved(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        await root.write(0, b"a" * SIZE)
        target = await stage.disk("target")
        _, view = await fleece(stage, disk, target=target.name)
        reader = Root(view, "the reader", Permission.CONSISTENT_READ)
        await root.truncate(SIZE // 2, shrink=True)
        await root.truncate(2 * SIZE)
        await root.write(SIZE // 2, b"b" * SIZE)
        assert view.size == SIZE
        assert await reader.read(0, SIZE) == b"a" * SIZE

    play(tmp_path, scene)


def test_backups_read_from_the_view(tmp_path: Path) -> None:
    """A push of what was fleeced: the view is an ordinary source, and is given up as it is read."""

    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        root = stage.attach(disk)
        guest = Guest(root, 3)
        guest.start()
        await guest.at_least(20)
        await guest.stop()
        then = bytes(guest.content)
        target = await stage.disk("target")
        _, view = await fleece(stage, disk, target=target.name)
        guest.start()
        backup = await stage.disk("backup")
        group = stage.group()
        job = await start_backup(
            group, view, backup, BackupOptions(discard_source=True), identifier="b"
        )
        group.start()
        await job.ended.wait()
        assert job.error is None
        await guest.stop()
        await guest.check()
        assert await content(backup) == then

    play(tmp_path, scene)


def test_who_may_write_what(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        target = await stage.disk("target")
        with pytest.raises(UsageError, match="keeps no point in time"):
            await add(stage, driver="snapshot-access", node_name="s", file="disk")
        with pytest.raises(UsageError, match="Parameter 'target' is missing"):
            await add(stage, driver="copy-before-write", node_name="c", file="disk")
        root = stage.attach(disk)
        filter_node, _ = await fleece(stage, disk, target=target.name)
        assert root.node is filter_node
        for node in (disk, target):
            with pytest.raises(Exception, match="Conflicts with use by"):
                Root(node, "another", Permission.RESIZE)
        with pytest.raises(Exception, match="does not allow 'write'"):
            Root(disk, "another", Permission.WRITE)
        assert set(stage.graph.nodes) >= {"cbw", "view"}

    play(tmp_path, scene)
