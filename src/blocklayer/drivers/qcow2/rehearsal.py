"""A repair that changes nothing: the same code, on a file that keeps what is written in memory.

Public:
    rehearse(driver, repair) -> Rehearsal

1. The image is read and never written. What a repair would write is kept in pages, and read back
   from there, so that a second look finds what it would find after the repair.
2. Memory is taken for the pages that would change: tables and refcount blocks, never guest data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.drivers.qcow2.storage import Storage
from blocklayer.graph.checking import PAGE_SIZE, ChangedPage, Rehearsal

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.driver import Qcow2Driver
    from blocklayer.graph.driver import Buffer


class _Shadow(Storage):
    """Reads ``child``; what is written stays here."""

    __slots__ = ("_size", "pages")

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.child)
        self.pages: dict[int, bytearray] = {}
        self._size = storage.size

    @property
    def size(self) -> int:
        """Bytes the file would have."""
        return self._size

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``, as it would be."""
        await super().read_into(offset, view)
        end = offset + len(view)
        for index in range(offset // PAGE_SIZE, -(-end // PAGE_SIZE)) if self.pages else ():
            page = self.pages.get(index)
            if page is not None:
                start, stop = max(offset, index * PAGE_SIZE), min(end, (index + 1) * PAGE_SIZE)
                base = index * PAGE_SIZE
                view[start - offset : stop - offset] = page[start - base : stop - base]

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Keep ``buffers``."""
        data = b"".join(buffers)
        at = offset
        while at < offset + len(data):
            index, inside = divmod(at, PAGE_SIZE)
            page = self.pages.get(index)
            if page is None:
                page = self.pages[index] = bytearray(PAGE_SIZE)
                await super().read_into(index * PAGE_SIZE, memoryview(page))
            length = min(PAGE_SIZE - inside, offset + len(data) - at)
            page[inside : inside + length] = data[at - offset : at - offset + length]
            at += length
        self._size = max(self._size, offset + len(data))

    async def flush(self) -> None:
        """Nothing here outlives anything."""


async def rehearse(driver: Qcow2Driver, repair: frozenset[str]) -> Rehearsal:
    """What ``check`` would find and write, and what a check after it would find."""
    from blocklayer.drivers.qcow2.check import look

    storage = Storage(driver.node.children["file"])
    shadow = _Shadow(storage)
    found = await look(driver, shadow, repair)
    after = await look(driver, shadow, frozenset())
    changed = []
    for index in sorted(shadow.pages):
        before = bytes(await storage.read(index * PAGE_SIZE, PAGE_SIZE))
        new = bytes(shadow.pages[index])
        if before != new:
            changed.append(ChangedPage(index * PAGE_SIZE, before, new))
    return Rehearsal(found, after, changed, storage.size, shadow.size)
