"""`copy-before-write`: a filter that saves to ``target`` what a change is about to overwrite.

From the moment at which the filter is in place, ``target`` and the node that it shows hold together
what the node held then; ``snapshot-access`` shows that.

1. A change goes through after what it changes was saved, or not at all (``break-guest-write``), or
   it breaks the point in time (``break-snapshot``).
2. Nobody but its own users may write to the node that it shows.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from blocklayer.drivers.point_in_time import PointInTime
from blocklayer.errors import UsageError
from blocklayer.graph import bitmaps
from blocklayer.graph.child import Child, Role
from blocklayer.graph.dirty_bitmap import MAX_GRANULARITY
from blocklayer.graph.driver import Buffer
from blocklayer.graph.filter import FilterDriver, FilterOptions
from blocklayer.graph.node import Node
from blocklayer.graph.options import Reference, Size
from blocklayer.graph.permission import Permission
from blocklayer.units import KIB, is_power_of_two

OnCbwError = Literal["break-guest-write", "break-snapshot"]

_LEAST_CLUSTER: Final = 64 * KIB


class BlockDirtyBitmap(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """A dirty bitmap by the names of its node and itself."""

    node: str
    name: str


class CopyBeforeWriteOptions(FilterOptions, kw_only=True):
    """``bitmap``: only what it calls dirty is saved. ``cbw-timeout`` in seconds."""

    target: Reference
    bitmap: BlockDirtyBitmap | None = None
    on_cbw_error: OnCbwError = "break-guest-write"
    cbw_timeout: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 0
    min_cluster_size: Size = 0


class CopyBeforeWriteDriver(FilterDriver):
    """The filter."""

    NAME = "copy-before-write"
    Options = CopyBeforeWriteOptions
    sees_writes = True

    discards_source = False
    """A job gives up, in the node that is shown, what it has saved."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._point: PointInTime | None = None

    @property
    def point(self) -> PointInTime:
        """The point in time that is kept."""
        assert self._point is not None
        return self._point

    async def open(self) -> None:
        """Open both children; the point in time is now."""
        options = self.node.options
        assert isinstance(options, CopyBeforeWriteOptions)
        await super().open()
        target = await self.node.open_child("target", options.target, Role.DATA)
        cluster_size = _cluster_size(target, options.min_cluster_size)
        children = self.node.children
        point = PointInTime(children["file"], children["target"], cluster_size)
        if options.bitmap is not None:
            owner = self.node.graph.find(options.bitmap.node)
            bitmap = bitmaps.find(owner, options.bitmap.name)
            bitmap.check(read_only=True)
            await bitmap.load()
            point.want_only(bitmap)
        point.timeout_s = options.cbw_timeout
        point.breaks_itself = options.on_cbw_error == "break-snapshot"
        self._point = point

    async def close(self) -> None:
        """Nothing may be left that uses the children."""
        await self.point.come_to_rest()

    async def come_to_rest(self) -> None:
        """Wait for savings that nobody waits for any more."""
        if self._point is not None:
            await self._point.come_to_rest()

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """The target is written; what is shown is written by this filter's users only."""
        if child.name == "target":
            readers = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
            return Permission.WRITE, readers | Permission.WRITE
        if not taken:
            return Permission.NONE, Permission.ALL
        wanted = taken | Permission.CONSISTENT_READ
        if self.discards_source:
            wanted |= Permission.WRITE
        return wanted, shared & ~(Permission.WRITE | Permission.RESIZE)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Save, and pass on."""
        await self.point.save(offset, len(data))
        await super().write_opaque(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Save, and pass on."""
        await self.point.save(offset, length)
        await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        """Save, and pass on."""
        await self.point.save(offset, length)
        await super().discard(offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Save, and pass on."""
        await self.point.save(offset, len(data))
        await super().write_compressed(offset, data)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Save what is cut off, and pass on."""
        if size < self.size:
            await self.point.save(size, self.size - size)
        await super().truncate(size, preallocation=preallocation, shrink=shrink)


def _cluster_size(target: Node, at_least: int) -> int:
    """What is saved as one: whole clusters of the target. Raises UsageError."""
    if at_least and not is_power_of_two(at_least):
        raise UsageError(
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2"
        )
    info = target.driver.info()
    size = max(_LEAST_CLUSTER, info.cluster_size if info is not None else 0, at_least)
    if size > MAX_GRANULARITY:
        raise UsageError(
            f"Cannot create block-copy-state: min-cluster-size too large: {size} > "
            f"{MAX_GRANULARITY}"
        )
    return size if is_power_of_two(size) else 1 << size.bit_length()
