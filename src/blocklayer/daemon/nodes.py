"""Nodes by name: added and removed while everything else goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options


async def add(daemon: Daemon, options: Mapping[str, Any]) -> Node:
    """Open a node from ``blockdev-add`` options, children included; it is held by its name."""
    if not options.get("node-name"):
        raise UsageError("'node-name' must be specified for the root node")
    _refuse_internal(daemon, options)
    # What nobody says anything about is writable here, and discards as told.
    node = await open_options(daemon.graph, options, Flags(read_only=False))
    node.held = True
    return node


def _refuse_internal(daemon: Daemon, options: Mapping[str, Any]) -> None:
    entry = daemon.graph.registry.table.get(str(options.get("driver")))
    if entry is not None and entry.internal:
        raise UsageError(f"Parameter 'driver' does not accept value '{options['driver']}'")
    for member in options.values():
        if isinstance(member, Mapping):
            _refuse_internal(daemon, member)


async def remove(daemon: Daemon, name: str) -> None:
    """Close the node, which nobody uses."""
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    if not node.held:
        raise UsageError(f"Node {name} is not owned by the monitor")
    if node.parents:
        raise LockedError(f"Node {name} is in use")
    node.held = False
    await daemon.graph.release(node)
