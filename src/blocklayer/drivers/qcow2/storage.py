"""Host bytes of an image: the ``file`` child as qcow2 metadata code sees it.

1. Reads past the end of the file give zeros; writes past it make the file grow.
2. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.child import Child
from blocklayer.graph.driver import Buffer, ProtocolDriver
from blocklayer.graph.node import Node


class Storage:
    """Byte access to the node at the other end of ``child``."""

    __slots__ = ("child",)

    def __init__(self, child: Child) -> None:
        self.child = child

    @property
    def node(self) -> Node:
        """The node that stores the image."""
        return self.child.node

    @property
    def size(self) -> int:
        """Bytes the file has."""
        return self.child.node.size

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        node = self.node
        if not isinstance(node.driver, ProtocolDriver):
            present = max(0, min(len(view), node.size - offset))
            view[present:] = io.zeros(len(view) - present)
            view = view[:present]
        if view:
            await io.read_into(node, offset, view)

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Store ``buffers``, one after the other."""
        node = self.node
        node.check_writable()
        if isinstance(node.driver, ProtocolDriver):
            await io.write_stored(node, offset, buffers)
            return
        data = b"".join(buffers)
        await self.reserve(offset + len(data))
        await io.write(node, offset, data)

    async def reserve(self, end: int) -> None:
        """Where the child is a format itself, let it show at least ``end`` bytes."""
        node = self.node
        if not isinstance(node.driver, ProtocolDriver) and end > node.size:
            await io.truncate(node, end)

    async def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make the range read as zeros; what lies past the end does already."""
        length = min(length, self.size - offset)
        if length > 0:
            await io.write_zeroes(self.node, offset, length, unmap=unmap)

    async def free(self, offset: int, length: int) -> None:
        """Make the range read as zeros and give its space back, or do nothing."""
        length = min(length, self.size - offset)
        if length > 0:
            try:
                await io.write_zeroes(self.node, offset, length, unmap=True, fallback=False)
            except UnsupportedError:
                return

    async def discard(self, offset: int, length: int) -> None:
        """Give host space back, if the host can."""
        length = min(length, self.size - offset)
        if length > 0:
            await io.discard(self.node, offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        """Change the size of the file; to stay longer than asked for is no error."""
        try:
            await io.truncate(self.node, size, preallocation=preallocation, shrink=True)
        except UnsupportedError:
            # A device cannot shrink, and needs not: what is past the end of use is just unused.
            if size > self.size:
                raise

    async def flush(self) -> None:
        """All that was written before is on stable storage when this returns."""
        await io.flush(self.node)


class ClosedStorage(Storage):
    """Stands for a data file that nobody opened: whoever wants its bytes hears so."""

    __slots__ = ("_image",)

    def __init__(self, image: str) -> None:
        self._image = image

    @property
    def child(self) -> Child:  # type: ignore[override]
        """There is none."""
        raise UsageError(f"The data file of '{self._image}' was left closed")
