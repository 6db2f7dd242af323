"""Persistent bitmaps under power failures and failing requests (R5): whatever happens, a bitmap is
marked as in use, or it covers every byte that differs from what the disk held when it was added.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from blocklayer.errors import BlockError
from blocklayer.graph import bitmaps
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.root import Root
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk
from blocklayer.testing.strategies import Request
from proof.chains import run
from proof.crashes import Bench, check, moments, new_image, raw_disk, spread, survive, take

KIB = 1024
SIZE = 80 * KIB
MOST = 500
Workload = Callable[[Bench], Awaitable[None]]


def uncovered(bitmap: DirtyBitmap, before: bytes, now: bytes) -> list[int]:
    """Sectors that differ, and that the bitmap calls clean."""
    clean = bytearray(b"\1" * (len(now) // 512))
    for offset, length in bitmap.runs():
        first, end = offset // 512, (offset + length + 511) // 512
        clean[first:end] = bytes(end - first)
    return [
        sector
        for sector, is_clean in enumerate(clean)
        if is_clean and before[sector * 512 :][:512].ljust(512, b"\0") != now[sector * 512 :][:512]
    ]


async def judge(root: Root, started: dict[str, bytes], where: str) -> int:
    """Compare all bitmaps that can be relied on; how many there were."""
    node, found = root.node, 0
    now = await read_all(root)
    for name, bitmap in node.dirty_bitmaps.items():
        if bitmap.inconsistent or not bitmap.enabled:
            continue
        await bitmap.load()
        found += 1
        assert uncovered(bitmap, started[name], now) == [], f"{where}: {name}"
    return found


async def with_bitmap(**options: Any) -> tuple[CrashingDisk, bytes]:
    """An image with data, two bitmaps that record, and one that does not; what it held then."""
    disk = await new_image(SIZE, **options)
    root = await take(disk)
    await root.write(0, Request("write", 0, 30 * KIB, 7).data)
    content = await read_all(root)
    bitmaps.add(root.node, "fine", granularity=512, persistent=True)
    bitmaps.add(root.node, "coarse", granularity=4096, persistent=True)
    bitmaps.add(root.node, "off", granularity=512, persistent=True, enabled=False)
    await root.close()
    disk.settle()
    return disk, content


async def sessions(bench: Bench) -> None:
    await bench.write(0, 700, 1)
    await bench.write(40 * KIB, 1500, 2)
    await bench.flush()
    await bench.do("zero", 5 * KIB, 3 * KIB)
    await bench.reopen()
    await bench.write(0, 700, 3)
    await bench.reopen()
    await bench.do("discard", 8 * KIB, 4 * KIB)
    unit = bench.root.node.driver.allocation_unit  # type: ignore[attr-defined]
    await bench.do("compress", 48 * KIB, unit, 9)
    await bench.reopen()
    await bench.reopen()


async def resizing(bench: Bench) -> None:
    await bench.resize(100 * KIB)
    await bench.write(90 * KIB, KIB, 1)
    await bench.reopen()
    await bench.resize(50 * KIB)
    await bench.reopen()
    await bench.resize(70 * KIB)
    await bench.reopen()


async def adding_and_removing(bench: Bench) -> None:
    node = bench.root.node
    await bitmaps.remove(bitmaps.find(node, "coarse"))
    await bench.write(KIB, KIB, 1)
    await bench.reopen()
    node = bench.root.node
    bitmaps.add(node, "new", granularity=512, persistent=True)
    bitmaps.find(node, "off").clear()
    await bench.write(3 * KIB, KIB, 2)
    await bench.reopen()
    for bitmap in list(bench.root.node.dirty_bitmaps.values()):
        await bitmaps.remove(bitmap)
    await bench.reopen()


WORKLOADS: tuple[Workload, ...] = (sessions, resizing, adding_and_removing)


async def _record(disk: CrashingDisk, workload: Workload) -> Bench:
    bench = await Bench.open(disk)
    # Opening has marked the bitmaps already: what comes before that is one of the states.
    bench.marks = [(0, bench.versions.copy())]
    await workload(bench)
    await bench.root.close()
    return bench


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"lazy_refcounts": True},
        {"cluster_size": 4096},
        {"cluster_size": 16 * KIB, "extended_l2": True},
    ],
    ids=["plain", "lazy", "4k", "extended L2"],
)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("backed", [False, True])
def test_power_failures(workload: Workload, shape: dict[str, Any], backed: bool) -> None:
    async def main() -> None:
        base = raw_disk(Request("write", 0, 50 * KIB, 0xBB).data) if backed else None
        disk, content = await with_bitmap(base=base, **shape)
        bench = await _record(disk, workload)
        started = {"fine": content, "coarse": content, "new": _written(content, KIB, 1)}
        states = spread(moments(disk), MOST if not shape else MOST // 4)
        relied = 0
        for state in states:
            root = await take(state.disk(), writable=False)
            relied += await judge(root, started, str(state))
            await root.close()
            # Whoever opens it for writing after the crash claims no more than it knows.
            root = await take(state.disk())
            await judge(root, started, f"{state}, opened for writing")
            await root.close()
        assert relied > 3
        assert await survive(bench, states) > 20

    run(main())


def _written(content: bytes, offset: int, fill: int) -> bytes:
    """``content`` after a write of 1 KiB."""
    data = Request("write", offset, KIB, fill).data
    return content[:offset] + data + content[offset + KIB :]


@pytest.mark.parametrize("kinds", [("write",), ("flush",), ("read",)], ids=lambda k: k[0])
def test_any_request_fails(kinds: tuple[str, ...]) -> None:
    """Opening, writing and closing, each request failing once: bitmaps stay honest."""

    async def main() -> None:
        nth, hit = 1, True
        while hit:
            disk, content = await with_bitmap()
            started = {"fine": content, "coarse": content}
            disk.fail(nth, errno.EIO, kinds=kinds)
            with suppress(BlockError):
                root = await take(disk)
                try:
                    await root.write(33 * KIB, b"x" * KIB)
                    await bitmaps.remove(bitmaps.find(root.node, "off"))
                    await root.write(100, b"y" * KIB)
                finally:
                    await root.close()
            hit = disk.failures > 0
            disk.fail(0)
            root = await take(disk.snapshot(), writable=False)
            where = f"{kinds[0]} {nth} failed"
            await judge(root, started, where)
            found = await check(root)
            assert not found.corruptions, (where, found.messages)
            await root.close()
            root = await take(disk.snapshot())
            await judge(root, started, where)
            for bitmap in list(root.node.dirty_bitmaps.values()):
                await bitmaps.remove(bitmap)
            await root.close()
            nth += 1
            assert nth < 200

    run(main())


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_the_first_bitmap_and_the_last(cluster_size: int, backed: bool) -> None:
    """The header gets the extension, and loses it; with large clusters it fills two sectors."""

    async def adding(bench: Bench) -> None:
        await bench.write(KIB, KIB, 1)
        bitmaps.add(bench.root.node, "one", granularity=512, persistent=True)
        await bench.write(5 * KIB, KIB, 1)
        await bench.reopen()
        await bench.write(7 * KIB, KIB, 1)
        await bench.reopen()
        await bitmaps.remove(bitmaps.find(bench.root.node, "one"))
        await bench.write(9 * KIB, KIB, 1)
        await bench.reopen()

    async def main() -> None:
        base = raw_disk(Request("write", 0, 50 * KIB, 0xBB).data) if backed else None
        disk = await new_image(SIZE, base=base, cluster_size=cluster_size)
        bench = await Bench.open(disk)
        content = _written(await read_all(bench.root), KIB, 1)
        bench.marks = [(0, bench.versions.copy())]
        await adding(bench)
        await bench.root.close()
        relied = 0
        states = spread(moments(disk), MOST)
        for state in states:
            root = await take(state.disk())
            relied += await judge(root, {"one": content}, str(state))
            await root.close()
        assert relied > 3
        assert await survive(bench, states) > 20

    run(main())


@pytest.mark.parametrize("seed", range(60))
def test_any_byte_of_the_bitmaps_may_be_wrong(seed: int) -> None:
    """Opening, reading and storing them ends in an error that says so, or in an image that is
    sound; the disk itself stays as it is.
    """
    chance = random.Random(seed)

    async def main() -> None:
        disk, content = await with_bitmap()
        root = await take(disk, writable=False)
        image = root.node.driver.image  # type: ignore[attr-defined]
        stored = root.node.driver.stored_bitmaps  # type: ignore[attr-defined]
        places = [(112, 48), image.bitmap_directory]
        places += [(e.bitmap_table_offset, 8) for e in stored.entries.values()]
        await root.close()
        for _ in range(chance.randint(1, 3)):
            offset, length = chance.choice(places)
            value = chance.choice((0, 1, 2, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            disk.pages.write(offset + chance.randrange(length), bytes([value]))
        for writable in (False, True):
            try:
                root = await take(disk, writable=writable)
            except BlockError:
                continue
            with suppress(BlockError):
                await bitmaps.load(root.node.dirty_bitmaps.values())
            assert await read_all(root) == content
            if writable:
                with suppress(BlockError):
                    await root.write(0, content[:KIB])
            with suppress(BlockError):
                await root.close()
        with suppress(BlockError):
            root = await take(disk, writable=False)
            assert await read_all(root) == content
            await root.close()

    run(main())
