"""Devices and their media, and the state of the machine that they would be in."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon import device_info, devices, media
from blocklayer.daemon.devices import Device
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments

DeviceProperties = msgspec.defstruct(
    "DeviceProperties",
    [
        ("driver", str),
        *(
            (field.name, Any, msgspec.field(default=UNSET, name=field.encode_name))
            for field in msgspec.structs.fields(devices.DeviceOptions)
            if field.name != "driver"
        ),
    ],
    kw_only=True,
)
"""What ``devices.DeviceOptions`` declares, with values as text or as they are."""


class DeviceId(Arguments):
    """A device's id."""

    id: str


class Tray(Arguments):
    """A drive by its name (``device``) or a device by its id."""

    device: str | UnsetType = UNSET
    id: str | UnsetType = UNSET


class ForcedTray(Tray):
    """``force``: even if a guest has locked it, which none does here."""

    force: bool = False


class InsertMedium(Arguments, kw_only=True):
    """Which device, and the node that becomes its medium."""

    id: str
    node_name: str


class ChangeMedium(Tray, kw_only=True):
    """Which device, and the image that becomes its medium."""

    filename: str
    format: str | UnsetType = UNSET
    force: bool = False
    read_only_mode: media.ReadOnlyMode = "retain"


class QueryBlockstats(Arguments):
    """``query_nodes``: nodes one by one, not devices."""

    query_nodes: bool = False


def _device(monitor: Monitor, arguments: Tray) -> Device:
    return devices.find(
        monitor.server.daemon,
        device=None if arguments.device is UNSET else arguments.device,
        id=None if arguments.id is UNSET else arguments.id,
    )


@COMMANDS.command("device_add")
async def device_add(monitor: Monitor, arguments: DeviceProperties) -> None:  # type: ignore[valid-type]
    """Plug a device in."""
    await devices.add(monitor.server.daemon, msgspec.to_builtins(arguments))


@COMMANDS.command("device_del")
async def device_del(monitor: Monitor, arguments: DeviceId) -> None:
    """Unplug a device; there is no guest who could mind."""
    await devices.delete(monitor.server.daemon, arguments.id)


@COMMANDS.command("eject")
async def eject(monitor: Monitor, arguments: ForcedTray) -> None:
    """Open the tray and take the medium out."""
    await media.eject(_device(monitor, arguments))


@COMMANDS.command("blockdev-open-tray")
async def blockdev_open_tray(monitor: Monitor, arguments: ForcedTray) -> None:
    """Open the tray."""
    media.open_tray(_device(monitor, arguments))


@COMMANDS.command("blockdev-close-tray")
async def blockdev_close_tray(monitor: Monitor, arguments: Tray) -> None:
    """Close the tray."""
    media.close_tray(_device(monitor, arguments))


@COMMANDS.command("blockdev-remove-medium")
async def blockdev_remove_medium(monitor: Monitor, arguments: DeviceId) -> None:
    """Take the medium out of an open tray."""
    await media.remove_medium(devices.find(monitor.server.daemon, id=arguments.id))


@COMMANDS.command("blockdev-insert-medium")
async def blockdev_insert_medium(monitor: Monitor, arguments: InsertMedium) -> None:
    """Put a node into an empty open tray."""
    daemon = monitor.server.daemon
    media.insert_medium(daemon, devices.find(daemon, id=arguments.id), arguments.node_name)


@COMMANDS.command("blockdev-change-medium")
async def blockdev_change_medium(monitor: Monitor, arguments: ChangeMedium) -> None:
    """Put another image in the place of the medium."""
    await media.change_medium(
        monitor.server.daemon,
        _device(monitor, arguments),
        arguments.filename,
        None if arguments.format is UNSET else arguments.format,
        arguments.read_only_mode,
    )


@COMMANDS.command("query-block")
async def query_block(monitor: Monitor) -> list[device_info.BlockInfo]:
    """All devices with their media."""
    return device_info.query_block(monitor.server.daemon)


@COMMANDS.command("query-blockstats")
async def query_blockstats(
    monitor: Monitor, arguments: QueryBlockstats
) -> list[device_info.BlockStats]:
    """How much was read and written."""
    return device_info.query_blockstats(monitor.server.daemon, nodes=arguments.query_nodes)


@COMMANDS.command("query-status")
async def query_status(monitor: Monitor) -> device_info.StatusInfo:
    """Whether the machine runs; here, whether no device has stopped it."""
    return device_info.query_status(monitor.server.daemon)


@COMMANDS.command("stop")
async def stop(monitor: Monitor) -> None:
    """Pause the machine: a mark, and an event; who uses the disks is not stopped."""
    devices.stop(monitor.server.daemon)


@COMMANDS.command("cont")
async def cont(monitor: Monitor) -> None:
    """Let the machine go on; devices that stopped on an error are well again."""
    devices.resume(monitor.server.daemon)
