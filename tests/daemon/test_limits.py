"""Devices' limits, accounting and latency histograms: requests by every way to a device count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.addresses import UnixSocketAddress
from blocklayer.codec.nbd.constants import Command
from blocklayer.daemon import devices, exports, nodes
from blocklayer.daemon.accounting import Histogram
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.device_info import query_block, query_blockstats
from blocklayer.errors import BlockError, StorageError
from blocklayer.graph import edit
from blocklayer.graph.events import BlockIoError, Event
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.qmp.local import execute
from blocklayer.qmp.server import Server
from blocklayer.units import KIB, MIB
from nbd.serving import Client, run

NONE = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}
PATH = "/machine/peripheral/v0/virtio-backend"


@asynccontextmanager
async def machine(**disk: Any) -> AsyncIterator[Server]:
    """A server with the disks v0 and v1, on the nodes n0 and n1."""
    server = Server(daemon=Daemon())
    try:
        for name in ("0", "1"):
            options = {"driver": "memory", "size": MIB, **disk, "node-name": f"n{name}"}
            await nodes.add(server.daemon, options)
            given = {"driver": "virtio-blk-pci", "id": f"v{name}", "drive": f"n{name}"}
            await devices.add(server.daemon, given)
        yield server
    finally:
        await server.close()


def guest(server: Server, node: str = "n0") -> Root:
    """Somebody who serves the node, and so the device on it."""
    taken = Permission.CONSISTENT_READ | Permission.WRITE
    root = Root(server.daemon.graph.nodes[node], "the guest", int(taken))
    devices.meet(server.daemon, root)
    return root


async def throttle(server: Server, id: str = PATH, **limits: Any) -> None:
    await execute(server, "block_set_io_throttle", {"id": id, **NONE, **limits})


def inserted(server: Server, which: int = 0) -> Any:
    return query_block(server.daemon)[which].inserted


def test_limits_are_shown_and_hold() -> None:
    async def scene() -> None:
        async with machine() as server:
            root = guest(server)
            await throttle(server, iops=100, iops_max=200, iops_max_length=3, iops_size=4096)
            info = inserted(server)
            assert (info.iops, info.iops_max, info.iops_max_length) == (100, 200, 3)
            assert (info.iops_size, info.group, info.bps) == (4096, "v0", 0)
            await throttle(server, bps_wr=KIB)
            await root.write(0, bytes(512))
            late = asyncio.ensure_future(root.write(0, bytes(512)))
            await root.read(0, 512)
            await root.flush()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not late.done()
            # Whoever changes the graph does not wait for it.
            async with edit.changing(server.daemon.graph):
                assert not late.done()
            await throttle(server)
            await late
            assert inserted(server).group is not None
            assert inserted(server).bps_wr == 0
            assert not server.daemon.throttle_groups
            await root.close()

    run(scene())


def test_groups_are_shared() -> None:
    async def scene() -> None:
        async with machine() as server:
            await throttle(server, group="both", iops=10)
            await throttle(server, "v1", group="both", bps=5 * MIB)
            assert [inserted(server, n).bps for n in (0, 1)] == [5 * MIB, 5 * MIB]
            assert [inserted(server, n).iops for n in (0, 1)] == [0, 0]
            await throttle(server, "v1", group="other", iops=7)
            assert [inserted(server, n).group for n in (0, 1)] == ["both", "other"]
            await execute(server, "object-add", {"qom-type": "throttle-group", "id": "made"})
            await throttle(server, "v1", group="made", iops=8)
            assert set(server.daemon.throttle_groups) == {"both"}
            with pytest.raises(BlockError, match="in use"):
                await execute(server, "object-del", {"id": "made"})
            await devices.delete(server.daemon, "v1")
            await execute(server, "object-del", {"id": "made"})

    run(scene())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bps": 1, "bps_rd": 1}, "cannot be used at the same time"),
        ({"iops": -1}, "must be within"),
        ({"iops_max": 5}, "require corresponding"),
        ({"iops": 5, "iops_max": 4}, "cannot be lower"),
        ({"iops": 5, "iops_max_length": 4}, "without burst rate"),
        ({"iops_size": 512, "bps": 4}, "requires an iops value"),
        ({"id": "nope"}, "not found"),
        ({"device": "v0"}, "exactly one"),
    ],
)
def test_mistakes_change_nothing(given: dict[str, Any], said: str) -> None:
    async def scene() -> None:
        async with machine() as server:
            await throttle(server, iops=10)
            with pytest.raises(BlockError, match=said):
                await throttle(server, **given)
            assert (inserted(server).iops, inserted(server).group) == (10, "v0")

    run(scene())


def test_an_export_is_limited_counted_and_ends(tmp_path: Path) -> None:
    """Its plain requests go by the short way, and count; those that wait do not keep it open."""

    async def scene() -> None:
        async with machine() as server:
            daemon = server.daemon
            address = UnixSocketAddress(path=str(tmp_path / "n"))
            await exports.nbd_server_start(daemon, address)
            export = await exports.block_export_add(daemon, "e", "n0", writable=True)
            client = await Client.connect(tmp_path / "n", "n0")
            for _ in range(4):
                await client.do(Command.WRITE, 64 * KIB, payload=b"x" * 4096)
                await client.do(Command.READ, 64 * KIB, 4096)
            stats = query_blockstats(daemon)[0].stats
            assert (stats.wr_operations, stats.wr_bytes) == (4, 4 * 4096)
            assert (stats.rd_operations, stats.rd_bytes) == (4, 4 * 4096)
            assert stats.wr_highest_offset == 68 * KIB
            assert 0 < stats.rd_total_time_ns < 10**10
            await throttle(server, bps=1)
            for _ in range(3):
                client.ask(Command.READ, 0, 4096)
            group = daemon.devices[0].throttle_group
            while not any(member.waiting["read"] for member in group.members):
                await asyncio.sleep(0)
            await exports.nbd_server_stop(daemon)
            assert export.root.front_end is None
            assert not daemon.devices[0].ways

    run(scene())


def test_failures_are_judged() -> None:
    async def scene() -> None:
        async with machine() as server:
            heard: list[Event] = []
            server.daemon.graph.listeners.append(heard.append)
            root = guest(server)
            with pytest.raises(StorageError):
                await root.read(MIB, 512)
            stats = query_blockstats(server.daemon)[0].stats
            assert (stats.failed_rd_operations, stats.rd_operations) == (1, 0)
            (event,) = heard
            assert isinstance(event, BlockIoError)
            assert (event.qom_path, event.operation, event.action) == (PATH, "read", "report")
            server.daemon.devices[0].options.werror = "ignore"
            await root.write(MIB, b"x")
            await root.close()

    run(scene())


def test_media_and_their_users_meet_in_any_order() -> None:
    async def scene() -> None:
        async with machine() as server:
            root = guest(server)
            device = server.daemon.devices[0]
            assert device.ways
            await devices.delete(server.daemon, "v0")
            assert root.front_end is None
            await root.read(0, 512)
            await root.close()
            assert device.accounting.kinds["rd"].operations == 0

    run(scene())


def test_histograms() -> None:
    async def scene() -> None:
        async with machine() as server:
            root = guest(server)
            name = "block-latency-histogram-set"
            await execute(server, name, {"id": "v0", "boundaries": [1, 10**12]})
            await execute(server, name, {"id": "v0", "boundaries-read": [10**12]})
            await root.read(0, 512)
            await root.write(0, b"x")
            await root.flush()
            stats = query_blockstats(server.daemon)[0].stats
            assert stats.rd_latency_histogram.bins == [1, 0]
            assert stats.wr_latency_histogram.bins == [0, 1, 0]
            assert stats.flush_latency_histogram.boundaries == [1, 10**12]
            for wrong in ([0], [5, 5], [7, 3]):
                with pytest.raises(BlockError, match="must grow"):
                    await execute(server, name, {"id": "v0", "boundaries-write": wrong})
            await execute(server, name, {"id": "v0"})
            assert not server.daemon.devices[0].accounting.histograms
            await root.close()

    run(scene())


@given(st.sets(st.integers(1, 100)), st.lists(st.integers(0, 120)))
def test_bins(boundaries: set[int], times: list[int]) -> None:
    histogram = Histogram(sorted(boundaries))
    for each in times:
        histogram.add(each)
    edges = [0, *sorted(boundaries), 1000]
    expected = [sum(low <= t < high for t in times) for low, high in pairwise(edges)]
    assert histogram.bins == expected
