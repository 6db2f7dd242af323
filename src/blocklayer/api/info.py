"""What is known of an image and of the nodes below it: typed results for ``info``.

Fields are named as in QEMU's ``ImageInfo``, in the order its tools print them, and encode to
kebab-case; what is not known is None and left out.
"""

from __future__ import annotations

import mmap

import msgspec

from blocklayer.errors import UsageError
from blocklayer.graph.child import Role
from blocklayer.graph.driver import FormatDriver, SnapshotInfo
from blocklayer.graph.filename import resolve_relative, storage_of
from blocklayer.graph.node import Node
from blocklayer.units import SECTOR


class SpecificInfo(msgspec.Struct, frozen=True):
    """What only this driver has to say, by the driver's name."""

    type: str
    data: msgspec.Struct


class ImageInfo(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """One node, with its children except the backing chain. Sizes in bytes."""

    children: list[ChildInfo]
    snapshots: list[SnapshotInfo] | None = None
    backing_filename_format: str | None = None
    virtual_size: int
    filename: str
    cluster_size: int | None = None
    format: str
    actual_size: int | None = None
    limits: LimitsInfo | None = None
    format_specific: SpecificInfo | None = None
    encrypted: bool | None = None
    full_backing_filename: str | None = None
    backing_filename: str | None = None
    dirty_flag: bool | None = None


class LimitsInfo(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """What requests a node takes well: QEMU's ``BlockLimitsInfo``. All but ``max_iov`` in bytes.

    Requests of any alignment and length are taken; these are what they are made of on the way.
    """

    request_alignment: int
    discard_alignment: int | None = None
    write_zeroes_alignment: int | None = None
    max_iov: int
    min_mem_alignment: int
    opt_mem_alignment: int


class ChildInfo(msgspec.Struct, frozen=True):
    """A child by the name its parent has for it."""

    name: str
    info: ImageInfo


def image_info(node: Node, *, limits: bool = False, children: bool = True) -> ImageInfo:
    """Everything that can be told of ``node`` without reading guest data, ``limits`` on request."""
    driver = node.driver
    info = ImageInfo(
        children=[
            ChildInfo(name, image_info(edge.node, limits=limits))
            # The newest child first, as QEMU's tools list them.
            for name, edge in reversed(node.children.items())
            if children and edge.role in (Role.STORAGE, Role.FILTERED)
        ],
        virtual_size=node.size,
        filename=node.filename,
        format=driver.NAME,
        actual_size=allocated_size(node),
    )
    if limits:
        info.limits = _limits(node)
    specific = driver.specific_info()
    if specific is not None:
        info.format_specific = SpecificInfo(driver.NAME, specific)
    general = driver.info()
    if general is not None:
        info.cluster_size = general.cluster_size or None
        info.dirty_flag = general.dirty
        info.encrypted = general.encrypted or None
        info.snapshots = general.snapshots or None
    if isinstance(driver, FormatDriver) and driver.backing_reference is not None:
        reference = driver.backing_reference
        info.backing_filename = reference.filename
        info.backing_filename_format = reference.format
        try:
            full = resolve_relative(storage_of(node).filename, reference.filename)
            info.full_backing_filename = full
        except UsageError:
            # The image has no folder of its own; then nobody can tell where its backing file is.
            info.full_backing_filename = None
    return info


_MAX_IOV = 1024
"""The most buffers that one call to the kernel takes (IOV_MAX of Linux)."""


def _limits(node: Node) -> LimitsInfo:
    driver, request = node.driver, node.driver.request_alignment
    memory = _memory_alignment(node)
    return LimitsInfo(
        request_alignment=request,
        discard_alignment=driver.discard_alignment if driver.discard_alignment > request else None,
        write_zeroes_alignment=driver.zero_alignment if driver.zero_alignment > request else None,
        max_iov=_MAX_IOV,
        min_mem_alignment=max(memory, SECTOR),
        opt_mem_alignment=max(memory, mmap.PAGESIZE),
    )


def _memory_alignment(node: Node) -> int:
    """What buffers must be aligned to for no storage below to copy them first."""
    below = [
        _memory_alignment(edge.node)
        for edge in node.children.values()
        if edge.role is not Role.BACKING
    ]
    return max([node.driver.request_alignment, *below])


def allocated_size(node: Node) -> int | None:
    """Bytes of host storage that ``node`` and its storage use, without the backing chain."""
    own = node.driver.actual_size()
    if own is not None:
        return own
    sizes = [
        allocated_size(edge.node)
        for edge in node.children.values()
        if edge.role is not Role.BACKING
    ]
    known = [size for size in sizes if size is not None]
    return sum(known) if known and len(known) == len(sizes) else None
