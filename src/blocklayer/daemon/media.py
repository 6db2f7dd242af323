"""Media: put into drives that take them, and taken out again.

1. A medium goes in or out only while the tray is open; ``eject`` and ``change`` open and close it.
2. A medium that nobody else holds is closed when it is taken out.
"""

from __future__ import annotations

from typing import Literal

from blocklayer.daemon import devices
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.devices import Device
from blocklayer.errors import UsageError
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image

ReadOnlyMode = Literal["retain", "read-only", "read-write"]


def open_tray(device: Device) -> None:
    """Open the tray; a device without one refuses."""
    _check_removable(device)
    device.move_tray(to_open=True)


def close_tray(device: Device) -> None:
    """Close the tray."""
    _check_removable(device)
    device.move_tray(to_open=False)


async def remove_medium(device: Device) -> None:
    """Take the medium out of an open tray."""
    _check_removable(device)
    if device.has_tray and not device.tray_open:
        raise UsageError(f"Tray of device '{device.name}' is not open")
    await device.remove()


def insert_medium(daemon: Daemon, device: Device, node_name: str) -> None:
    """Put a node into an empty open tray."""
    node = daemon.graph.nodes.get(node_name)
    if node is None:
        raise UsageError(f"Node '{node_name}' not found")
    if any(each.node is node for each in daemon.devices):
        raise UsageError(f"Node '{node_name}' is already in use")
    _check_removable(device)
    if device.has_tray and not device.tray_open:
        raise UsageError(f"Tray of device '{device.name}' is not open")
    if device.medium is not None:
        raise UsageError(f"There already is a medium in device '{device.name}'")
    device.insert(node)


async def eject(device: Device) -> None:
    """Open the tray and take the medium out, if there is one."""
    open_tray(device)
    await device.remove()


async def change_medium(
    daemon: Daemon,
    device: Device,
    filename: str,
    format: str | None = None,
    read_only_mode: ReadOnlyMode = "retain",
) -> None:
    """Another image in the place of the medium. If it cannot be opened, all stays as it is."""
    _check_removable(device)
    old = device.node
    read_only = read_only_mode == "read-only"
    if read_only_mode == "retain":
        read_only = old.read_only if old is not None else device.options.driver in devices.CDS
    flags = Flags(read_only=read_only)
    node = await open_image(daemon.graph, filename, format=format, flags=flags)
    try:
        device.move_tray(to_open=True)
        await device.remove()
        device.insert(node)
    except BaseException:
        await daemon.graph.release(node)
        raise
    device.move_tray(to_open=False)


def _check_removable(device: Device) -> None:
    if not device.removable:
        raise UsageError(f"Device '{device.name}' is not removable")
