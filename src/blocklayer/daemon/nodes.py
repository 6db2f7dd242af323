"""Nodes by name: added and removed while everything else goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph import edit, io, reopen, write_threshold
from blocklayer.graph.driver import BackingReference, FormatDriver
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root


async def add(daemon: Daemon, options: Mapping[str, Any]) -> Node:
    """Open a node from ``blockdev-add`` options, children included; it is held by its name."""
    if options.get("node-name") is None:
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
        for each in member if isinstance(member, list) else [member]:
            if isinstance(each, Mapping):
                _refuse_internal(daemon, each)


async def remove(daemon: Daemon, name: str) -> None:
    """Close the node, which nobody uses."""
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    if any(edge.parent is None for edge in node.parents):
        raise LockedError(f"Node {name} is in use")
    if node.busy:
        raise LockedError(f"Node '{name}' is busy: {node.busy}")
    if not node.held:
        raise UsageError(f"Node {name} is not owned by the monitor")
    if node.parents:
        raise LockedError(f"Block device {name} is in use")
    node.held = False
    await daemon.graph.release(node)


def pick(daemon: Daemon, device: str | None, node_name: str | None) -> Node:
    """The medium of ``device``, else the node ``node_name``. Raises UsageError."""
    found = daemon.device_medium(device) if device else None
    if found is None and node_name:
        found = daemon.graph.nodes.get(node_name)
    if found is None:
        raise UsageError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
    return found


async def resize(
    daemon: Daemon, size: int, *, device: str | None = None, node_name: str | None = None
) -> None:
    """Change the size of a disk. Requests under way end first; those that come wait."""
    node = pick(daemon, device, node_name)
    if size < 0:
        raise UsageError("Parameter 'size' expects a >0 size")
    if node.busy:
        raise LockedError(f"Node '{node.name}' is busy: {node.busy}")
    taken = int(Permission.WRITE | Permission.RESIZE)
    async with edit.changing(daemon.graph, node):
        root = Root(node, "a resize", taken, follows=False)
        try:
            await io.truncate(node, size, shrink=True)
        finally:
            await root.close()


async def change_backing_file(
    daemon: Daemon, device: str, image_name: str, backing_file: str
) -> None:
    """Let the image of a node, which is part of ``device``, name another backing file.

    Only the image's header changes; what it says is not looked at.
    """
    top = daemon.find(device)
    node = daemon.graph.nodes.get(image_name)
    if node is None:
        raise UsageError(f"Cannot find device='' nor node-name='{image_name}'")
    if node not in top.chain():
        raise UsageError(f"'{image_name}' not found in backing chain of '{device}'")
    driver = node.driver
    if not isinstance(driver, FormatDriver) or driver.backing_reference is None:
        raise UsageError("not allowing backing file change on an image without a backing file")
    if node.busy:
        raise LockedError(f"Node '{node.name}' is busy: {node.busy}")
    format = driver.backing_reference.format
    async with edit.changing(daemon.graph, node):
        was_read_only = node.read_only
        await reopen.set_read_only(node, False)
        try:
            driver = node.driver
            assert isinstance(driver, FormatDriver)
            await driver.change_backing(BackingReference(backing_file, format))
        finally:
            await reopen.set_read_only(node, was_read_only)


def set_write_threshold(daemon: Daemon, name: str, offset: int) -> None:
    """Tell when the node is written past ``offset``, once; 0: do not."""
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Device '{name}' not found")
    write_threshold.put(node, offset)


async def change_children(
    daemon: Daemon, parent: str, *, child: str | None = None, node: str | None = None
) -> None:
    """Let a quorum have the node ``node`` as one more child, or let it go without ``child``."""
    from blocklayer.drivers.quorum import QuorumDriver

    found = daemon.find(parent)
    if child is not None and node is not None:
        raise UsageError("The parameters child and node are in conflict")
    if child is None and node is None:
        raise UsageError("Either child or node must be specified")
    if child is not None and child not in found.children:
        raise UsageError(f"Node '{parent}' does not have child '{child}'")
    new = daemon.graph.nodes.get(node) if node is not None else None
    if node is not None and new is None:
        raise UsageError(f"Node '{node}' not found")
    if not isinstance(found.driver, QuorumDriver):
        verb = "adding" if child is None else "removing"
        raise UsageError(f"The node {found.name} does not support {verb} a child")
    if found.busy:
        raise LockedError(f"Node '{found.name}' is busy: {found.busy}")
    gone: Node | None = None
    async with edit.changing(daemon.graph):
        if new is not None:
            found.driver.add_child(new)
        elif child is not None:
            gone = found.driver.remove_child(child)
    if gone is not None:
        await daemon.graph.release(gone)
