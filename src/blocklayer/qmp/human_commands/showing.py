"""What the human monitor shows of disks: devices, counters, jobs, internal snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from blocklayer.daemon import device_info, info
from blocklayer.daemon.device_info import BlockInfo, BlockStats
from blocklayer.daemon.info import BlockDeviceInfo
from blocklayer.qmp.human import HUMAN_COMMANDS
from blocklayer.qmp.local import execute
from blocklayer.units import format_size

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

_COUNTERS = (
    "rd_bytes",
    "wr_bytes",
    "rd_operations",
    "wr_operations",
    "flush_operations",
    "wr_total_time_ns",
    "rd_total_time_ns",
    "flush_total_time_ns",
    "rd_merged",
    "wr_merged",
)


@HUMAN_COMMANDS.command("info block", "[-n] [-v] [DEVICE]", "show devices (-n: nodes; -v: more)")
async def info_block(server: Server, arguments: dict[str, Any]) -> str:
    """Devices with their media, or nodes."""
    wanted, verbose = arguments["device"], arguments["v"]
    if arguments["n"]:
        texts = [
            _inserted(node.node_name or "", node, None, verbose)
            for node in info.named_nodes(server.daemon, flat=True)
            if wanted in (None, node.node_name)
        ]
    else:
        texts = [
            _device(device, verbose)
            for device in device_info.query_block(server.daemon)
            if wanted is None or wanted in _names(device)
        ]
    return "\n".join(texts)


def _names(device: BlockInfo) -> tuple[str, ...]:
    qdev = "" if device.qdev is UNSET else device.qdev
    return device.device, qdev, qdev.removeprefix("/machine/peripheral/").split("/")[0]


def _device(device: BlockInfo, verbose: bool) -> str:
    if device.inserted is UNSET:
        name = device.device or _names(device)[2] or "<anonymous>"
        return f"{name}: [not inserted]\n" + _attachment(device)
    name = device.inserted.node_name or ""
    title = f"{device.device} ({name})" if device.device else str(name)
    return _inserted(title, device.inserted, device, verbose)


def _attachment(device: BlockInfo) -> str:
    text = ""
    if device.qdev is not UNSET:
        text += f"    Attached to:      {device.qdev}\n"
    if device.io_status not in (UNSET, "ok"):
        text += f"    I/O status:       {device.io_status}\n"
    if device.removable:
        locked = "" if device.locked else "not "
        tray = "open" if device.tray_open is True else "closed"
        text += f"    Removable device: {locked}locked, tray {tray}\n"
    return text


def _inserted(title: str, node: BlockDeviceInfo, device: BlockInfo | None, verbose: bool) -> str:
    notes = ", read-only" if node.ro else ""
    notes += ", encrypted" if node.encrypted else ""
    text = f"{title}: {node.file} ({node.drv}{notes})\n"
    if device is not None:
        text += _attachment(device)
    cache = "writeback" if node.cache.writeback else "writethrough"
    cache += ", direct" if node.cache.direct else ""
    cache += ", ignore flushes" if node.cache.no_flush else ""
    text += f"    Cache mode:       {cache}\n"
    if node.backing_file is not UNSET:
        depth = node.backing_file_depth
        text += f"    Backing file:     {node.backing_file} (chain depth: {depth})\n"
    if node.detect_zeroes != "off":
        text += f"    Detect zeroes:    {node.detect_zeroes}\n"
    if verbose:
        size = node.image.virtual_size
        text += (
            f"\nImages:\nimage: {node.image.filename}\nfile format: {node.image.format}\n"
            f"virtual size: {format_size(size)} ({size} bytes)\n"
        )
        if node.image.actual_size is not UNSET:
            text += f"disk size: {format_size(node.image.actual_size)}\n"
    return text


@HUMAN_COMMANDS.command("info blockstats", "", "show how much was read and written")
async def info_blockstats(server: Server, arguments: dict[str, Any]) -> str:
    """Counters of devices."""
    return "".join(map(_stats, device_info.query_blockstats(server.daemon)))


def _stats(found: BlockStats) -> str:
    name = found.device or found.qdev or found.node_name
    counters = " ".join(f"{name}={getattr(found.stats, name)}" for name in _COUNTERS)
    return f"{name}: {counters}\n"


@HUMAN_COMMANDS.command("info block-jobs", "", "show jobs that work on disks")
async def info_block_jobs(server: Server, arguments: dict[str, Any]) -> str:
    """Jobs and how far they are."""
    jobs = await execute(server, "query-block-jobs", {})
    if not jobs:
        return "No active jobs\n"
    text = ""
    for job in jobs:
        what = (
            f"Streaming device {job['device']}"
            if job["type"] == "stream"
            else f"Type {job['type']}, device {job['device']}"
        )
        text += (
            f"{what}: Completed {job['offset']} of {job['len']} bytes, "
            f"speed limit {job['speed']} bytes/s\n"
        )
    return text


@HUMAN_COMMANDS.command("info snapshots", "", "show the internal snapshots of disks")
async def info_snapshots(server: Server, arguments: dict[str, Any]) -> str:
    """Snapshots by the disk they are in."""
    text = ""
    for device in server.daemon.devices:
        node = device.node
        general = node.driver.info() if node is not None else None
        if general is None or not general.snapshots:
            continue
        text += f"List of snapshots present in '{device.name}':\n"
        text += f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8}\n"
        for snapshot in general.snapshots:
            size = format_size(snapshot.vm_state_size)
            text += f"{snapshot.id:<7} {snapshot.name:<16} {size:>8}\n"
    return text or "There is no snapshot available.\n"


@HUMAN_COMMANDS.command("info status", "", "show whether the machine runs")
async def info_status(server: Server, arguments: dict[str, Any]) -> str:
    """Running or paused."""
    status = server.daemon.status
    if status in ("running", "paused"):
        return f"VM status: {status}\n"
    return f"VM status: paused ({status})\n"


@HUMAN_COMMANDS.command("info chardev", "", "show character devices")
async def info_chardev(server: Server, arguments: dict[str, Any]) -> str:
    """Labels and what is behind them."""
    return "".join(f"{c.label}: filename={c.filename}\n" for c in server.chardevs.values())
