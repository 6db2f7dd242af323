"""`copy-on-read`: a filter that keeps in its child what was read from the child's backing files.

1. Only what the child itself does not hold is copied, in whole allocation units of the child; with
   ``bottom`` only what lies in the layers from the child's backing file down to that node.
2. What is copied reads the same before and after, also beside writes: requests through the filter
   that meet run one after the other where one of them copies or writes, and others must not write
   to the child.
3. A read that cannot be copied (the storage is full) fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.child import Child
from blocklayer.graph.driver import Buffer, FormatDriver
from blocklayer.graph.filter import FilterDriver, FilterOptions
from blocklayer.graph.permission import Permission
from blocklayer.graph.resolve import runs
from blocklayer.units import MIB, align_down, align_up

if TYPE_CHECKING:
    from blocklayer.graph.node import Node

_CHUNK = MIB
"""What is copied at a time: a bound on memory, and on how long a write may have to wait."""


class CopyOnReadOptions(FilterOptions):
    """``bottom``: the lowest node of the backing chain whose data are copied."""

    bottom: str | None = None


class CopyOnReadDriver(FilterDriver):
    """The filter."""

    NAME = "copy-on-read"
    Options = CopyOnReadOptions
    sees_reads = True
    sees_writes = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._bottom: Node | None = None

    async def open(self) -> None:
        """Open the child, which must be writable, and find ``bottom`` below it."""
        options = self.node.options
        assert isinstance(options, CopyOnReadOptions)
        await super().open()
        child = self.child
        if options.bottom is not None:
            self._bottom = self.node.graph.find(options.bottom)
            if self._bottom not in child.chain():
                raise UsageError(
                    f"Node '{options.bottom}' is not below '{child.name}' in its backing chain"
                )
        if child.read_only:
            raise UsageError(f"'{child.filename}' is read-only: nothing can be copied to it")

    @property
    def _unit(self) -> int:
        driver = self.child.driver
        return driver.allocation_unit if isinstance(driver, FormatDriver) else 1

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """Copying writes what is there already; nobody else may write meanwhile."""
        if not taken:
            # Nobody reads yet (or any more), so nothing is copied: it may be put in beside a user.
            return taken | Permission.WRITE_UNCHANGED, shared
        return taken | Permission.WRITE_UNCHANGED, shared & ~(Permission.WRITE | Permission.RESIZE)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Copy what is missing, chunk by chunk, and read."""
        done = 0
        while done < len(view):
            piece = view[done : done + _CHUNK]
            await self._read_chunk(offset + done, piece)
            done += len(piece)

    async def _read_chunk(self, offset: int, view: memoryview) -> None:
        start = align_down(offset, self._unit)
        end = min(align_up(offset + len(view), self._unit), self.child.size)
        if await self._missing(start, end):
            async with self.node.claims.claim(start, end):
                # Another request may have copied or written it while this one waited.
                for low, high in await self._missing(start, end):
                    await self._copy(low, high)
        await io.read_into(self.child, offset, view)

    async def _missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The runs that are to be copied."""
        layers = self.child.chain()
        if self._bottom is not None and self._bottom not in layers:
            # All of it has been copied: a stream gave it up, and is about to take the filter out.
            return []
        lowest = layers.index(self._bottom) if self._bottom is not None else None
        found = []
        async for run in runs(self.child, start, end - start):
            own = run.depth == 0 and run.present
            too_low = lowest is not None and (run.depth > lowest or not run.present)
            if not own and not too_low:
                found.append((run.offset, run.end))
        return found

    async def _copy(self, start: int, end: int) -> None:
        child = self.child
        data = await io.read(child, start, end - start)
        if io.is_zero(data):
            await io.write_zeroes(child, start, len(data))
        else:
            await io.write(child, start, data)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Pass on."""
        async with self.node.claims.claim(offset, offset + len(data)):
            await super().write_opaque(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Pass on."""
        async with self.node.claims.claim(offset, offset + length):
            await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        """Pass on."""
        async with self.node.claims.claim(offset, offset + length):
            await super().discard(offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Pass on."""
        async with self.node.claims.claim(offset, offset + len(data)):
            await super().write_compressed(offset, data)
