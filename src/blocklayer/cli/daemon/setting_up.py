"""Options of `blk daemon`, carried out: each is one step, and stands for a command of QMP.

1. Steps are taken in the order given. If there are options of the emulator among them, it is its
   order: objects and character devices, nodes, drives, devices, servers, monitors.
2. A value is JSON if it begins with ``{``, else ``key=value,…`` with dotted keys.
3. ``--state`` opens what the last daemon had open; nodes that it knows are not opened by options
   that come after it.
4. What is said when a step fails names the option, and its value unless that may be secret.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any, Final

from blocklayer.errors import BlockError, StorageError, UsageError
from blocklayer.graph.events import Event, JobStatusChange
from blocklayer.graph.options import decode, parse_pairs, unflatten

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server


async def set_up(server: Server, uses: list[tuple[str, Any]]) -> None:
    """Carry out all options. Raises BlockError for the first that fails."""
    if any(option in _EMULATORS for option, _ in uses):
        uses = sorted(uses, key=lambda use: _ORDER.get(use[0], 0))
    snapshot = ("snapshot", True) in uses
    for option, value in uses:
        step = _STEPS.get(option)
        if step is None:
            continue
        try:
            if option == "drive":
                await _drive(server, value, snapshot=snapshot)
            else:
                await step(server, value)
        except BlockError as error:
            # What objects are made from is secret.
            given = "" if option == "object" else f" {value}"
            raise error.reworded(f"--{option.replace('_', '-')}{given}: {error}") from error
    server.after_command()


def read_options(text: str, implied: str | None = None) -> dict[str, Any]:
    """An option's value: JSON if it begins with ``{``, else ``key=value,…`` with dotted keys."""
    if not text.startswith("{"):
        return unflatten(parse_pairs(text, implied=implied))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"invalid JSON: {error}") from None
    assert isinstance(value, dict)
    return value


async def _blockdev(server: Server, value: str) -> None:
    from blocklayer.daemon import nodes

    options = read_options(value, "driver")
    known = server.daemon.graph.nodes.get(options.get("node-name", ""))
    if known is not None and server.keeps_state:
        # The state file has it already, as it was when the last daemon ended.
        return
    await nodes.add(server.daemon, options)


async def _chardev(server: Server, value: str) -> None:
    from blocklayer.qmp.chardev_options import parse_chardev

    options = parse_chardev(value)
    await server.add_chardev(options.id, options.backend)


async def _monitor(server: Server, value: str) -> None:
    from blocklayer.qmp.chardev_options import MonitorOptions

    first = value.partition(",")[0]
    if first not in server.chardevs and (":" in first or first in _HUMAN_DEVICES):
        # What the emulator means by its option of that name.
        if first != "none":
            await _short_monitor(server, value, mode="readline")
        return
    server.add_monitor(decode(MonitorOptions, read_options(value, "chardev")))


async def _mon(server: Server, value: str) -> None:
    from blocklayer.qmp.chardev_options import MonitorOptions

    options = {"mode": "readline", **read_options(value, "chardev")}
    server.add_monitor(decode(MonitorOptions, options))


async def _nbd_server(server: Server, value: str) -> None:
    from blocklayer.qmp.local import execute_text

    options = read_options(value)
    address = options.get("addr")
    if isinstance(address, dict) and "data" not in address:
        kind = address.pop("type", None)
        options["addr"] = {"type": kind, "data": address}
    await execute_text(server, "nbd-server-start", options)


async def _export(server: Server, value: str) -> None:
    from blocklayer.qmp.local import execute_text

    await execute_text(server, "block-export-add", read_options(value, "type"))


async def _object(server: Server, value: str) -> None:
    from blocklayer.qmp.local import execute_text

    await execute_text(server, "object-add", read_options(value, "qom-type"))


async def _state(server: Server, value: str) -> None:
    from blocklayer.cli import console
    from blocklayer.daemon.state import StateFile

    state = StateFile(server.daemon, value)
    for job in await state.restore():
        console.warning(f"job '{job.id}' ({job.type}) was {job.status} when the last daemon ended")

    def keep() -> None:
        if not server.stopping.is_set():
            state.store()

    def keep_soon(event: Event) -> None:
        if isinstance(event, JobStatusChange):
            asyncio.get_running_loop().call_soon(keep_or_say)

    def keep_or_say() -> None:
        try:
            keep()
        except BlockError as error:
            console.error(str(error))

    server.after_command, server.keeps_state = keep, True
    server.daemon.graph.listeners.append(keep_soon)


async def _add_fd(server: Server, value: str) -> None:
    options = read_options(value)
    try:
        number = int(options.pop("fd"))
        wanted = int(options.pop("set"))
    except (KeyError, ValueError):
        raise UsageError("add-fd needs fd=NUMBER and set=NUMBER") from None
    note = options.pop("opaque", None)
    if options:
        raise UsageError(f"Parameter '{next(iter(options))}' is unexpected")
    try:
        os.fstat(number)
        server.descriptor_sets.add(os.dup(number), wanted, note)
    except OSError as error:
        raise StorageError.from_os(error, f"fd={number}") from None


async def _drive(server: Server, value: str, *, snapshot: bool = False) -> None:
    from blocklayer.daemon import drives

    await drives.add(server.daemon, read_options(value), snapshot=snapshot)


async def _device(server: Server, value: str) -> None:
    from blocklayer.daemon import devices

    await devices.add(server.daemon, read_options(value, "driver"))


async def _qmp(server: Server, value: str) -> None:
    await _short_monitor(server, value)


async def _qmp_pretty(server: Server, value: str) -> None:
    await _short_monitor(server, value, pretty=True)


async def _short_monitor(server: Server, value: str, **options: Any) -> None:
    """A monitor on a character device given in short, which gets a name that nobody has."""
    from blocklayer.qmp.chardev_options import MonitorOptions, parse_device

    name = f"compat_monitor{len(server.chardevs)}"
    device = parse_device(value, name)
    if not isinstance(device, str):
        await server.add_chardev(device.id, device.backend)
    label = device if isinstance(device, str) else device.id
    server.add_monitor(MonitorOptions(chardev=label, **options))


_HUMAN_DEVICES: Final = frozenset(("stdio", "pty", "null", "none", "vc"))
_EMULATORS: Final = frozenset(("drive", "device", "qmp", "qmp_pretty", "mon", "add_fd", "snapshot"))
_STEPS: Final = {
    "add_fd": _add_fd,
    "object": _object,
    "chardev": _chardev,
    "state": _state,
    "blockdev": _blockdev,
    "drive": _drive,
    "device": _device,
    "nbd_server": _nbd_server,
    "export": _export,
    "monitor": _monitor,
    "mon": _mon,
    "qmp": _qmp,
    "qmp_pretty": _qmp_pretty,
}
"""In the emulator's order."""
_ORDER: Final = {name: place for place, name in enumerate(_STEPS)}
