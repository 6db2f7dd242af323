"""Tables of an image, kept in parts: what all drivers that map by table need and nothing else.

``TableCache`` reads parts of tables (a page of a block map, a grain table) when they are first
looked at, and writes back those that changed. ``Space`` hands out room at the end of the file.

1. Memory is bounded by ``MAX_BYTES`` however large the image's tables are.
2. A changed part stays until ``write_back`` has written it; an error leaves it changed. When
   ``write_back`` returns, what had changed before it was called is written.
3. Space is never handed out twice. What was taken and given back is handed out again, and then is
   not known to read as zeros.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Literal

from blocklayer.graph import io
from blocklayer.graph.node import Node
from blocklayer.units import align_up

PAGE_SIZE: Final = 64 * 1024
"""Bytes of a long table that are read at once."""
MAX_BYTES: Final = 16 << 20


class Part:
    """Consecutive entries of a table, and which of them have changed."""

    __slots__ = ("entries", "first_changed", "host_offset", "last_changed")

    def __init__(self, host_offset: int, entries: array[int]) -> None:
        self.host_offset = host_offset
        self.entries = entries
        self.first_changed = len(entries)
        self.last_changed = -1

    @property
    def changed(self) -> bool:
        """Whether memory differs from the file."""
        return self.last_changed >= 0

    def set(self, index: int, value: int) -> None:
        """Change one entry."""
        self.entries[index] = value
        self.first_changed = min(self.first_changed, index)
        self.last_changed = max(self.last_changed, index)

    def clean(self) -> None:
        """The file holds what memory holds."""
        self.first_changed, self.last_changed = len(self.entries), -1

    @property
    def uniform(self) -> bool:
        """Whether all entries are equal; far faster than to look at each."""
        return self.entries.count(self.entries[0]) == len(self.entries)


class TableCache:
    """Parts of the tables of one image, by where they are in ``storage``."""

    def __init__(self, storage: Node, code: Literal["I", "Q"], byte_order: str) -> None:
        self._storage = storage
        self._code = code
        self._swap = byte_order != sys.byteorder
        self._parts: dict[int, Part] = {}
        self._bytes = 0
        self._turn = asyncio.Lock()
        self.width = array(code).itemsize

    @property
    def full(self) -> bool:
        """Changed parts take so much memory that it is time for ``write_back``."""
        return self._bytes > MAX_BYTES

    async def load(self, host_offset: int, count: int) -> Part:
        """The ``count`` entries at ``host_offset``. Do not keep the part over an ``await``."""
        part = self._parts.pop(host_offset, None)
        if part is None:
            data = bytearray(count * self.width)
            await io.read_into(self._storage, host_offset, memoryview(data))
            entries = array(self._code)
            entries.frombytes(data)
            if self._swap:
                entries.byteswap()
            # Somebody may have read, and changed, the same part meanwhile.
            part = self._parts.pop(host_offset, None)
            if part is None:
                part = Part(host_offset, entries)
                self._bytes += len(data)
        self._parts[host_offset] = part
        if self._bytes > MAX_BYTES:
            self._evict(part)
        return part

    def add(self, host_offset: int, entries: array[int]) -> Part:
        """A new table, which the file does not hold yet."""
        part = Part(host_offset, entries)
        part.first_changed, part.last_changed = 0, len(entries) - 1
        self._parts[host_offset] = part
        self._bytes += len(entries) * self.width
        return part

    def _evict(self, needed: Part) -> None:
        """Forget the parts that were not used for longest, except changed ones."""
        for host_offset, part in list(self._parts.items()):
            if self._bytes <= MAX_BYTES // 2:
                return
            if not part.changed and part is not needed:
                del self._parts[host_offset]
                self._bytes -= len(part.entries) * self.width

    def changed(self) -> list[Part]:
        """All changed parts, in the order of the file."""
        return sorted((p for p in self._parts.values() if p.changed), key=lambda p: p.host_offset)

    def encode(self, entries: array[int]) -> bytes:
        """``entries`` as the file holds them."""
        if self._swap:
            entries = entries[:]
            entries.byteswap()
        return entries.tobytes()

    async def write_back(
        self,
        settle: Callable[[], Awaitable[None]],
        copies: Mapping[int, int] | None = None,
    ) -> None:
        """Write what has changed, after ``settle`` has brought what it names to its place.

        ``copies`` gives, by their places, the places of second copies, which are written first.
        """
        async with self._turn:
            # What changes from here on is for the next time: it may name what is not settled.
            pending = [self._snapshot(part) for part in self.changed()]
            if not pending:
                return
            try:
                await settle()
                while pending:
                    part, first, _, data = pending[-1]
                    copy = copies.get(part.host_offset) if copies else None
                    if copy:
                        await io.write(self._storage, copy + first * self.width, data)
                    await io.write(self._storage, part.host_offset + first * self.width, data)
                    pending.pop()
            except BaseException:
                for part, first, last, _ in pending:
                    part.first_changed = min(part.first_changed, first)
                    part.last_changed = max(part.last_changed, last)
                raise

    def _snapshot(self, part: Part) -> tuple[Part, int, int, bytes]:
        first, last = part.first_changed, part.last_changed
        part.clean()
        return part, first, last, self.encode(part.entries[first : last + 1])


class Space:
    """Room at the end of ``storage``, for formats that never free any."""

    def __init__(self, storage: Node, end: int) -> None:
        self._storage = storage
        self.end = end
        self._given_back: list[tuple[int, int]] = []
        self._taken = self._reused = False
        self._growing = asyncio.Lock()

    async def take(self, length: int, alignment: int = 1) -> tuple[int, int]:
        """``length`` bytes: where, and from which place on they are known to read as zeros."""
        for position, (host_offset, size) in enumerate(self._given_back):
            if size == length and not host_offset % alignment:
                del self._given_back[position]
                self._reused = True
                return host_offset, host_offset + length
        self._taken = True
        host_offset, old_end = align_up(self.end, alignment), self._storage.size
        self.end = host_offset + length
        try:
            await self.grow(self.end)
        except BaseException:
            self.give_back(host_offset, length)
            raise
        return host_offset, old_end

    def give_back(self, host_offset: int, length: int) -> None:
        """What ``take`` gave is not used after all."""
        self._given_back.append((host_offset, length))

    def touched(self) -> None:
        """Space that was not taken here is named from now on: ``settle`` has to flush."""
        self._reused = True

    async def grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long."""
        async with self._growing:
            if self._storage.size < end:
                await io.truncate(self._storage, end)

    async def settle(self) -> None:
        """Bring what was taken to stable storage, as it must be before a table names it.

        Otherwise a crash could leave a table that names space past the end of the file, or space
        that does not hold what the guest saw before.
        """
        if self._taken or self._reused:
            self._taken = self._reused = False
            await io.flush(self._storage)

    async def settle_reused(self) -> None:
        """The same for formats in which new space may be missing: it reads as zeros then."""
        if self._reused:
            self._reused = False
            await io.flush(self._storage)
