"""A backup whose target fails: the guest loses nothing, and the bitmap misses nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from blocklayer.errors import BlockError
from blocklayer.graph import bitmaps, edit
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.backup import BackupOptions
from blocklayer.jobs.starting import place_backup
from blocklayer.units import KIB
from jobs.live import SIZE, Stage, play
from jobs.test_backup import content

CLUSTER = 64 * KIB


def nth_write_fails(number: int, *, for_ever: bool) -> dict[str, Any]:
    """Rules for blkdebug; before the first write its state is 1."""
    steps = [
        {"event": "pwritev", "state": state, "new_state": state + 1}
        for state in range(1, number + 1)
    ]
    error = {"event": "pwritev", "state": number, "iotype": "write", "once": not for_ever}
    if number == 1:
        error |= {"event": "none", "state": 0}
    return {"inject-error": [error], "set-state": steps}


class Writer:
    """A guest that takes errors as they come: a write that failed has changed nothing."""

    def __init__(self, root: Root, seed: int) -> None:
        self.root = root
        self.content = bytearray(SIZE)
        self.chance = random.Random(seed)
        self.failed = 0

    async def write(self) -> None:
        length = self.chance.choice((512, 4096, CLUSTER, 3 * CLUSTER))
        offset = self.chance.randrange((SIZE - length) // 512) * 512
        data = self.chance.randbytes(16) * (length // 16)
        try:
            await self.root.write(offset, data)
        except BlockError:
            self.failed += 1
        else:
            self.content[offset : offset + length] = data


@pytest.mark.parametrize("mode", ["on-success", "always"])
@pytest.mark.parametrize("policy", ["break-guest-write", "break-snapshot"])
@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4, 7, 11, 20, 40])
def test_the_nth_write_to_the_target_fails(
    tmp_path: Path, number: int, for_ever: bool, policy: Any, mode: Any
) -> None:
    async def scene(stage: Stage) -> None:
        disk = await stage.disk("disk")
        bitmap = bitmaps.add(disk, "b")
        writer = Writer(stage.attach(disk), number)
        for _ in range(25):
            await writer.write()
        before = bitmap.bits.copy()
        path = await stage.image("target")
        file = {
            "driver": "blkdebug", "image": {"driver": "file", "filename": str(path)},
            **nth_write_fails(number, for_ever=for_ever),
        }  # fmt: skip
        target = await open_options(
            stage.graph, {"driver": "qcow2", "node-name": "target", "file": file},
            Flags(read_only=False),
        )  # fmt: skip
        target.held = True
        group = stage.group()
        options = BackupOptions(sync="bitmap", bitmap=bitmap, bitmap_mode=mode, on_cbw_error=policy)
        async with edit.changing(stage.graph):
            job = await place_backup(group, disk, target, options, identifier="b")
        then = bytes(writer.content)
        group.start()
        while not job.ended.is_set():
            await writer.write()
            await asyncio.sleep(0)
        now, size = bytes(writer.content), bitmap.granularity
        assert await content(disk) == now
        assert disk.dirty_bitmaps["b"] is bitmap
        assert not bitmap.busy
        saved = await content(target) if not for_ever else None
        for index in range(SIZE // size):
            part = slice(index * size, (index + 1) * size)
            dirty = bitmap.bits.get(index)
            if now[part] != then[part]:
                assert dirty, "written since"
            if not before.get(index):
                continue
            if job.error is None:
                assert saved is None or saved[part] == then[part]
            elif mode == "on-success":
                assert dirty, "as if nothing had been"
            elif saved is not None and saved[part] != then[part]:
                assert dirty, "not saved"
        if policy == "break-snapshot":
            assert not writer.failed

    async def staged(stage: Stage) -> None:
        await scene(stage)
        # The target may have lost its last writes: closing it may fail, and harms nobody.
        target = stage.graph.nodes["target"]
        target.held = False
        try:
            await stage.graph.release(target)
        except BlockError:
            return

    play(tmp_path, staged)


def test_the_rules_hit_the_write_that_is_meant(tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        for number in (1, 2, 5):
            node = await open_options(
                stage.graph,
                {
                    "driver": "blkdebug", "image": {"driver": "memory", "size": CLUSTER},
                    **nth_write_fails(number, for_ever=False),
                },
                Flags(read_only=False),
            )  # fmt: skip
            root = Root(node, "the test", Permission.WRITE)
            failed = []
            for count in range(1, 8):
                try:
                    await root.write(0, b"x")
                except BlockError:
                    failed.append(count)
            assert failed == [number]
            await root.close()

    play(tmp_path, scene)
