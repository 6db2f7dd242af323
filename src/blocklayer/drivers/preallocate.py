"""`preallocate`: a filter that makes room ahead of writes past the end, many of them at once.

1. What users see of the size is where their data ends, as if nothing were preallocated.
2. What is left of the room is given back on closing; a crash leaves the file longer, with zeros.
3. Room that cannot be had is no error: the write goes on without.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer
from blocklayer.graph.filter import FilterDriver, FilterOptions
from blocklayer.graph.options import Size
from blocklayer.graph.permission import Permission
from blocklayer.units import MIB, SECTOR, align_up

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.node import Node


class PreallocateOptions(FilterOptions):
    """``prealloc-size``: bytes to have ready past a write; the end is then rounded up to
    ``prealloc-align``.
    """

    prealloc_align: Size = MIB
    prealloc_size: Size = 128 * MIB


class PreallocateDriver(FilterDriver):
    """The filter."""

    NAME = "preallocate"
    Options = PreallocateOptions
    sees_writes = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._data_end: int | None = None
        self._growing = asyncio.Lock()

    async def open(self) -> None:
        """Open the child."""
        options = self.node.options
        assert isinstance(options, PreallocateOptions)
        if options.prealloc_align % SECTOR:
            raise UsageError(
                f"prealloc-align parameter of preallocate filter is not aligned to {SECTOR}"
            )
        self._align, self._ahead = options.prealloc_align or 1, options.prealloc_size
        await super().open()

    async def close(self) -> None:
        """Give the room back."""
        await self._give_back()

    async def retire(self) -> bool:
        """Give the room back."""
        await self._give_back()
        return True

    async def _give_back(self) -> None:
        end, self._data_end = self._data_end, None
        if end is not None and self.child.size > end:
            await io.truncate(self.child, end, shrink=True)

    @property
    def size(self) -> int:
        """Where the data ends."""
        return self.child.driver.size if self._data_end is None else self._data_end

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """What the users take; a node that can be written keeps the right to give room back."""
        if not self.node.flags.read_only:
            taken |= Permission.WRITE | Permission.RESIZE
            shared &= ~(Permission.WRITE | Permission.RESIZE)
        return taken, shared

    async def _reserve(self, end: int) -> None:
        """Something is to be stored up to ``end``."""
        if end <= self.size:
            return
        async with self._growing:
            if self._data_end is None:
                self._data_end = self.child.size
            if end > self.child.size:
                try:
                    room = align_up(end + self._ahead, self._align)
                    await io.truncate(self.child, room, preallocation="falloc")
                except BlockError:
                    # The write will tell whether there is room for itself.
                    await io.truncate(self.child, max(end, self.child.size))

    def _stored(self, end: int) -> None:
        if self._data_end is not None:
            self._data_end = max(self._data_end, end)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Make room, and pass on."""
        await self._reserve(offset + len(data))
        await super().write_opaque(offset, data)
        self._stored(offset + len(data))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Make room, and pass on."""
        await self._reserve(offset + length)
        await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)
        self._stored(offset + length)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the size; what a write that failed left in the room is not shown as data."""
        async with self._growing:
            await self._give_back()
            await super().truncate(size, preallocation=preallocation, shrink=shrink)
