"""Receiving: bytes that come in order, until they end, become a disk that grows as they come.

1. The disk grows ahead of the data, ever more at once, and ends with the data's last sector.
2. A disk that must not grow takes what fits; more is an error, met before it is written.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

from blocklayer.errors import UsageError
from blocklayer.graph.driver import Driver
from blocklayer.graph.root import Root
from blocklayer.jobs.copying import CHUNK_SIZE, Copier, CopyOptions
from blocklayer.jobs.plan import Piece
from blocklayer.units import GIB, SECTOR, align_up

Read = Callable[[memoryview], Awaitable[int]]
"""Fills a buffer and says how far; less than all of it is the end."""


def can_grow(driver: type[Driver]) -> bool:
    """Whether disks of ``driver`` can be made larger."""
    return driver.truncate is not Driver.truncate


class Receiver:
    """Puts what ``read`` gives into ``target``, which may ``grow``. For one use."""

    def __init__(
        self,
        read: Read,
        target: Root,
        options: CopyOptions,
        *,
        grow: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._read = read
        self._target = target
        self._options = options
        self._grow = grow
        self._grown = False
        self._size = 0
        self._copier = Copier(target, options, progress)

    async def receive(self) -> int:
        """Copy all; the answer is the number of bytes, rounded up to whole sectors."""
        await self._copier.copy(self._pieces())
        target = self._target
        if self._options.compress:
            await target.write_compressed(0, b"")
        if self._grown and target.node.size != self._size:
            await target.truncate(self._size, shrink=True)
        return self._size

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        offset, count = 0, CHUNK_SIZE
        while count == CHUNK_SIZE:
            view = memoryview(bytearray(CHUNK_SIZE))
            count = await self._read(view)
            if count:
                await self._make_room(offset + count)
                yield Piece(offset, count, data=view[:count])
                offset += count
        self._size = align_up(offset, SECTOR)
        # A compressed cluster is written whole.
        end = align_up(offset, max(self._copier.unit, SECTOR)) if self._grow else self._size
        if end > offset:
            await self._make_room(end)
            yield Piece(offset, end - offset)

    async def _make_room(self, end: int) -> None:
        size = self._target.node.size
        if end <= size:
            return
        end = align_up(end, SECTOR)
        if not self._grow:
            raise UsageError(
                f"the input is larger than the output file: '{self._target.node.filename}' has "
                f"{size} bytes"
            )
        await self._target.truncate(max(end, size + min(size, GIB)))
        self._grown = True
