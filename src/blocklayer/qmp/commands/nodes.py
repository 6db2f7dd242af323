"""Nodes: added, removed, resized, and told of."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from blocklayer.daemon import activation, info, nodes, reopening
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.nodes import BlockdevOptions
from blocklayer.qmp.registry import Arguments


class NodeName(Arguments, kw_only=True):
    """Which node."""

    node_name: str


class BlockdevReopen(Arguments, kw_only=True):
    """All options that the nodes are to have."""

    options: list[BlockdevOptions]


class BlockdevSetActive(Arguments, kw_only=True):
    """Which node (all if none is named), and whether it is to be active."""

    node_name: str | UnsetType = UNSET
    active: bool


class BlockdevChange(Arguments):
    """A node, and the child that it is to lose, or the node that it is to get as one."""

    parent: str
    child: str | UnsetType = UNSET
    node: str | UnsetType = UNSET


class QueryNamedBlockNodes(Arguments, kw_only=True):
    """``flat``: without the backing images of each image."""

    flat: bool = False


class BlockResize(Arguments, kw_only=True):
    """A device's medium or a node, and its new size in bytes."""

    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    size: int


class ChangeBackingFile(Arguments, kw_only=True):
    """The image whose header is changed, a device that it is part of, and what it will say."""

    device: str
    image_node_name: str
    backing_file: str


class BlockSetWriteThreshold(Arguments, kw_only=True):
    """Which node, and the offset in bytes past which a write is told; 0: none is."""

    node_name: str
    write_threshold: Annotated[int, Meta(ge=0, le=2**64 - 1)]


@COMMANDS.command("blockdev-add")
async def blockdev_add(monitor: Monitor, arguments: BlockdevOptions) -> None:
    """Open a node."""
    await nodes.add(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-del")
async def blockdev_del(monitor: Monitor, arguments: NodeName) -> None:
    """Close a node that nobody uses."""
    await nodes.remove(monitor.server.daemon, arguments.node_name)


@COMMANDS.command("blockdev-reopen")
async def blockdev_reopen(monitor: Monitor, arguments: BlockdevReopen) -> None:
    """Give nodes other options while they are used."""
    await reopening.change(monitor.server.daemon, arguments.options)


@COMMANDS.command("blockdev-set-active")
async def blockdev_set_active(monitor: Monitor, arguments: BlockdevSetActive) -> None:
    """Hand images over to another process, or take them back."""
    name = None if arguments.node_name is UNSET else arguments.node_name
    await activation.set_active(monitor.server.daemon, name, arguments.active)


@COMMANDS.command("block_resize")
async def block_resize(monitor: Monitor, arguments: BlockResize) -> None:
    """Change the size of a disk, also while it is used."""
    await nodes.resize(
        monitor.server.daemon,
        arguments.size,
        device=None if arguments.device is UNSET else arguments.device,
        node_name=None if arguments.node_name is UNSET else arguments.node_name,
    )


@COMMANDS.command("change-backing-file")
async def change_backing_file(monitor: Monitor, arguments: ChangeBackingFile) -> None:
    """Change what an image says of its backing file; the graph stays."""
    await nodes.change_backing_file(
        monitor.server.daemon,
        arguments.device,
        arguments.image_node_name,
        arguments.backing_file,
    )


@COMMANDS.command("block-set-write-threshold")
async def block_set_write_threshold(monitor: Monitor, arguments: BlockSetWriteThreshold) -> None:
    """Tell when a node is written past an offset, once."""
    nodes.set_write_threshold(monitor.server.daemon, arguments.node_name, arguments.write_threshold)


@COMMANDS.command("query-named-block-nodes")
async def query_named_block_nodes(
    monitor: Monitor, arguments: QueryNamedBlockNodes
) -> list[info.BlockDeviceInfo]:
    """All nodes."""
    return info.named_nodes(monitor.server.daemon, flat=arguments.flat)


@COMMANDS.command("x-debug-query-block-graph", features=("unstable",))
async def x_debug_query_block_graph(monitor: Monitor) -> info.BlockGraph:
    """All nodes, their users, and what each may do."""
    return info.block_graph(monitor.server.daemon)


@COMMANDS.command("x-blockdev-change", features=("unstable",))
async def x_blockdev_change(monitor: Monitor, arguments: BlockdevChange) -> None:
    """Add a child to a quorum, or remove one."""
    await nodes.change_children(
        monitor.server.daemon,
        arguments.parent,
        child=None if arguments.child is UNSET else arguments.child,
        node=None if arguments.node is UNSET else arguments.node,
    )
