"""Mirrors by name: ``blockdev-mirror`` and ``drive-mirror``, with QEMU's rules and texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.job_control import CopyMode, check_speed, new_id
from blocklayer.daemon.operations import JobOptions
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph.child import Role
from blocklayer.graph.create import create_image
from blocklayer.graph.filename import backing_name, image_options
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.jobs.background import Policies
from blocklayer.jobs.group import Group
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.mirror import MirrorOptions, SyncMode, granularity_for
from blocklayer.jobs.starting import check_top, start_mirror

UInt32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class MirrorJobOptions(JobOptions, kw_only=True):
    """What both take. ``buf-size`` is accepted, and has no effect."""

    target: str
    replaces: str | None = None
    sync: SyncMode
    granularity: UInt32 = 0
    buf_size: int = 0
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    copy_mode: CopyMode = "background"


class BlockdevMirror(MirrorJobOptions, kw_only=True):
    """``target``: a node."""

    filter_node_name: str | None = None


class DriveMirror(MirrorJobOptions, kw_only=True):
    """``target``: a file, to be made unless ``mode`` says that it exists; ``node-name`` for it.

    ``unmap``: what reads as zeros may stay, or become, unallocated.
    """

    format: str | None = None
    node_name: str | None = None
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"
    unmap: bool = True


async def blockdev_mirror(daemon: Daemon, arguments: BlockdevMirror) -> Job:
    """Begin to mirror a node to another. Raises BlockError."""
    node = daemon.find(arguments.device)
    target = daemon.find(arguments.target)
    if target is node:
        raise UsageError("Can't mirror node into itself")
    return await _start(daemon, node, target, arguments, filter_name=arguments.filter_node_name)


async def drive_mirror(daemon: Daemon, arguments: DriveMirror) -> Job:
    """Begin to mirror a node to a file. Raises BlockError."""
    node = daemon.find(arguments.device)
    check_top(node)
    _check(arguments)
    new_id(daemon, arguments.job_id, arguments.device)
    check_speed(arguments.speed)
    if arguments.replaces is not None and arguments.node_name is None:
        raise UsageError("a node-name must be provided when replacing a named node of the graph")
    _replaced(daemon, node, arguments.replaces)
    layer = node.chain()[0]
    below = {"none": node, "top": _below(node)}.get(arguments.sync)
    format = arguments.format
    if format is not None and format not in daemon.graph.registry.table:
        raise UsageError(f"Unknown file format '{format}'")
    if arguments.node_name is not None:
        daemon.graph.new_name(arguments.node_name)
    if arguments.mode == "absolute-paths":
        format = format or layer.driver.NAME
        shown = below.chain()[0] if below is not None else None
        await create_image(
            daemon.graph, arguments.target, format, {}, size=node.size,
            backing=backing_name(arguments.target, shown) if shown is not None else None,
            backing_format=shown.driver.NAME if shown is not None else None,
            check_backing=False,
        )  # fmt: skip
    # An image that exists shows its own backing file, except where that is the source.
    alone = arguments.mode == "absolute-paths" or arguments.sync == "none"
    target = await _open(daemon, arguments, format, alone=alone)
    try:
        backing = below if alone and target.driver.supports_backing else None
        return await _start(daemon, node, target, arguments, backing=backing)
    except BaseException:
        await daemon.graph.release(target)
        raise


def _below(node: Node) -> Node | None:
    layers = node.chain()
    return layers[1] if len(layers) > 1 else None


async def _open(daemon: Daemon, arguments: DriveMirror, format: str | None, *, alone: bool) -> Node:
    """The target; ``alone``: without the backing file that its header names."""
    options: dict[str, Any] = {**image_options(arguments.target, daemon.graph.registry, format)}
    flags = Flags(read_only=False, discard_unmap=arguments.unmap)
    if arguments.node_name is not None:
        options["node-name"] = arguments.node_name
    return await open_options(daemon.graph, options, flags, backing=not alone)


def _check(arguments: MirrorJobOptions) -> None:
    if arguments.sync in ("incremental", "bitmap"):
        raise UsageError(f"Sync mode '{arguments.sync}' not supported")
    if arguments.buf_size < 0:
        raise UsageError("Invalid parameter 'buf-size'")


async def _start(
    daemon: Daemon,
    node: Node,
    target: Node,
    arguments: MirrorJobOptions,
    *,
    backing: Node | None = None,
    filter_name: str | None = None,
) -> Job:
    _check(arguments)
    replaces = _replaced(daemon, node, arguments.replaces)
    for edge in target.parents:
        if edge.role is Role.BACKING and edge.parent is not None:
            raise LockedError(
                f"Node '{target.name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )
    options = MirrorOptions(
        base=_below(node) if arguments.sync == "top" else None,
        everything=arguments.sync != "none",
        granularity=arguments.granularity,
        copy_mode=arguments.copy_mode,
        policies=Policies(
            on_source_error=arguments.on_source_error, on_target_error=arguments.on_target_error
        ),
        replaces=replaces,
    )
    granularity_for(target, options)
    group = Group(daemon.jobs)
    job = await start_mirror(
        group, node, target, options, backing=backing, filter_name=filter_name,
        identifier=new_id(daemon, arguments.job_id, arguments.device),
        speed=check_speed(arguments.speed), auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )  # fmt: skip
    group.start()
    return job


def _replaced(daemon: Daemon, node: Node, name: str | None) -> Node | None:
    """The node whose place the target is to take; it shows the same as ``node``."""
    if name is None:
        return None
    replaced = daemon.graph.nodes.get(name)
    if replaced is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    for edge in replaced.parents:
        if edge.role is Role.BACKING and edge.parent is not None:
            raise LockedError(
                f"Node '{name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )
    shown = node
    while shown is not replaced:
        if not isinstance(shown.driver, FilterDriver) or not shown.driver.shows_child:
            raise UsageError(
                f"Cannot replace '{name}' by a node mirrored from '{node.name}', because it cannot "
                "be guaranteed that doing so would not lead to an abrupt change of visible data"
            )
        shown = shown.driver.child
    # The source itself is what is replaced without saying so: then the job's filter goes as well.
    return None if replaced is node else replaced
