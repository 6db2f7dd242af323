"""The human monitor's ``qemu-io``: a command of `blk io` on a disk that is in use.

1. What the command says goes to whoever asked, not to the daemon's own output.
2. The disk stays open: commands that open and close have no disk of their own here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blocklayer.cli import console
from blocklayer.daemon import devices
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.qmp.human_commands import HUMAN_COMMANDS

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

_NOT_HERE = frozenset(("open", "close", "reopen", "quit", "q", "abort", "sigraise"))


class _InUse:
    """What stands for the open image of a session."""

    def __init__(self, root: Root) -> None:
        self.root = root

    @property
    def node(self) -> Node:
        """The node that the command works on."""
        return self.root.node


@HUMAN_COMMANDS.command(
    "qemu-io", "[-d] DEVICE COMMAND...", "read and write on a disk in use (-d: a device's id)"
)
async def qemu_io(server: Server, arguments: dict[str, Any]) -> str:
    """Carry out one command on a device's medium or a node."""
    from blocklayer.cli.io.session import Session
    from blocklayer.cli.io.table import carry_out

    name, line = arguments["device"], arguments["command"].strip()
    if line.startswith('"') and line.endswith('"') and len(line) > 1:
        line = line[1:-1]
    if line.split(" ", 1)[0] in _NOT_HERE:
        raise UsageError(f"'{line}' is of no use here: the disk stays as it is")
    if arguments["d"]:
        node = devices.find(server.daemon, id=name).node
        if node is None:
            raise UsageError(f"Device '{name}' has no medium")
    else:
        node = server.daemon.find(name)
    root = _hold(node)
    devices.meet(server.daemon, root)
    try:
        session = Session(misaligned=False)
        session.image = _InUse(root)  # type: ignore[assignment]
        with console.captured() as said:
            await carry_out(session, line)
            await session.drain()
        return "".join(said)
    finally:
        await root.close()


def _hold(node: Node) -> Root:
    """A hold on ``node`` with as much as its other users allow. Raises LockedError."""
    read = int(Permission.CONSISTENT_READ)
    choices = [read]
    if not node.read_only:
        choices += [read | Permission.WRITE, read | Permission.WRITE | Permission.RESIZE]
    for taken in reversed(choices[1:]):
        try:
            return Root(node, "the human monitor", taken)
        except LockedError:
            continue
    return Root(node, "the human monitor", choices[0])
