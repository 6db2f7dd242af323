"""Filters: nodes that show one child, changed on the way or only watched.

As it stands everything passes unchanged, and reads and writes do not even come here: a filter that
wants to see them says so, and overrides what it changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocklayer.graph.child import Role
from blocklayer.graph.driver import Buffer, Driver, DriverInfo
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import NodeOptions, Reference

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.node import Node


class FilterOptions(NodeOptions):
    """What every filter takes: the node that it shows."""

    file: Reference = ""


class FilterDriver(Driver):
    """Shows its child ``file``; subclasses change what passes."""

    Options: ClassVar[type[NodeOptions]] = FilterOptions

    sees_reads: bool = False
    """Reads come to ``read_opaque``."""
    sees_writes: bool = False
    """Writes, zeros and discards come to ``write_opaque`` and its kin."""
    shows_child: ClassVar[bool] = True
    """What is read is what the child holds, in the same place."""

    async def open(self) -> None:
        """Open the child."""
        options = self.node.options
        assert isinstance(options, FilterOptions)
        await self.node.open_child("file", options.file, Role.FILTERED)

    async def retire(self) -> bool:
        """Nothing is kept here."""
        return True

    @property
    def child(self) -> Node:
        """The node that is shown."""
        return self.node.children["file"].node

    @property
    def size(self) -> int:
        """The child's size."""
        return self.child.driver.size

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """What the users take and share."""
        return taken, shared

    async def map(self, offset: int, length: int) -> Extent:
        """The child's bytes, or whatever ``read_opaque`` and ``write_opaque`` make of them."""
        if self.sees_reads or self.sees_writes:
            return Extent(offset, length, Kind.OPAQUE, writable=True)
        edge = self.node.children["file"]
        return Extent(offset, length, Kind.DATA, offset, edge, writable=True)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Pass on."""
        from blocklayer.graph import io

        await io.read_into(self.child, offset, view)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Pass on."""
        from blocklayer.graph import io

        await io.write(self.child, offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Pass on. Offset and length are aligned to nothing."""
        from blocklayer.graph import io

        await io.write_zeroes(self.child, offset, length, unmap=unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        """Pass on. Offset and length are aligned to nothing."""
        from blocklayer.graph import io

        await io.discard(self.child, offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Pass on."""
        from blocklayer.graph import io

        await io.write_compressed(self.child, offset, data)

    async def flush(self) -> None:
        """Pass on."""
        from blocklayer.graph import io

        await io.flush(self.child)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Pass on."""
        from blocklayer.graph import io

        await io.truncate(self.child, size, preallocation=preallocation, shrink=shrink)

    def info(self) -> DriverInfo | None:
        """The child's."""
        return self.child.driver.info()
