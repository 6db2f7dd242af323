"""`snapshot-access`: what a ``copy-before-write`` node held when that was put in place, read-only.

1. What is read is of that one moment, whatever is written beside it.
2. A discard tells that the range will not be read again: it is neither kept nor saved any more.
3. The node below stays that filter: where others move to a node put above it, this one does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from blocklayer.drivers.copy_before_write import CopyBeforeWriteDriver
from blocklayer.drivers.point_in_time import PointInTime
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.child import Child, Role
from blocklayer.graph.driver import Buffer, ProtocolDriver
from blocklayer.graph.extent import Extent
from blocklayer.graph.options import NodeOptions, Reference
from blocklayer.graph.permission import Permission


class SnapshotAccessOptions(NodeOptions, kw_only=True):
    """``file``: the ``copy-before-write`` node."""

    file: Reference


class SnapshotAccessDriver(ProtocolDriver):
    """The view of the past."""

    NAME = "snapshot-access"
    Options = SnapshotAccessOptions
    filename_option = None

    async def open(self) -> None:
        """Open the filter."""
        options = self.node.options
        assert isinstance(options, SnapshotAccessOptions)
        child = await self.node.open_child("file", options.file, Role.FILTERED)
        if not isinstance(child.driver, CopyBeforeWriteDriver):
            raise UsageError(
                f"'{child.name}' keeps no point in time: the file of a snapshot-access node is a "
                "copy-before-write node"
            )
        self.node.children["file"].follows = False
        self.discard_alignment = self._point.cluster_size

    @property
    def _point(self) -> PointInTime:
        driver = self.node.children["file"].node.driver
        assert isinstance(driver, CopyBeforeWriteDriver)
        return driver.point

    @property
    def size(self) -> int:
        """What it was then."""
        return self._point.size

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """The filter is not read by way of requests, and its users may do as they like."""
        return Permission.NONE, Permission.ALL

    async def read(self, offset: int, view: memoryview) -> None:
        """What was there."""
        await self._point.read_into(offset, view)

    async def map(self, offset: int, length: int) -> Extent:
        """Data or zeros."""
        kind, length = await self._point.status(offset, length)
        return Extent(offset, length, kind, offset)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """The past cannot be written."""
        raise UnsupportedError(f"'{self.node.name}' shows a point in time, and takes no writes")

    async def discard(self, offset: int, length: int) -> None:
        """It will not be read again."""
        await self._point.discard(offset, length)
