"""Power failures: after every prefix of what reached the disk, with any single unflushed request
lost or torn at 512 bytes, the image opens, has no corruption, holds what was flushed, and of the
rest holds the old or the new, sector by sector (R1, R2, R3).

Short workloads are tried in every way; longer ones in ways drawn by a seed.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blocklayer.errors import BlockError
from blocklayer.graph.amend import amend
from blocklayer.graph.create import create_image
from blocklayer.graph.driver import BackingReference, FormatDriver
from blocklayer.graph.graph import Graph
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk
from blocklayer.testing.strategies import Request
from oracles import Oracle
from proof.chains import run
from proof.crashes import (
    REGISTRY,
    Bench,
    check,
    moments,
    new_image,
    raw_disk,
    spread,
    survive,
    take,
)

Workload = Callable[[Bench], Awaitable[None]]

KIB = 1024
CLUSTER = 512
MOST = 700
"""States tried for one workload in CI."""


async def plain_writes(bench: Bench) -> None:
    await bench.write(0, 700, 1)
    await bench.write(40 * KIB, 1500, 2)
    await bench.flush()
    await bench.write(300, 600, 3)
    await bench.write(41 * KIB, 300, 4)
    await bench.write(70 * KIB, 100, 5)
    await bench.flush()
    await bench.write(0, 5000, 6)


async def zeros(bench: Bench) -> None:
    await bench.write(0, 8 * CLUSTER, 1)
    await bench.flush()
    await bench.do("zero", 100, 3 * CLUSTER)
    await bench.do("unmap", 4 * CLUSTER, 3 * CLUSTER)
    await bench.do("zero", 40 * KIB, 2 * CLUSTER)
    await bench.flush()
    await bench.write(CLUSTER, 3 * CLUSTER, 2)
    await bench.write(5 * CLUSTER, 10, 3)
    await bench.write(40 * KIB, CLUSTER, 4)


async def discard_and_reuse(bench: Bench) -> None:
    await bench.write(0, 6 * CLUSTER, 1)
    await bench.write(10 * KIB, 4 * CLUSTER, 2)
    await bench.flush()
    await bench.do("discard", 0, 6 * CLUSTER)
    await bench.write(20 * KIB, 4 * CLUSTER, 3)
    await bench.flush()
    await bench.write(30 * KIB, 6 * CLUSTER, 4)
    await bench.do("discard", 20 * KIB, 4 * CLUSTER)
    await bench.write(0, 2 * CLUSTER, 5)
    await bench.flush()
    await bench.write(50 * KIB, 6 * CLUSTER, 6)


async def compressed(bench: Bench) -> None:
    cluster = bench.root.node.driver.allocation_unit  # type: ignore[attr-defined]
    for number in range(4):
        await bench.do("compress", number * cluster, cluster, number + 1)
    await bench.flush()
    await bench.write(cluster // 2, cluster, 9)
    far = min(8 * cluster, bench.model.size - 2 * cluster)
    await bench.do("compress", far, cluster, 7)
    await bench.flush()
    await bench.do("discard", 2 * cluster, 2 * cluster)
    await bench.do("compress", far + cluster, cluster, 8)
    await bench.write(far, cluster, 9)


async def resizing(bench: Bench) -> None:
    await bench.write(0, 3 * CLUSTER, 1)
    await bench.write(60 * KIB, 4 * KIB, 2)
    await bench.flush()
    await bench.resize(61 * KIB)
    await bench.flush()
    await bench.resize(90 * KIB)
    await bench.write(80 * KIB, 2 * KIB, 3)
    await bench.flush()
    await bench.resize(CLUSTER)
    await bench.write(0, CLUSTER, 4)
    await bench.resize(40 * KIB)
    await bench.flush()


async def l1_growth(bench: Bench) -> None:
    await bench.write(0, CLUSTER, 1)
    await bench.flush()
    await bench.resize(2200 * KIB)
    await bench.write(2199 * KIB, CLUSTER, 2)
    await bench.flush()
    await bench.write(2100 * KIB, CLUSTER, 3)


async def closing(bench: Bench) -> None:
    await bench.write(0, 3 * CLUSTER, 1)
    await bench.reopen()
    await bench.write(CLUSTER, 3 * CLUSTER, 2)
    await bench.do("discard", 0, CLUSTER)
    await bench.reopen()
    await bench.flush()


async def many_clusters(bench: Bench) -> None:
    """With wide refcounts, several new refcount blocks."""
    await bench.write(0, 24 * KIB, 1)
    await bench.flush()
    await bench.write(24 * KIB, 24 * KIB, 2)
    await bench.write(48 * KIB, 20 * KIB, 3)
    await bench.flush()
    await bench.do("discard", 10 * KIB, 30 * KIB)
    await bench.flush()
    await bench.write(70 * KIB, 5 * KIB, 4)
    await bench.write(10 * KIB, 5 * KIB, 5)


WORKLOADS: dict[str, Workload] = {
    function.__name__: function
    for function in (
        plain_writes,
        zeros,
        discard_and_reuse,
        compressed,
        resizing,
        closing,
        many_clusters,
    )
}

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide refcounts": {"refcount_bits": 64},
    "narrow refcounts": {"refcount_bits": 1},
    "version 2": {"compat": "0.10"},
    "lazy refcounts": {"lazy_refcounts": True},
    "larger clusters": {"cluster_size": 2048},
    "extended L2": {"cluster_size": 16 * KIB, "extended_l2": True},
}

LITTLE_CACHE = {"l2-cache-size": 1024, "l2-cache-entry-size": 512, "refcount-cache-size": 2048}


async def record(workload: Workload, disk: CrashingDisk, **opening: Any) -> Bench:
    """Run a workload, and close."""
    bench = await Bench.open(disk, **opening)
    disk.settle()
    bench.marks = [(0, bench.versions.copy())]
    await workload(bench)
    await bench.root.close()
    return bench


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_moment(workload: str, shape: str) -> None:
    async def main() -> None:
        disk = await new_image(80 * KIB, **SHAPES[shape])
        opening = LITTLE_CACHE if shape == "plain" else {}
        bench = await record(WORKLOADS[workload], disk, **opening)
        most = MOST if shape == "plain" else MOST // 5
        assert await survive(bench, spread(moments(disk), most)) > 20

    run(main())


@pytest.mark.parametrize("shape", ["plain", "extended L2"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_moment_over_a_backing_file(workload: str, shape: str) -> None:
    async def main() -> None:
        base = raw_disk(Request("write", 0, 50 * KIB + 512, 0xBB).data)
        disk = await new_image(80 * KIB, base=base, **SHAPES[shape])
        bench = await record(WORKLOADS[workload], disk)
        assert await survive(bench, spread(moments(disk), MOST // 2)) > 20

    run(main())


def test_l1_table_growth() -> None:
    async def main() -> None:
        disk = await new_image(60 * KIB)
        bench = await record(l1_growth, disk)
        assert await survive(bench, spread(moments(disk), 80)) > 15

    run(main())


def test_refcount_table_growth() -> None:
    """64-bit refcounts and 512-byte clusters: one table cluster covers 2 MiB of the file."""

    async def main() -> None:
        disk = await new_image(2200 * KIB, refcount_bits=64)
        root = await take(disk)
        filled = 2 * 1024 * KIB - disk.pages.size - 80 * KIB
        await root.write(0, b"\x11" * filled)
        await root.close()
        before = bytes(await _header(disk))
        disk.settle()
        bench = await Bench.open(disk)
        for step in range(8):
            await bench.write(filled + step * 16 * KIB, 16 * KIB, step + 1)
            if step % 3 == 1:
                await bench.flush()
        await bench.root.close()
        assert (await _header(disk))[48:60] != before[48:60], "the table did not move"
        moved = next(n for n, e in enumerate(disk.log) if e.kind == "write" and e.offset < CLUSTER)
        near = [state for at in range(max(0, moved - 8), moved + 5) for state in disk.states(at)]
        assert await survive(bench, spread(near, 40)) > 12

    run(main())


async def _header(disk: CrashingDisk) -> bytearray:
    head = bytearray(104)
    disk.pages.read_into(0, memoryview(head))
    return head


def test_creation() -> None:
    """A half-made image is no image, or one that reads as zeros."""

    async def main() -> None:
        disk = CrashingDisk()
        await create_image(
            Graph(REGISTRY), disk.name, "qcow2", {"cluster_size": 512}, size=100 * KIB
        )
        opened = 0
        for state in moments(disk):
            try:
                root = await take(state.disk())
            except BlockError:
                continue
            opened += 1
            assert await read_all(root) == bytes(100 * KIB), str(state)
            found = await check(root)
            assert not found.corruptions, f"{state}: {found.messages}"
            await root.close()
        assert opened

    run(main())


def test_emptying() -> None:
    """As after a commit: nothing is gone, or the backing file, which holds the same, shows."""

    async def main() -> None:
        content = Request("write", 0, 60 * KIB, 0x77).data
        base = raw_disk(content)
        disk = await new_image(60 * KIB, base=base)
        root = await take(disk)
        await root.write(0, content)
        await root.close()
        disk.settle()
        bench = await Bench.open(disk)
        driver = bench.root.node.driver
        assert isinstance(driver, FormatDriver)
        await driver.make_empty()
        await bench.flush()
        await bench.write(100, 2000, 3)
        await bench.flush()
        await bench.root.close()
        assert await survive(bench, spread(moments(disk), MOST)) > 10

    run(main())


async def amending(bench: Bench) -> None:
    async def change(**options: str) -> None:
        await amend(bench.root, options, lambda done, total: None)

    await bench.write(0, 3 * CLUSTER, 1)
    await bench.do("zero", 10 * CLUSTER, 4 * CLUSTER)
    await bench.write(40 * KIB, 3 * KIB, 2)
    await bench.flush()
    await change(refcount_bits="64")
    await bench.write(20 * CLUSTER, CLUSTER, 3)
    await bench.flush()
    await change(refcount_bits="16", compat="0.10")
    await bench.write(11 * CLUSTER, 100, 4)
    await bench.flush()
    await change(compat="1.1", lazy_refcounts="on")
    await bench.write(30 * CLUSTER, 100, 5)
    await change(lazy_refcounts="off", refcount_bits="1")


@pytest.mark.parametrize("backed", [False, True])
def test_amending(backed: bool) -> None:
    async def main() -> None:
        base = raw_disk(Request("write", 0, 50 * KIB + 512, 0xBB).data) if backed else None
        disk = await new_image(80 * KIB, base=base)
        bench = await record(amending, disk)
        assert await survive(bench, spread(moments(disk), MOST // 2)) > 20

    run(main())


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_changing_the_backing_file(cluster_size: int) -> None:
    """The header names the old file or the new one."""

    async def main() -> None:
        content = Request("write", 0, 20 * KIB, 0x77).data
        bases = [raw_disk(content), raw_disk(content)]
        disk = await new_image(20 * KIB, base=bases[0], cluster_size=cluster_size)
        bench = await Bench.open(disk)
        driver = bench.root.node.driver
        assert isinstance(driver, FormatDriver)
        await driver.change_backing(BackingReference(bases[1].name, "raw"))
        await driver.change_backing(None)
        await driver.change_backing(BackingReference(bases[0].name, "raw"))
        await bench.root.close()
        names = {base.name for base in bases} | {None}
        seen = set()
        for state in moments(disk):
            root = await take(state.disk())
            found = root.node.driver
            assert isinstance(found, FormatDriver)
            reference = found.backing_reference
            seen.add(reference and reference.filename)
            assert not (await check(root)).corruptions
            await root.close()
        assert seen == names

    run(main())


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=16k,extended_l2=on"])
@pytest.mark.parametrize("workload", ["plain_writes", "zeros", "discard_and_reuse", "compressed"])
def test_images_with_snapshots(
    qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path, workload: str, options: str
) -> None:
    """Every cluster is shared with a snapshot, whose content must stay as well."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "80k")
    qemu_io("-f", "qcow2", "-c", "write -P 9 0 60k", image)
    qemu_img("snapshot", "-c", "before", image)

    async def main() -> None:
        disk = raw_disk(image.read_bytes())
        bench = await record(WORKLOADS[workload], disk)
        assert await survive(bench, spread(moments(disk), MOST // 2)) > 20

    run(main())


def random_workload(seed: int) -> Workload:
    async def workload(bench: Bench) -> None:
        rng = random.Random(seed)
        cluster: int = bench.root.node.driver.allocation_unit  # type: ignore[attr-defined]
        kinds = ("write", "write", "write", "zero", "unmap", "discard", "flush", "compress")
        for _ in range(rng.randint(8, 25)):
            kind, size = rng.choice(kinds), bench.model.size
            if kind == "flush":
                await bench.flush()
                continue
            offset = rng.randrange(size)
            length = min(size - offset, rng.choice((10, 512, 3000, 9000)))
            if kind == "compress":
                offset -= offset % cluster
                length = min(cluster, size - offset)
            await bench.do(kind, offset, length, rng.randint(1, 255))
        if rng.random() < 0.3:
            await bench.resize(rng.randrange(1, 160) * 512)

    return workload


async def random_failures(seed: int, states: int) -> None:
    """Any mixture of requests lost and torn, at random moments of a random workload."""
    rng = random.Random(seed)
    base = raw_disk(Request("write", 0, 30 * KIB, 0xBB).data) if seed % 2 else None
    shape = rng.choice(list(SHAPES.values()))
    disk = await new_image(rng.randrange(20, 160) * 512, base=base, **shape)
    opening = rng.choice(({}, LITTLE_CACHE))
    bench = await record(random_workload(seed), disk, **opening)
    bench.unit = 1
    for number in range(states):
        position = rng.randint(0, disk.position)
        await survive(bench, disk.random_states(1, seed * 1000 + number, position))


@pytest.mark.parametrize("seed", range(12))
def test_random_mixtures(seed: int) -> None:
    run(random_failures(seed, 40))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_random_mixtures(seed: int) -> None:
    run(random_failures(seed, 300))
