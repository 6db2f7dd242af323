"""`blkverify`: a filter that does everything twice, and fails a read whose two results differ.

1. Writes go to ``test``, which is shown, and to ``raw``, which is believed.
2. A difference fails the request and says where it is; nothing is repaired. A request that only one
   of the two fails is a difference too.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from blocklayer.errors import BlockError, StorageError, UsageError
from blocklayer.graph import io
from blocklayer.graph.child import Role
from blocklayer.graph.driver import Buffer
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.options import NodeOptions, Reference

if TYPE_CHECKING:
    from blocklayer.graph.node import Node


class BlkverifyOptions(NodeOptions, kw_only=True):
    """``test``: the node to be verified; ``raw``: one that holds what it ought to hold."""

    test: Reference
    raw: Reference


class BlkverifyDriver(FilterDriver):
    """The filter."""

    NAME = "blkverify"
    Options = BlkverifyOptions
    sees_reads = True
    sees_writes = True

    async def open(self) -> None:
        """Open both."""
        options = self.node.options
        assert isinstance(options, BlkverifyOptions)
        await self.node.open_child("raw", options.raw, Role.STORAGE)
        await self.node.open_child("test", options.test, Role.FILTERED)

    @property
    def child(self) -> Node:
        """The node that is shown."""
        return self.node.children["test"].node

    @property
    def _believed(self) -> Node:
        return self.node.children["raw"].node

    async def _both(self, what: str, one: Coroutine[Any, Any, None], other: Any) -> None:
        """Do both; they must end alike."""
        shown, believed = await asyncio.gather(one, other, return_exceptions=True)
        for failure in (shown, believed):
            if failure is not None and not isinstance(failure, BlockError):
                raise failure
        if (shown is None) != (believed is None):
            raise self._difference(f"{what} failed for one only: {shown or believed}")
        if isinstance(shown, BlockError):
            raise shown

    def _difference(self, text: str) -> StorageError:
        return StorageError(f"blkverify '{self.node.name}': {text}", errno.EIO)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Read both, and compare."""
        length = len(view)
        expected = bytearray(length)
        where = f"a read of {length:#x} bytes at {offset:#x}"
        reads = (io.read_into(self.child, offset, view), self._read_believed(offset, expected))
        await self._both(where, *reads)
        if view != expected:
            at = next(n for n in range(length) if view[n] != expected[n])
            raise self._difference(
                f"contents differ at {offset + at:#x} (in {where}): '{self.child.filename}' is not "
                f"what '{self._believed.filename}' is"
            )

    async def _read_believed(self, offset: int, expected: bytearray) -> None:
        io.check_range(self._believed, offset, len(expected))
        await io.read_into(self._believed, offset, memoryview(expected))

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Write both."""
        await self._both(
            f"a write of {len(data):#x} bytes at {offset:#x}",
            io.write(self.child, offset, data),
            io.write(self._believed, offset, data),
        )

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Write zeros to both; what is fast for one only is done slowly where it must."""
        await self._both(
            f"zeroing {length:#x} bytes at {offset:#x}",
            io.write_zeroes(self.child, offset, length, unmap=unmap, fallback=fallback),
            io.write_zeroes(self._believed, offset, length, unmap=unmap),
        )

    async def discard(self, offset: int, length: int) -> None:
        """Nothing: what is read of discarded space need not be the same."""

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Write both, the shown one compressed."""
        await self._both(
            f"a compressed write of {len(data):#x} bytes at {offset:#x}",
            io.write_compressed(self.child, offset, data),
            io.write(self._believed, offset, data),
        )

    async def flush(self) -> None:
        """Flush both: what is believed must survive as well."""
        await self._both("a flush", io.flush(self.child), io.flush(self._believed))

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """The two would have to change at one instant."""
        raise UsageError(f"'{self.node.name}' cannot be resized while it is verified")
