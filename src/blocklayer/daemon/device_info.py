"""What can be told of devices at run time, in the words of QMP: ``query-block`` and its kin."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon.accounting import Accounting
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.devices import Device
from blocklayer.daemon.info import BlockDeviceInfo, device_info
from blocklayer.daemon.limits import show_limits
from blocklayer.drivers.file import FileDriver
from blocklayer.graph.node import Node

IoStatus = Literal["ok", "failed", "nospace"]


class BlockInfo(msgspec.Struct, kw_only=True, rename={"io_status": "io-status"}):
    """One device, with its medium if there is one."""

    device: str
    qdev: str | UnsetType = UNSET
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | UnsetType = UNSET
    tray_open: bool | UnsetType = UNSET
    io_status: IoStatus | UnsetType = UNSET


class BlockDeviceTimedStats(msgspec.Struct, kw_only=True):
    """Times of requests over an interval."""

    interval_length: int
    min_rd_latency_ns: int
    max_rd_latency_ns: int
    avg_rd_latency_ns: int
    min_wr_latency_ns: int
    max_wr_latency_ns: int
    avg_wr_latency_ns: int
    min_zone_append_latency_ns: int
    max_zone_append_latency_ns: int
    avg_zone_append_latency_ns: int
    min_flush_latency_ns: int
    max_flush_latency_ns: int
    avg_flush_latency_ns: int
    avg_rd_queue_depth: float
    avg_wr_queue_depth: float
    avg_zone_append_queue_depth: float


class BlockLatencyHistogramInfo(msgspec.Struct, kw_only=True):
    """How many requests took how long: ``bins`` between ``boundaries``, in nanoseconds."""

    boundaries: list[int]
    bins: list[int]


class BlockDeviceStats(msgspec.Struct, kw_only=True):
    """Requests of each kind since the device is there."""

    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    idle_time_ns: int | UnsetType = UNSET
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[BlockDeviceTimedStats]
    rd_latency_histogram: BlockLatencyHistogramInfo | UnsetType = UNSET
    wr_latency_histogram: BlockLatencyHistogramInfo | UnsetType = UNSET
    zone_append_latency_histogram: BlockLatencyHistogramInfo | UnsetType = UNSET
    flush_latency_histogram: BlockLatencyHistogramInfo | UnsetType = UNSET


class BlockStats(msgspec.Struct, kw_only=True, rename="kebab"):
    """A device or node, with what it stores in and, for devices, what lies below."""

    device: str | UnsetType = UNSET
    qdev: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    stats: BlockDeviceStats
    driver_specific: dict[str, Any] | UnsetType = UNSET
    parent: BlockStats | UnsetType = UNSET
    backing: BlockStats | UnsetType = UNSET


class StatusInfo(msgspec.Struct, kw_only=True):
    """Whether the machine runs, and why not."""

    running: bool
    status: str


def query_status(daemon: Daemon) -> StatusInfo:
    """The state of a machine that is not there."""
    return StatusInfo(running=daemon.status == "running", status=daemon.status)


def query_block(daemon: Daemon) -> list[BlockInfo]:
    """All devices, and drives that no device has taken."""
    return [_block_info(device) for device in daemon.devices]


def _block_info(device: Device) -> BlockInfo:
    info = BlockInfo(
        device=device.drive,
        type="unknown",
        removable=device.removable or not device.options.driver,
        locked=False,
        io_status=device.io_status,
    )
    if device.path:
        info.qdev = device.path
    if device.has_tray:
        info.tray_open = device.tray_open
    if device.node is not None:
        info.inserted = device_info(device.node)
        info.inserted.cache.writeback = device.options.write_cache != "off"
        if device.throttle_group is not None:
            show_limits(device.throttle_group, info.inserted)
    return info


def query_blockstats(daemon: Daemon, *, nodes: bool = False) -> list[BlockStats]:
    """Of all devices with what lies below them, or of all nodes one by one."""
    if nodes:
        return [_node_stats(node, backing=False) for node in daemon.graph.nodes.values()]
    return [_device_stats(device) for device in daemon.devices]


def _device_stats(device: Device) -> BlockStats:
    own = _stats(device.accounting)
    if device.node is None:
        found = BlockStats(stats=own)
    else:
        found = _node_stats(device.node, backing=True)
        found.stats = own
    found.device = device.drive
    if device.path:
        found.qdev = device.path
    return found


def _node_stats(node: Node, *, backing: bool) -> BlockStats:
    found = BlockStats(node_name=node.name, stats=_stats(Accounting()))
    if isinstance(node.driver, FileDriver):
        found.driver_specific = {
            "driver": node.driver.NAME,
            "discard-nb-ok": 0,
            "discard-nb-failed": 0,
            "discard-bytes-ok": 0,
        }
    storage = node.children.get("file")
    if storage is not None:
        found.parent = _node_stats(storage.node, backing=backing)
    if backing and node.backing is not None:
        found.backing = _node_stats(node.backing, backing=True)
    return found


def _stats(accounting: Accounting) -> BlockDeviceStats:
    stats = BlockDeviceStats(
        **accounting.totals(),
        account_invalid=accounting.invalid,
        account_failed=accounting.failed,
        timed_stats=[],
    )
    if accounting.idle_time_ns is not None:
        stats.idle_time_ns = accounting.idle_time_ns
    for kind, histogram in accounting.histograms.items():
        info = BlockLatencyHistogramInfo(boundaries=histogram.boundaries, bins=list(histogram.bins))
        setattr(stats, f"{kind}_latency_histogram", info)
    return stats
