"""Commit of layers below the active one, beside a guest that writes to that."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blocklayer import aio
from blocklayer.errors import LockedError
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.root import Root
from blocklayer.jobs.commit_layers import LayerCommitOptions
from blocklayer.jobs.headers import BackingName
from blocklayer.jobs.starting_layers import start_layer_commit
from jobs.live import SIZE, Guest, Stage, play
from oracles import Oracle

DONE = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
OPTIONS = LayerCommitOptions()


async def end(job: object) -> None:
    await job.ended.wait()  # type: ignore[attr-defined]
    assert job.error is None, job.error  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("top_name", ["low", "middle"])
def test_beside_a_guest(tmp_path: Path, qemu_img: Oracle, seed: int, top_name: str) -> None:
    async def scene(stage: Stage) -> None:
        nodes = await stage.chain("base", "low", "middle", "top", seed=seed)
        base, _, _, active = nodes
        top = stage.graph.nodes[top_name]
        for node in nodes[:-1]:
            node.held = False
        root = Root(active, "the guest", 3, 1)
        guest = Guest(root, seed, await root.read(0, SIZE))
        guest.start()
        group = stage.group()
        job = await start_layer_commit(group, top, base, OPTIONS, identifier="c")
        group.start()
        await guest.at_least(20)
        await end(job)
        await guest.at_least(10)
        await guest.stop()
        await guest.check()
        assert active.chain()[-1] is base
        assert base.read_only
        assert set(stage.graph.nodes) >= {"base", "top"}
        assert "low" not in stage.graph.nodes
        assert ("middle" in stage.graph.nodes) == (top_name == "low")
        assert all(node.busy is None for node in stage.graph.nodes.values())
        assert job.done == job.total == SIZE

    assert play(tmp_path, scene) == DONE
    overlay = "top" if top_name == "middle" else "middle"
    said = qemu_img.json("info", "--output=json", tmp_path / f"{overlay}.qcow2")
    assert said["full-backing-filename"] == str(tmp_path / "base.qcow2")
    assert said["backing-filename-format"] == "qcow2"
    for name in ("base", overlay):
        qemu_img("check", tmp_path / f"{name}.qcow2")


@pytest.mark.parametrize("seed", range(8))
def test_layers_of_all_kinds(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, seed: int) -> None:
    """Short and long layers, zeros over data: the real tool reads the same afterwards."""
    chance = random.Random(seed)
    below = None
    for name in ("base", "low", "middle", "top"):
        size = SIZE if name == "top" else SIZE - chance.choice((0, 65536, 1 << 20, SIZE // 2))
        path = tmp_path / f"{name}.qcow2"
        cluster = chance.choice((4096, 65536))
        backing = () if below is None else ("-b", below, "-F", "qcow2")
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", *backing,
            path, str(size),
        )  # fmt: skip
        below = path
        commands: list[str] = []
        for _ in range(10):
            length = chance.randrange(1, 300) * 512
            at = chance.randrange(0, (size - length) // 512) * 512
            kind = chance.choice(("write -P 7", "write -P 9", "write -z", "write -P 0"))
            commands += ["-c", f"{kind} {at} {length}"]
        qemu_io(*commands, path)
    before = asyncio.run(_content(tmp_path))

    async def scene(stage: Stage) -> None:
        nodes = [await stage.open("base", read_only=True, backing=None)]
        for name in ("low", "middle", "top"):
            backing = nodes[-1].name
            nodes.append(await stage.open(name, read_only=name != "top", backing=backing))
        group = stage.group()
        job = await start_layer_commit(group, nodes[2], nodes[0], OPTIONS, identifier="c")
        group.start()
        await end(job)

    assert play(tmp_path, scene) == DONE
    for name in ("low", "middle"):
        (tmp_path / f"{name}.qcow2").unlink()
    qemu_img("check", tmp_path / "base.qcow2")
    qemu_img("convert", "-O", "raw", tmp_path / "top.qcow2", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == before


async def _content(folder: Path) -> bytes:
    async with await aio.Disk.open(folder / "top.qcow2") as disk:
        return await disk.read(0, disk.size)


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_and_begun_again(tmp_path: Path, seed: int) -> None:
    async def scene(stage: Stage) -> None:
        base, middle, top = nodes = await stage.chain("base", "middle", "top", seed=seed)
        root = stage.attach(top)
        guest = Guest(root, seed, await root.read(0, SIZE))
        guest.start()
        for number in range(3):
            group = stage.group()
            job = await start_layer_commit(group, middle, base, OPTIONS, identifier="c", speed=1)
            group.start()
            await guest.at_least(number)
            job.cancel()
            await job.ended.wait()
            assert top.chain() == nodes[::-1]
            assert base.read_only
        group = stage.group()
        job = await start_layer_commit(group, middle, base, OPTIONS, identifier="c")
        group.start()
        await end(job)
        await guest.stop()
        await guest.check()

    heard = play(tmp_path, scene)
    cancelled = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    assert heard == (["created", "running", *cancelled] * 3) + DONE


def test_every_overlay_is_told(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(stage: Stage) -> None:
        base, middle, top = await stage.chain("base", "middle", "top")
        await stage.image("other", backing=tmp_path / "middle.qcow2", backing_format="qcow2")
        other = await stage.open("other", read_only=True, backing="middle")
        contents = [await stage.attach(top).read(0, SIZE)]
        reader = Root(other, "a reader", 1)
        contents.append(await reader.read(0, SIZE))
        group = stage.group()
        options = LayerCommitOptions(name=BackingName(filename="./base.qcow2"))
        job = await start_layer_commit(group, middle, base, options, identifier="c")
        with pytest.raises(LockedError, match="Node 'top' is busy: block device is in use by"):
            await start_layer_commit(stage.group(), middle, base, options, identifier="d")
        group.start()
        await end(job)
        assert top.backing is other.backing is base
        assert other.read_only
        assert [await stage.graph.roots[0].read(0, SIZE), await reader.read(0, SIZE)] == contents

    assert play(tmp_path, scene) == DONE
    for name in ("top", "other"):
        said = qemu_img.json("info", "--output=json", tmp_path / f"{name}.qcow2")
        assert said["backing-filename"] == "./base.qcow2"


def test_other_chains_keep_their_layers(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, middle, _ = await stage.chain("base", "middle", "top")
        await stage.image("other", backing=tmp_path / "base.qcow2", backing_format="qcow2")
        await stage.open("other", backing="base")
        before = set(stage.graph.nodes)
        with pytest.raises(LockedError, match="node is used as backing hd of 'other'"):
            await start_layer_commit(stage.group(), middle, base, OPTIONS, identifier="c")
        assert set(stage.graph.nodes) == before
        assert base.read_only

    play(tmp_path, scene)


def test_somebody_else_reads_the_base(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        base, middle, top = nodes = await stage.chain("base", "middle", "top")
        reader = Root(base, "a reader", 1, 5)
        before = set(stage.graph.nodes)
        with pytest.raises(LockedError, match="a reader"):
            await start_layer_commit(stage.group(), middle, base, OPTIONS, identifier="c")
        assert set(stage.graph.nodes) == before
        assert top.chain() == nodes[::-1]
        assert base.read_only
        await reader.close()

    play(tmp_path, scene)


def test_a_header_that_cannot_be_written_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu_img: Oracle
) -> None:
    async def scene(stage: Stage) -> None:
        base, middle, top = nodes = await stage.chain("base", "middle", "top")
        await stage.image("other", backing=tmp_path / "middle.qcow2", backing_format="qcow2")
        other = await stage.open("other", backing="middle")
        content = await stage.attach(top).read(0, SIZE)
        group = stage.group()
        job = await start_layer_commit(group, middle, base, OPTIONS, identifier="c")
        assert isinstance(other.driver, FormatDriver)

        async def refuse(reference: object) -> None:
            raise LockedError("not today")

        monkeypatch.setattr(other.driver, "change_backing", refuse)
        group.start()
        await job.ended.wait()
        assert "not today" in str(job.error)
        assert top.chain() == nodes[::-1]
        assert other.backing is middle
        assert await stage.graph.roots[0].read(0, SIZE) == content

    heard = play(tmp_path, scene)
    assert heard[-4:] == ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    said = qemu_img.json("info", "--output=json", tmp_path / "top.qcow2")
    assert said["full-backing-filename"] == str(tmp_path / "middle.qcow2")
