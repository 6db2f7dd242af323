"""``commit`` of the human monitor: a disk's top layer written into the one below, there and then.

1. Requests of the disk's users wait until it is done. Interrupted at any moment, the disk reads as
   before: the top is emptied only after the layer below is on stable storage.
"""

from __future__ import annotations

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph import edit, reopen
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root, admitted
from blocklayer.jobs import commit as work
from blocklayer.jobs.copying import CopyOptions


async def commit(daemon: Daemon, name: str) -> None:
    """Commit the disk ``name``, or all devices that have something to commit ("all")."""
    if name != "all":
        await _commit(daemon.find(name))
        return
    for device in list(daemon.devices):
        if device.node is not None and len(device.node.chain()) > 1:
            await _commit(device.node)


async def _commit(node: Node) -> None:
    layers = node.chain()
    if len(layers) == 1:
        raise UsageError(f"Disk '{node.name}' has no layer below to commit to")
    top, below = layers[0], layers[1]
    for layer in (top, below):
        if layer.busy:
            raise LockedError(f"Node '{layer.name}' is busy: {layer.busy}")
    if not isinstance(top.driver, FormatDriver):
        raise UsageError(f"'{top.name}' cannot be emptied")
    was_read_only = below.read_only
    async with edit.changing(top.graph):
        await reopen.set_read_only(below, False)
        try:
            taken = int(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE)
            base = Root(below, "commit", taken, follows=False)
            try:
                upper = Root(top, "commit", int(Permission.CONSISTENT_READ), follows=False)
                try:
                    with admitted(base, upper):
                        await work.commit(upper, base, CopyOptions())
                        await work.empty(upper)
                finally:
                    await upper.close()
            finally:
                await base.close()
        finally:
            await reopen.set_read_only(below, was_read_only)
