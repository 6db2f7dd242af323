"""Limits and latency histograms of devices."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon import devices, limits
from blocklayer.graph.events import UInt64
from blocklayer.graph.throttling import ThrottleLimits
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments


class SetIoThrottle(Arguments, kw_only=True, rename=str):  # names with underscores
    """Limits of a device (by ``device`` or ``id``); 0: none. ``group``: shared with whom."""

    device: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    bps_max: int | UnsetType = UNSET
    bps_rd_max: int | UnsetType = UNSET
    bps_wr_max: int | UnsetType = UNSET
    iops_max: int | UnsetType = UNSET
    iops_rd_max: int | UnsetType = UNSET
    iops_wr_max: int | UnsetType = UNSET
    bps_max_length: int | UnsetType = UNSET
    bps_rd_max_length: int | UnsetType = UNSET
    bps_wr_max_length: int | UnsetType = UNSET
    iops_max_length: int | UnsetType = UNSET
    iops_rd_max_length: int | UnsetType = UNSET
    iops_wr_max_length: int | UnsetType = UNSET
    iops_size: int | UnsetType = UNSET
    group: str | UnsetType = UNSET


class LatencyHistogramSet(Arguments, kw_only=True):
    """A device, and boundaries in nanoseconds: for all kinds of requests, or for one."""

    id: str
    boundaries: list[UInt64] | UnsetType = UNSET
    boundaries_read: list[UInt64] | UnsetType = UNSET
    boundaries_write: list[UInt64] | UnsetType = UNSET
    boundaries_zap: list[UInt64] | UnsetType = UNSET
    boundaries_flush: list[UInt64] | UnsetType = UNSET


def _given(value: Any) -> Any:
    return None if value is UNSET else value


@COMMANDS.command("block_set_io_throttle")
async def block_set_io_throttle(monitor: Monitor, arguments: SetIoThrottle) -> None:
    """Limit what a device reads and writes."""
    daemon = monitor.server.daemon
    device = devices.find(daemon, device=_given(arguments.device), id=_given(arguments.id))
    given = msgspec.structs.asdict(arguments)
    wanted = ThrottleLimits(
        **{field: given[name] for name, field in limits.NAMES.items() if given[name] is not UNSET}
    )
    limits.set_io_throttle(daemon, device, wanted, _given(arguments.group))


@COMMANDS.command("block-latency-histogram-set")
async def block_latency_histogram_set(monitor: Monitor, arguments: LatencyHistogramSet) -> None:
    """Begin histograms of how long requests take, or forget them all."""
    limits.set_latency_histograms(
        devices.find(monitor.server.daemon, id=arguments.id),
        _given(arguments.boundaries),
        {
            "rd": _given(arguments.boundaries_read),
            "wr": _given(arguments.boundaries_write),
            "zone_append": _given(arguments.boundaries_zap),
            "flush": _given(arguments.boundaries_flush),
        },
    )
