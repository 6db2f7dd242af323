"""A node as a place for bytes: what key slots and encrypted data are read from and written to."""

from __future__ import annotations

from blocklayer.graph import io
from blocklayer.graph.driver import Buffer
from blocklayer.graph.node import Node


class NodeStorage:
    """Byte access to ``node``; what lies past its end reads as zeros."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        present = max(0, min(len(view), self.node.size - offset))
        if present:
            await io.read_into(self.node, offset, view[:present])
        view[present:] = io.zeros(len(view) - present)

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Store ``buffers``, one after the other."""
        await io.write(self.node, offset, b"".join(buffers))

    async def flush(self) -> None:
        """All that was written before is on stable storage when this returns."""
        await io.flush(self.node)
