"""``memory``: storage that lives in this process, in proportion to what was written.

1. Pages never written, or zeroed as a whole, take no memory and are holes in ``map``.
2. A write past the end makes the storage grow, as it does with a file.
3. The contents are gone when the node closes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from blocklayer.errors import UsageError
from blocklayer.graph.driver import Buffer, ProtocolDriver, ThreadSafeIO
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import NodeOptions, Size
from blocklayer.units import KIB

PAGE = 64 * KIB


class MemoryOptions(NodeOptions):
    """``size`` is what the storage starts with, all zeros."""

    size: Size = 0


class Pages:
    """Sparse bytes: pages by index; an absent page reads as zeros."""

    __slots__ = ("_growing", "pages", "size")

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self.pages: dict[int, bytearray] = {}
        self._growing = threading.Lock()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; past the end there are zeros."""
        done, total = 0, len(view)
        while done < total:
            index, within = divmod(offset + done, PAGE)
            length = min(PAGE - within, total - done)
            page = self.pages.get(index)
            view[done : done + length] = page[within : within + length] if page else bytes(length)
            done += length

    def write(self, offset: int, data: Buffer) -> None:
        """Store ``data``; grows as needed."""
        view = memoryview(data)
        done, total = 0, len(view)
        while done < total:
            index, within = divmod(offset + done, PAGE)
            length = min(PAGE - within, total - done)
            page = self.pages.get(index)
            if page is None:
                # In one step: another thread may be making the same page.
                page = self.pages.setdefault(index, bytearray(PAGE))
            page[within : within + length] = view[done : done + length]
            done += length
        if offset + total > self.size:
            with self._growing:
                self.size = max(self.size, offset + total)

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros; whole pages are given back."""
        end = offset + length
        for index in self._touched(offset, end):
            start, stop = max(offset - index * PAGE, 0), min(end - index * PAGE, PAGE)
            if stop - start == PAGE:
                del self.pages[index]
            else:
                self.pages[index][start:stop] = bytes(stop - start)
        self.size = max(self.size, end)

    def _touched(self, offset: int, end: int) -> list[int]:
        """Indices of the pages in memory that the range meets."""
        first, last = offset // PAGE, -(-end // PAGE)
        if last - first <= len(self.pages):
            return [index for index in range(first, last) if index in self.pages]
        return [index for index in self.pages if first <= index < last]

    def truncate(self, size: int) -> None:
        """Change the size; what is cut off reads as zeros if it comes back."""
        if size < self.size:
            self.zero(size, self.size - size)
        self.size = size

    def run(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether ``offset`` lies in a page in memory, and how many bytes on (of ``length``) do."""
        index, last = offset // PAGE, (offset + length - 1) // PAGE
        held = index in self.pages
        if held:
            while index <= last and index in self.pages:
                index += 1
        else:
            index = min(self._touched(offset, offset + length), default=last + 1)
        return held, min(length, index * PAGE - offset)


class MemoryDriver(ProtocolDriver):
    """Sparse storage in memory."""

    NAME = "memory"
    Options = MemoryOptions
    filename_option = None

    async def open(self) -> None:
        """Start with zeros."""
        options = self.node.options
        assert isinstance(options, MemoryOptions)
        self.storage = Pages(options.size)

    async def close(self) -> None:
        """Give the memory back."""
        self.storage = Pages()

    def take_over(self, old: ProtocolDriver) -> None:
        """The contents."""
        assert isinstance(old, MemoryDriver)
        self.storage = old.storage

    @property
    def size(self) -> int:
        """Bytes stored or reserved."""
        return self.storage.size

    def identity(self) -> object:
        """No other node stores here."""
        return self

    def actual_size(self) -> int:
        """Bytes of memory in use."""
        return len(self.storage.pages) * PAGE

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``."""
        self.storage.read_into(offset, view)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store ``buffers``."""
        self.node.check_writable()
        for data in buffers:
            self.storage.write(offset, data)
            offset += len(data)

    async def map(self, offset: int, length: int) -> Extent:
        """Pages in memory are data, the rest are holes."""
        held, length = self.storage.run(offset, length)
        return Extent(offset, length, Kind.DATA if held else Kind.ZERO, offset, writable=True)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero, giving whole pages back."""
        self.node.check_writable()
        self.storage.zero(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """What was discarded reads as zeros."""
        await self.zero(offset, length, unmap=True)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the size; memory is never reserved."""
        self.node.check_writable()
        if preallocation != "off":
            raise UsageError(f"Unsupported preallocation mode '{preallocation}' for memory")
        if size < self.size and not shrink:
            raise UsageError(
                f"Shrinking '{self.node.name}' from {self.size} to {size} bytes would lose data"
            )
        self.storage.truncate(size)

    def thread_safe_io(self) -> ThreadSafeIO:
        """Bytes of a page are copied without letting another thread in."""
        return self.storage
