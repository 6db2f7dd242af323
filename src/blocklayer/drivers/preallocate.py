"""`preallocate`: a filter that makes room ahead of writes past the end, many of them at once.

1. What users see of the size is where their data ends, as if nothing were preallocated.
2. What is left of the room is given back on closing; a crash leaves the file longer, with zeros.
3. Room that cannot be had is no error: the write goes on without.
4. Room reads as zeros: it counts as data before anything is stored there, so that a write that
   fails leaves a longer disk, as without the filter, and never bytes in what is still room.
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
        end = self._data_end
        if end is not None and self.child.size > end:
            await io.truncate(self.child, end, shrink=True)
        self._data_end = None

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
            self._data_end = max(self._data_end, end)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Make room, and pass on."""
        await self._reserve(offset + len(data))
        await super().write_opaque(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Make room, and pass on."""
        await self._reserve(offset + length)
        await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the size. A format grows its storage before it writes there: that, too, is when
        room is made.
        """
        if preallocation == "off" and size > self.size:
            await self._reserve(size)
            return
        async with self._growing:
            await self._give_back()
            await super().truncate(size, preallocation=preallocation, shrink=shrink)
