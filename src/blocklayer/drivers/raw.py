"""``raw``: the bytes of the child ``file`` as they are, or a window of them.

1. Without ``offset`` and ``size`` the node is transparent: it takes and shares of its child what
   its users take and share. With a window, nobody else may resize the child.
2. A fixed ``size`` cannot be changed; without one the node ends where its child ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from blocklayer.errors import LockedError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.child import Child, Role
from blocklayer.graph.driver import DriverInfo, FormatDriver, Measured, Measurement
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.graph.options import NodeOptions, Reference, Size
from blocklayer.graph.permission import Permission
from blocklayer.graph.streams import ImageStream, unstreamable
from blocklayer.units import MAX_SIZE, SECTOR, align_up

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node


class RawOptions(NodeOptions):
    """``offset`` and ``size`` choose a window of ``file``; without them it is all of it."""

    file: Reference | None = None
    offset: Size = 0
    size: Size | UnsetType = UNSET


class RawCreateOptions(AnyCreateOptions):
    """A raw image is its size, and how much of it is allocated from the start."""

    preallocation: Annotated[
        Literal["off", "metadata", "falloc", "full"] | None,
        Meta(description="Preallocation mode (allowed values: off, falloc, full)"),
    ] = None


class RawStream(ImageStream):
    """All of the disk."""

    unit = SECTOR
    materialised = True

    def __init__(self, options: AnyCreateOptions) -> None:
        super().__init__(options.size)
        named = unstreamable(options, frozenset(("size",)))
        if named:
            raise UnsupportedError(f"A raw image with {named} cannot be written as a stream")
        self.length = self.size


class RawDriver(FormatDriver):
    """No structure at all: guest offset and host offset differ by a constant."""

    NAME = "raw"
    Options = RawOptions
    CreateOptions = RawCreateOptions

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._offset = 0
        self._fixed_size: int | None = None

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Anything may be raw, if it is nothing else."""
        return 1

    async def open(self) -> None:
        """Check the window against the child."""
        options = self.node.options
        assert isinstance(options, RawOptions)
        self._offset = options.offset
        self._fixed_size = None if options.size is UNSET else options.size
        if self._offset:
            self.node.overrides["offset"] = self._offset
        if self._fixed_size is not None:
            self.node.overrides["size"] = self._fixed_size
        await self.node.open_child("file", options.file, Role.STORAGE)
        self._edge = self.node.children["file"]
        self._check_window(self._child.size)
        if self._has_window:
            self.node.overrides = {"offset": self._offset}
            if self._fixed_size is not None:
                self.node.overrides["size"] = self._fixed_size
        if self._child.read_only and not self.node.read_only:
            if not self.node.flags.auto_read_only:
                raise LockedError(f"Block node '{self._child.name}' is read-only")
            self.node.flags.read_only = True

    @property
    def _child(self) -> Node:
        return self._edge.node

    async def retire(self) -> bool:
        """Nothing is kept here."""
        return True

    def _check_window(self, available: int) -> None:
        if self._offset > available:
            raise UsageError(
                f"Offset ({self._offset}) cannot be greater than size of the containing file "
                f"({available})"
            )
        if self._fixed_size is None:
            return
        if self._fixed_size > available - self._offset:
            raise UsageError(
                f"The sum of offset ({self._offset}) and size ({self._fixed_size}) has to be "
                f"smaller or equal to the actual size of the containing file ({available})"
            )
        if self._fixed_size % SECTOR:
            raise UsageError(f"Specified size is not multiple of {SECTOR}")

    @property
    def _has_window(self) -> bool:
        return bool(self._offset) or self._fixed_size is not None

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """Transparent; a window's place must not be cut off by others."""
        if self._has_window:
            shared &= ~Permission.RESIZE
        return taken, shared

    @property
    def size(self) -> int:
        """The window's, or what the child has from ``offset`` on, the last sector being whole."""
        if self._fixed_size is not None:
            return self._fixed_size
        size = max(0, self._child.driver.size - self._offset)
        return align_up(size, SECTOR) if self._offset % SECTOR else size

    async def map(self, offset: int, length: int) -> Extent:
        """The child's bytes; holes are the child's to tell."""
        return Extent(
            offset,
            length,
            Kind.DATA,
            offset + self._offset,
            self._edge,
            writable=True,
            recurse=True,
        )

    async def flush(self) -> None:
        """Nothing is kept here: the child's flush."""
        await io.flush(self._child)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """The child's way of zeroing, if it has one."""
        await io.write_zeroes(
            self._child, offset + self._offset, length, unmap=unmap, fallback=False
        )

    async def discard(self, offset: int, length: int) -> None:
        """Pass on."""
        await io.discard(self._child, offset + self._offset, length)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the child's size."""
        if self._fixed_size is not None:
            raise UnsupportedError("Cannot resize fixed-size raw disks")
        if size > MAX_SIZE - self._offset:
            raise UsageError("Disk size too large for the chosen offset")
        await io.truncate(
            self._child, size + self._offset, preallocation=preallocation, shrink=shrink
        )

    def info(self) -> DriverInfo | None:
        """The child's."""
        return self._child.driver.info()

    def actual_size(self) -> int | None:
        """The child's."""
        return self._child.driver.actual_size()

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: AnyCreateOptions) -> None:
        """Size the target; nothing is written."""
        assert isinstance(options, RawCreateOptions)
        size = align_up(options.size, SECTOR)
        await io.truncate(target, size, preallocation=options.preallocation or "off", shrink=True)

    @classmethod
    def stream(cls, options: AnyCreateOptions, *, compress: bool, level: int | None) -> ImageStream:
        """The disk's bytes, zeros and all."""
        return RawStream(options)

    @classmethod
    async def measure(
        cls, options: AnyCreateOptions, size: int, source: Measured | None
    ) -> Measurement:
        """Whole sectors: a file system may store holes in less, other storage does not."""
        whole = align_up(size, SECTOR)
        return Measurement(required=whole, fully_allocated=whole)
