"""Power failures and failing disks under formats other than qcow2.

After a power failure the image opens, passes its check, holds what was flushed, and of the rest
holds the old or the new, sector by sector. After a request to the disk has failed, the image opened
again holds the old or the new as well.
"""

from __future__ import annotations

import errno

import pytest

from blocklayer.drivers import tables
from blocklayer.errors import BlockError, UnsupportedError
from blocklayer.graph.create import create_image
from blocklayer.graph.graph import Graph
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk, State
from blocklayer.units import align_down
from drivers.images import MIB, Kind
from proof.chains import run
from proof.crashes import REGISTRY, Bench, check, moments, spread, take

KIB = 1024
STATES_MAX = 160
EVERY = 24
"""So many requests fail in turn; of those behind them, every fifth."""

KINDS = [
    Kind("vdi", size=5 * MIB // 4),
    Kind("vpc", {"force_size": "on"}, size=9 * MIB // 4),
    Kind("vhdx", {"block_size": "1M"}, size=5 * MIB // 4),
    Kind("vmdk", size=MIB // 2),
    Kind("vmdk", {"zeroed_grain": "on"}, size=MIB // 2),
    Kind("vmdk", {"subformat": "streamOptimized"}, size=MIB // 2),
    Kind("qed", {"cluster_size": "4096"}, size=MIB // 2),
    Kind("qcow", size=MIB // 2),
    Kind("parallels", {"cluster_size": "4096"}, size=MIB // 2),
]
OVERLAYS = ("vmdk", "qed", "qcow")
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


async def new_disk(kind: Kind, base: CrashingDisk | None = None) -> CrashingDisk:
    disk = CrashingDisk()
    await create_image(
        Graph(REGISTRY),
        disk.name,
        kind.format,
        kind.options,
        size=kind.size,
        backing=None if base is None else base.name,
        backing_format=None if base is None else kind.format,
    )
    disk.settle()
    return disk


async def workload(bench: Bench) -> None:
    """New blocks, one by one and across borders, zeros, writes to old blocks; three flushes."""
    size = bench.root.node.size
    await bench.write(0, 700, 1)
    await bench.write(size // 2, 70 * KIB, 2)
    await bench.flush()
    await bench.write(300, 600, 3)
    await bench.write(size - 4 * KIB, 4 * KIB, 4)
    await bench.do("zero", size // 2 + KIB, 66 * KIB)
    await bench.flush()
    await bench.write(size // 4, 3 * KIB, 5)
    await bench.flush()
    await bench.write(size // 4 + 64 * KIB, 512, 6)


async def judge(bench: Bench, state: State, format: str) -> None:
    root = await take(state.disk(), format=format)
    try:
        problem = bench.explain(state.position, await read_all(root))
        assert problem is None, f"{state}: {problem}"
        try:
            found = await check(root)
        except UnsupportedError:
            return
        # Space that a crash left unused is no damage, but VDI's header counts it.
        harmless = ("allocated blocks mismatch", "space leaked at the end")
        messages = [text for text in found.messages if not any(h in text for h in harmless)]
        assert not messages, f"{state}: {messages}"
    finally:
        await root.close()


@pytest.fixture(params=["large caches", "full caches"])
def _caches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are written when they are flushed, or all the time."""
    if request.param == "full caches":
        monkeypatch.setattr(tables, "MAX_BYTES", 0)


@pytest.mark.usefixtures("_caches")
@each_kind
def test_power_failures(kind: Kind) -> None:
    async def main() -> None:
        disk = await new_disk(kind)
        bench = await Bench.open(disk, format=kind.format)
        await workload(bench)
        await bench.root.close()
        bench.versions.flushed()
        for state in spread(moments(disk), STATES_MAX):
            try:
                await judge(bench, state, kind.format)
            except BlockError as error:
                raise AssertionError(f"{state}: {error}") from error

    run(main())


@pytest.mark.parametrize("kind", [k for k in KINDS if k.format in OVERLAYS], ids=str)
def test_power_failures_over_a_backing_file(kind: Kind) -> None:
    """New clusters of an overlay must not show before their data: the backing file's was there."""

    async def main() -> None:
        base = await new_disk(Kind(kind.format, size=kind.size))
        root = await take(base, format=kind.format)
        await root.write(0, b"base" * (kind.size // 4))
        await root.close()
        base.settle()
        disk = await new_disk(kind, base)
        bench = await Bench.open(disk, format=kind.format)
        await workload(bench)
        await bench.root.close()
        for state in spread(moments(disk), STATES_MAX // 2):
            await judge(bench, state, kind.format)

    run(main())


@pytest.mark.usefixtures("_caches")
@each_kind
def test_each_request_to_the_disk_may_fail(kind: Kind) -> None:
    async def attempt(nth: int) -> bool:
        """Whether a request failed."""
        disk = await new_disk(kind)
        bench = await Bench.open(disk, format=kind.format)
        disk.fail(nth, errno.ENOSPC if nth % 2 else errno.EIO)
        refused = False
        try:
            await workload(bench)
        except BlockError:
            refused = True
        # The same again: it works, or is refused with a reason; never something else.
        # The last is in a place that nothing was written to: it must not take anybody's space.
        for offset in (0, kind.size // 2, align_down(kind.size * 3 // 4, 512)):
            try:
                await bench.write(offset, 5 * KIB, 9)
            except BlockError:
                refused = True
        try:
            await bench.root.close()
        except BlockError:
            refused = True
        failed = bool(disk.failures)
        disk.fail(0)
        root = await take(disk, format=kind.format)
        problem = bench.explain(disk.position, await read_all(root))
        assert problem is None, f"request {nth} failed: {problem}"
        await root.close()
        assert refused or not failed
        return failed

    async def main() -> None:
        nth = 1
        while await attempt(nth):
            nth += 1 if nth < EVERY else 5
        assert nth > 5

    run(main())
