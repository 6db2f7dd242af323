"""Many requests at once on a disk that lets others run at every step, and then a power failure.

Every byte ends as one of the requests made it; when all is closed there is neither corruption nor a
leak; and whatever moment the power fails at, there is no corruption.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any

import pytest

from blocklayer.errors import BlockError
from blocklayer.graph.root import Root
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk
from proof.chains import run
from proof.crashes import check, new_image, raw_disk, take

CLUSTER = 512
LITTLE_CACHE = {"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 2048}
SHAPES: list[dict[str, Any]] = [
    {},
    {"refcount_bits": 64},
    {"refcount_bits": 1, "cluster_size": 1024},
    {"lazy_refcounts": True},
    {"compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
]
KINDS = ("write", "write", "write", "zero", "unmap", "discard", "compress", "flush", "read")


class Wave:
    """Requests sent at once, and the values each byte may have when all have ended."""

    def __init__(self, rng: random.Random, root: Root, old: bytes) -> None:
        self.old = old
        self.made: list[set[int]] = [set() for _ in old]
        self.replaced = bytearray(len(old))
        unit: int = root.node.driver.allocation_unit  # type: ignore[attr-defined]
        self.tasks: list[Awaitable[Any]] = []
        for _ in range(rng.randint(2, 14)):
            kind = rng.choice(KINDS)
            offset = rng.randrange(len(old))
            length = min(len(old) - offset, rng.choice((1, 100, 512, 700, 3000, 9000)))
            if kind == "compress":
                offset -= offset % unit
                length = min(unit, len(old) - offset)
            self.send(root, kind, offset, length, rng.randint(1, 255))

    def send(self, root: Root, kind: str, offset: int, length: int, fill: int) -> None:
        data = bytes([fill]) * length
        task: Awaitable[Any]
        if kind == "flush":
            task = root.flush()
        elif kind == "read":
            task = root.read(offset, length)
        elif kind == "discard":
            task = root.discard(offset, length)
        elif kind in ("zero", "unmap"):
            task = root.write_zeroes(offset, length, unmap=kind == "unmap")
        else:
            task = (root.write if kind == "write" else root.write_compressed)(offset, data)
        self.tasks.append(task)
        if kind in ("flush", "read"):
            return
        value = fill if kind in ("write", "compress") else 0
        for at in range(offset, offset + length):
            self.made[at].add(value)
            self.replaced[at] |= kind != "discard"

    def judge(self, new: bytes, story: str) -> None:
        for at, value in enumerate(new):
            allowed = self.made[at] if self.replaced[at] else self.made[at] | {self.old[at]}
            assert value in allowed, f"{story}: byte {at:#x} is {value}, not one of {allowed}"


async def race(seed: int) -> None:
    """A few waves, then everything is looked at."""
    rng = random.Random(seed)
    size = rng.randrange(10, 90) * 512
    base = raw_disk(b"\xbb" * rng.randrange(1, size)) if seed % 2 else None
    disk = await new_image(size, base=base, **rng.choice(SHAPES))
    disk.concurrent = True
    root = await take(disk, **rng.choice(({}, LITTLE_CACHE)))
    for number in range(rng.randint(1, 4)):
        wave = Wave(rng, root, await read_all(root))
        await asyncio.gather(*wave.tasks)
        wave.judge(await read_all(root), f"seed {seed}, wave {number}")
    content = await read_all(root)
    await root.close()
    root = await take(disk)
    assert await read_all(root) == content, f"seed {seed}: opened again"
    found = await check(root)
    assert not found.corruptions, f"seed {seed}: {found.messages}"
    assert not found.leaks, f"seed {seed}: {found.messages}"
    await root.close()
    await cut(disk, seed, rng)


async def cut(disk: CrashingDisk, seed: int, rng: random.Random) -> None:
    """The power fails at some moments of it."""
    for number in range(10):
        position = rng.randint(0, disk.position)
        for state in disk.random_states(1, seed * 100 + number, position):
            root = await take(state.disk())
            await read_all(root)
            found = await check(root)
            assert not found.corruptions, f"seed {seed}: {state}: {found.messages}"
            await root.close()


async def race_with_failures(seed: int) -> None:
    """The same while some requests to the disk fail: all tasks end, and nothing is corrupt."""
    rng = random.Random(seed)
    disk = await new_image(rng.randrange(10, 90) * 512, **rng.choice(SHAPES))
    disk.concurrent = True
    disk.poisons = rng.random() < 0.5
    root = await take(disk)
    for _ in range(3):
        wave = Wave(rng, root, await read_all(root))
        disk.fail(rng.randint(1, 60), rng.choice((5, 28)))
        for answer in await asyncio.gather(*wave.tasks, return_exceptions=True):
            assert not isinstance(answer, BaseException) or isinstance(answer, BlockError), answer
        disk.fail(0)
        assert not root.node.claims.held
    try:
        await root.close()
    except BlockError:
        assert root.graph.nodes == {}
    root = await take(disk)
    found = await check(root)
    assert not found.corruptions, f"seed {seed}: {found.messages}"
    await root.close()


@pytest.mark.parametrize("block", range(4))
def test_races(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        run(race(seed))


@pytest.mark.parametrize("block", range(4))
def test_races_with_failures(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        run(race_with_failures(seed))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(40))
def test_many_races(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        run(race(seed))
        run(race_with_failures(seed))
