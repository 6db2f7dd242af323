"""Stream beside a guest that writes: nothing lost, the chain shorter, and restarted at will."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blocklayer import aio
from blocklayer.drivers.host.fileio import FileIO
from blocklayer.errors import LockedError, UsageError
from blocklayer.jobs.headers import BackingName
from blocklayer.jobs.starting_layers import start_stream
from blocklayer.jobs.states import Status
from blocklayer.jobs.stream import StreamOptions
from jobs.live import SIZE, Guest, Stage, play
from oracles import Oracle

DONE = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]


async def end(job: object) -> None:
    await job.ended.wait()  # type: ignore[attr-defined]
    assert job.error is None, job.error  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lowest", ["base", "middle"])
def test_beside_a_guest(tmp_path: Path, qemu_img: Oracle, seed: int, lowest: str) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "low", "middle", "top", seed=seed)
        base, top = nodes[0], nodes[-1]
        for node in nodes[:-1]:
            node.held = False
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        guest.start()
        group = stage.group()
        below = stage.graph.nodes["base" if lowest == "base" else "low"]
        job = await start_stream(group, top, StreamOptions(lowest=below), identifier="s")
        assert root.node is job.filter_node
        group.start()
        await guest.at_least(30)
        await end(job)
        assert root.node is top
        await guest.at_least(10)
        await guest.stop()
        await guest.check()
        assert top.backing is (None if lowest == "base" else base)
        assert "middle" not in stage.graph.nodes
        assert job.done == job.total == SIZE
        assert top.busy is None

    assert play(tmp_path, scene) == DONE
    said = qemu_img.json("info", "--output=json", tmp_path / "top.qcow2")
    backing = said.get("full-backing-filename")
    assert backing == (None if lowest == "base" else str(tmp_path / "base.qcow2"))
    qemu_img("check", tmp_path / "top.qcow2")


@pytest.mark.parametrize("seed", range(6))
def test_layers_of_all_kinds(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, seed: int) -> None:
    """Small clusters, short layers, zeros over data: the real tool reads the same afterwards."""
    chance = random.Random(seed)
    sizes = {"base": SIZE, "low": SIZE // 2 + 4096, "middle": SIZE - 65536, "top": SIZE}
    below = None
    for name, size in sizes.items():
        path = tmp_path / f"{name}.qcow2"
        cluster = chance.choice((4096, 65536))
        backing = () if below is None else ("-b", below, "-F", "qcow2")
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", *backing,
            path, str(size),
        )  # fmt: skip
        below = path
        commands: list[str] = []
        for _ in range(12):
            length = chance.randrange(1, 300) * 512
            at = chance.randrange(0, (size - length) // 512) * 512
            kind = chance.choice(("write -P 7", "write -P 9", "write -z", "write -P 0", "write -c"))
            if kind == "write -c":
                at, length = at - at % 65536, 65536
            if at + length <= size:
                commands += ["-c", f"{kind} {at} {length}"]
        # A compressed write to a cluster that is there already is refused.
        qemu_io(*commands, path, check=False)
    before = asyncio.run(_content(tmp_path))
    keep = chance.choice((None, "base", "low"))

    async def scene(stage: Stage) -> None:
        nodes = [await stage.open("base", read_only=True, backing=None)]
        for name in list(sizes)[1:]:
            backing = nodes[-1].name
            nodes.append(await stage.open(name, read_only=name != "top", backing=backing))
        lowest = nodes[0] if keep is None else nodes[[n.name for n in nodes].index(keep) + 1]
        group = stage.group()
        job = await start_stream(group, nodes[-1], StreamOptions(lowest=lowest), identifier="s")
        group.start()
        await end(job)

    assert play(tmp_path, scene) == DONE
    qemu_img("check", tmp_path / "top.qcow2")
    assert asyncio.run(_content(tmp_path)) == before
    if keep is None:
        # The layers below are of no more use.
        for name in ("base", "low", "middle"):
            (tmp_path / f"{name}.qcow2").unlink()
    qemu_img("convert", "-O", "raw", tmp_path / "top.qcow2", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == before


async def _content(folder: Path) -> bytes:
    async with await aio.Disk.open(folder / "top.qcow2") as disk:
        return await disk.read(0, disk.size)


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_and_begun_again(tmp_path: Path, qemu_img: Oracle, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "middle", "top", seed=seed)
        base, _, top = nodes
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        guest.start()
        options = StreamOptions(lowest=base)
        for number in range(3):
            group = stage.group()
            job = await start_stream(group, top, options, identifier="s", speed=1)
            group.start()
            await guest.at_least(number)
            job.cancel()
            await job.ended.wait()
            assert str(job.error) == "Operation canceled"
            assert root.node is top
            assert top.chain() == nodes[::-1]
        group = stage.group()
        job = await start_stream(group, top, options, identifier="s")
        group.start()
        await end(job)
        await guest.stop()
        await guest.check()

    heard = play(tmp_path, scene)
    cancelled = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    assert heard == (["created", "running", *cancelled] * 3) + DONE
    assert "backing-filename" not in qemu_img.json("info", "--output=json", tmp_path / "top.qcow2")


def test_paused_and_slowed(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "top")
        group = stage.group()
        job = await start_stream(
            group, nodes[-1], StreamOptions(lowest=nodes[0]), identifier="s", speed=1
        )
        group.start()
        job.pause()
        while job.status is not Status.PAUSED:
            await asyncio.sleep(0)
        job.set_speed(0)
        done = job.done
        for _ in range(20):
            await asyncio.sleep(0)
        assert job.done == done < SIZE
        job.resume()
        await end(job)

    assert play(tmp_path, scene) == ["created", "running", "paused", "running", *DONE[2:]]


def test_into_a_layer_in_the_middle(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "low", "middle", "top")
        base, low, middle, top = nodes
        root = stage.attach(top)
        guest = Guest(root, 3, await root.read(0, SIZE))
        guest.start()
        group = stage.group()
        name = BackingName(filename="./base.qcow2")
        job = await start_stream(
            group, middle, StreamOptions(lowest=low, name=name), identifier="s", filter_name="cor"
        )
        assert top.backing is stage.graph.nodes["cor"]
        with pytest.raises(LockedError, match="Node 'cor' is busy: block device is in use by"):
            await start_stream(
                stage.group(), stage.graph.nodes["cor"], StreamOptions(lowest=base), identifier="t"
            )
        with pytest.raises(LockedError, match="Node 'low' is busy"):
            await start_stream(stage.group(), low, StreamOptions(lowest=base), identifier="t")
        group.start()
        await guest.at_least(3)
        await end(job)
        assert top.chain() == [top, middle, base]
        assert middle.read_only
        assert low.name in stage.graph.nodes
        await guest.stop()
        await guest.check()

    assert play(tmp_path, scene) == DONE
    said = qemu_img.json("info", "--output=json", tmp_path / "middle.qcow2")
    assert (said["backing-filename"], said["backing-filename-format"]) == ("./base.qcow2", "qcow2")
    qemu_img("check", tmp_path / "middle.qcow2")


def test_nothing_to_copy_still_names_the_backing_file(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(stage: Stage) -> None:
        _, top = await stage.chain("base", "top")
        group = stage.group()
        options = StreamOptions(lowest=top, name=BackingName(filename="moved.qcow2"))
        job = await start_stream(group, top, options, identifier="s")
        group.start()
        await end(job)
        assert job.total == 0

    assert play(tmp_path, scene) == DONE
    said = qemu_img.json("info", "--output=json", tmp_path / "top.qcow2")
    assert said["backing-filename"] == "moved.qcow2"


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        other = await stage.disk("other")
        root = stage.attach(top)
        before = set(stage.graph.nodes)
        for node, lowest, filter_name, message in (
            (top, other, None, "Node 'other' is not in a chain starting from 'top'"),
            (top.children["file"].node, top.children["file"].node, None, "is no image"),
            (top, base, "top", "Duplicate nodes"),
        ):
            with pytest.raises(UsageError, match=message):
                await start_stream(
                    stage.group(), node, StreamOptions(lowest=lowest), identifier="s",
                    filter_name=filter_name,
                )  # fmt: skip
        assert set(stage.graph.nodes) == before
        assert root.node is top
        assert not list(stage.jobs)

    play(tmp_path, scene)


def _no_room(patch: pytest.MonkeyPatch, storage: object) -> None:
    for name in ("write", "write_all"):
        genuine = getattr(FileIO, name)

        def refuse(self: FileIO, *args: object, way: object = genuine) -> None:
            if self is storage:
                raise OSError(28, "No space left on device")
            way(self, *args)  # type: ignore[operator]

        patch.setattr(FileIO, name, refuse)


@pytest.mark.parametrize("policy", ["report", "enospc", "ignore"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    async def scene(stage: Stage) -> None:
        base, top = await stage.chain("base", "top")
        root = stage.attach(top)
        content = await root.read(0, SIZE)
        group = stage.group()
        job = await start_stream(
            group, top, StreamOptions(lowest=base, on_error=policy), identifier="s"
        )
        storage = top.children["file"].node.driver.thread_safe_io()  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            _no_room(patch, storage)
            group.start()
            while job.status not in (Status.PAUSED, Status.NULL):
                await asyncio.sleep(0)
        if policy == "enospc":
            assert job.io_status == "nospace"
            job.resume()
            await end(job)
            assert top.backing is None
        else:
            await job.ended.wait()
            assert job.error is not None
            assert job.error.errno == 28
            assert top.backing is base
        assert await root.read(0, SIZE) == content

    assert "BLOCK_JOB_ERROR" in play(tmp_path, scene)
