"""What can be told of nodes at run time, in the words of QMP.

Members are named as QEMU names them, dashes and underscores as they come; what does not apply is
left out. Nothing here reads guest data, and nothing waits.

1. A list of all nodes begins with the newest.
2. Without ``flat``, an image's own description holds those of its backing images, as deep as the
   chain is.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.api.info import SpecificInfo, image_info
from blocklayer.daemon.daemon import Daemon
from blocklayer.graph import write_threshold
from blocklayer.graph.child import Child
from blocklayer.graph.dirty_bitmap import BlockDirtyInfo
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission

DetectZeroes = Literal["off", "on", "unmap"]


class NodeImageInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """QEMU's ``ImageInfo``: one image and, unless the list is flat, its backing images."""

    filename: str
    format: str
    dirty_flag: bool | UnsetType = UNSET
    actual_size: int | UnsetType = UNSET
    virtual_size: int
    cluster_size: int | UnsetType = UNSET
    encrypted: bool | UnsetType = UNSET
    backing_filename: str | UnsetType = UNSET
    full_backing_filename: str | UnsetType = UNSET
    backing_filename_format: str | UnsetType = UNSET
    snapshots: list[SnapshotInfo] | UnsetType = UNSET
    format_specific: dict[str, Any] | UnsetType = UNSET
    backing_image: NodeImageInfo | UnsetType = UNSET


class CacheInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """Whether writes are acknowledged before a flush, pass by the host's cache, skip flushes."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockdevChild(msgspec.Struct, kw_only=True, rename="kebab"):
    """A child by the name its parent has for it."""

    child: str
    node_name: str


class BlockDeviceInfo(
    msgspec.Struct,
    kw_only=True,
    rename={"node_name": "node-name", "dirty_bitmaps": "dirty-bitmaps"},
):
    """One node. Limits are those of a throttle group that holds for it; 0: none."""

    file: str
    node_name: str | UnsetType = UNSET
    ro: bool
    drv: str
    backing_file: str | UnsetType = UNSET
    backing_file_depth: int
    children: list[BlockdevChild]
    active: bool
    encrypted: bool
    detect_zeroes: DetectZeroes
    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    image: NodeImageInfo
    cache: CacheInfo
    bps_max: int | UnsetType = UNSET
    bps_rd_max: int | UnsetType = UNSET
    bps_wr_max: int | UnsetType = UNSET
    iops_max: int | UnsetType = UNSET
    iops_rd_max: int | UnsetType = UNSET
    iops_wr_max: int | UnsetType = UNSET
    bps_max_length: int | UnsetType = UNSET
    bps_rd_max_length: int | UnsetType = UNSET
    bps_wr_max_length: int | UnsetType = UNSET
    iops_max_length: int | UnsetType = UNSET
    iops_rd_max_length: int | UnsetType = UNSET
    iops_wr_max_length: int | UnsetType = UNSET
    iops_size: int | UnsetType = UNSET
    group: str | UnsetType = UNSET
    write_threshold: int
    dirty_bitmaps: list[BlockDirtyInfo] | UnsetType = UNSET


UserType = Literal["block-backend", "block-job", "block-driver"]
PermissionName = Literal["consistent-read", "write", "write-unchanged", "resize"]


class GraphNode(msgspec.Struct, kw_only=True):
    """A place in the graph: a node, a job, or a user from outside."""

    id: int
    type: UserType
    name: str


class GraphEdge(msgspec.Struct, kw_only=True, rename="kebab"):
    """Who uses whom, and what for."""

    parent: int
    child: int
    name: str
    perm: list[PermissionName]
    shared_perm: list[PermissionName]


class BlockGraph(msgspec.Struct, kw_only=True):
    """All nodes and edges."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]


def named_nodes(daemon: Daemon, *, flat: bool = False) -> list[BlockDeviceInfo]:
    """All nodes, the newest first."""
    return [device_info(node, flat=flat) for node in reversed(daemon.graph.nodes.values())]


def device_info(node: Node, *, flat: bool = False) -> BlockDeviceInfo:
    """One node."""
    layers = [node] if flat else _layers(node)
    image: NodeImageInfo | UnsetType = UNSET
    for layer in reversed(layers):
        image = _image(layer, image)
    assert not isinstance(image, UnsetType)
    flags, general = node.wanted, node.driver.info()
    info = BlockDeviceInfo(
        file=node.filename,
        node_name=node.name,
        ro=flags.read_only,
        drv=node.driver.NAME,
        backing_file_depth=len(layers) - 1,
        children=[BlockdevChild(child=n, node_name=e.node.name) for n, e in node.children.items()],
        active=node.active,
        encrypted=bool(general and general.encrypted),
        detect_zeroes=cast("DetectZeroes", flags.detect_zeroes),
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=image,
        cache=CacheInfo(writeback=True, direct=flags.direct, no_flush=flags.no_flush),
        write_threshold=write_threshold.find(node),
    )
    if node.backing is not None:
        info.backing_file = node.backing.filename
    if node.dirty_bitmaps:
        info.dirty_bitmaps = [bitmap.info() for bitmap in node.dirty_bitmaps.values()]
    return info


def _layers(node: Node) -> list[Node]:
    layers = [node]
    while layers[-1].backing is not None:
        layers.append(layers[-1].backing)
    return layers


def _image(node: Node, below: NodeImageInfo | UnsetType) -> NodeImageInfo:
    known = image_info(node, children=False)
    specific: dict[str, Any] | UnsetType = UNSET
    if known.format_specific is not None:
        specific = _specific(known.format_specific)

    def given(value: Any) -> Any:
        return UNSET if value is None else value

    return NodeImageInfo(
        filename=known.filename,
        format=known.format,
        dirty_flag=given(known.dirty_flag),
        actual_size=given(known.actual_size),
        virtual_size=known.virtual_size,
        cluster_size=given(known.cluster_size),
        encrypted=given(known.encrypted),
        backing_filename=given(known.backing_filename),
        full_backing_filename=given(known.full_backing_filename),
        backing_filename_format=given(known.backing_filename_format),
        snapshots=given(known.snapshots),
        format_specific=specific,
        backing_image=below,
    )


def _specific(info: SpecificInfo) -> dict[str, Any]:
    return {"type": info.type, "data": msgspec.to_builtins(info.data)}


_NAMES: tuple[tuple[Permission, PermissionName], ...] = (
    (Permission.CONSISTENT_READ, "consistent-read"),
    (Permission.WRITE, "write"),
    (Permission.WRITE_UNCHANGED, "write-unchanged"),
    (Permission.RESIZE, "resize"),
)


def block_graph(daemon: Daemon) -> BlockGraph:
    """Everything, edges with their permissions. Numbers mean something within one answer only."""
    nodes: list[GraphNode] = []
    edges: list[GraphEdge] = []
    numbers: dict[object, int] = {}
    jobs = {f"block job '{job.id}'": job.id for job in daemon.jobs}

    def add(
        what: object, kind: Literal["block-backend", "block-job", "block-driver"], name: str
    ) -> None:
        numbers[what] = len(numbers) + 1
        nodes.append(GraphNode(id=numbers[what], type=kind, name=name))

    for node in daemon.graph.nodes.values():
        add(node, "block-driver", node.name)
    for node in daemon.graph.nodes.values():
        for edge in node.parents:
            if edge.parent is None and edge.user not in numbers:
                job = jobs.get(edge.user)
                add(edge.user, "block-job" if job else "block-backend", job or edge.user)
            edges.append(_edge(edge, numbers[edge.parent or edge.user], numbers[node]))
    return BlockGraph(nodes=nodes, edges=edges)


def _edge(edge: Child, parent: int, child: int) -> GraphEdge:
    return GraphEdge(
        parent=parent,
        child=child,
        name=edge.name,
        perm=[name for flag, name in _NAMES if edge.taken & flag],
        shared_perm=[name for flag, name in _NAMES if edge.shared & flag],
    )
