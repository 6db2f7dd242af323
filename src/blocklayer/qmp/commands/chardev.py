"""Character devices at run time."""

from __future__ import annotations

import base64
import binascii
from typing import Literal

from msgspec import UNSET, UnsetType

from blocklayer.errors import BlockError
from blocklayer.qmp.chardev_options import BACKEND_NAMES, ChardevBackend
from blocklayer.qmp.chardevs import Chardev, PtyChardev, RingbufChardev
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments, Result


class ChardevAdd(Arguments):
    """A new device's name and what is behind it."""

    id: str
    backend: ChardevBackend


class ChardevId(Arguments):
    """A device's name."""

    id: str


class RingbufWrite(Arguments):
    """What to put into a ring buffer."""

    device: str
    data: str
    format: Literal["utf8", "base64"] = "utf8"


class RingbufRead(Arguments):
    """How much to take out of a ring buffer, in bytes."""

    device: str
    size: int
    format: Literal["utf8", "base64"] = "utf8"


class ChardevReturn(Result):
    """The terminal that was made, for ``pty``."""

    pty: str | UnsetType = UNSET


class ChardevInfo(Result):
    """One device; ``frontend-open``: whether something in the daemon uses it."""

    label: str
    filename: str
    frontend_open: bool


class ChardevBackendInfo(Result):
    """One kind of device."""

    name: str


@COMMANDS.command("chardev-add")
async def chardev_add(monitor: Monitor, arguments: ChardevAdd) -> ChardevReturn:
    """Open a new character device."""
    server, label = monitor.server, arguments.id
    if label in server.chardevs:
        raise CommandError(f"Chardev with id '{label}' already exists")
    try:
        device = await server.add_chardev(label, arguments.backend, monitor.named_descriptors)
    except BlockError as error:
        raise error.reworded(f"Failed to add chardev '{label}': {error}") from error
    return _returned(device)


@COMMANDS.command("chardev-change")
async def chardev_change(monitor: Monitor, arguments: ChardevAdd) -> ChardevReturn:
    """Put another back end in the place of a device that nobody uses."""
    return _returned(
        await monitor.server.change_chardev(
            arguments.id, arguments.backend, monitor.named_descriptors
        )
    )


@COMMANDS.command("chardev-remove")
async def chardev_remove(monitor: Monitor, arguments: ChardevId) -> None:
    """Close a character device that nobody uses."""
    await monitor.server.remove_chardev(arguments.id)


@COMMANDS.command("query-chardev")
async def query_chardev(monitor: Monitor) -> list[ChardevInfo]:
    """All character devices."""
    return [
        ChardevInfo(
            label=device.label, filename=device.filename, frontend_open=device.user is not None
        )
        for device in monitor.server.chardevs.values()
    ]


@COMMANDS.command("query-chardev-backends")
async def query_chardev_backends(monitor: Monitor) -> list[ChardevBackendInfo]:
    """The kinds of character devices there are."""
    return [ChardevBackendInfo(name=name) for name in BACKEND_NAMES]


@COMMANDS.command("ringbuf-write")
async def ringbuf_write(monitor: Monitor, arguments: RingbufWrite) -> None:
    """Append to a ring buffer."""
    ring = _ring(monitor, arguments.device)
    data = arguments.data.encode()
    if arguments.format == "base64":
        try:
            data = base64.b64decode(arguments.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise CommandError(f"Parameter 'data' is not base64: {error}") from None
    ring.put(data)


@COMMANDS.command("ringbuf-read")
async def ringbuf_read(monitor: Monitor, arguments: RingbufRead) -> str:
    """Take from the front of a ring buffer."""
    ring = _ring(monitor, arguments.device)
    if arguments.size <= 0:
        raise CommandError("size must be greater than zero")
    data = ring.take(arguments.size)
    if arguments.format == "base64":
        return base64.b64encode(data).decode("ascii")
    return data.decode("utf-8", errors="replace")


def _returned(device: Chardev) -> ChardevReturn:
    return ChardevReturn(pty=device.path if isinstance(device, PtyChardev) else UNSET)


def _ring(monitor: Monitor, label: str) -> RingbufChardev:
    device = monitor.server.chardevs.get(label)
    if device is None:
        raise CommandError(f"Device '{label}' not found")
    if not isinstance(device, RingbufChardev):
        raise CommandError(f"{label} is not a ringbuf device")
    return device
