"""The tour's guest: it hammers disks in use, and can tell what each moment of them looked like.

1. Requests come one after the other, over all disks, and are numbered. A disk at some moment is
   what the first N requests made of it, for one N; of several disks at one instant, the same N.
2. Every write carries its number, so that N can be found in what a copy holds.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Mapping
from typing import Final

from blocklayer.api.disk import Disk
from blocklayer.units import KIB

_BLOCK: Final = 4 * KIB
_MARK: Final = b"written:"
_HEADER: Final = struct.Struct(">8sQ")
_LATER: Final = 16
"""Requests that may leave no number behind: zeros, and what they cover."""

_THINKS_S = 0.005
"""Between two requests: a copy that follows a guest without any pause may never catch up."""


class Guest:
    """A writer with a seed, on ``disks`` by name."""

    def __init__(self, disks: Mapping[str, Disk], contents: Mapping[str, bytes]) -> None:
        self._disks = dict(disks)
        self._origin = {name: bytearray(content) for name, content in contents.items()}
        self._journal: list[tuple[str, int, bytes]] = []
        self._first = 1
        """The number of the journal's first request."""
        self._random = random.Random(7)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.acknowledged = 0
        """Requests that were answered."""

    def start(self) -> None:
        """Go on writing."""
        self._stopping = False
        self._task = asyncio.create_task(self._hammer())

    async def pause(self) -> None:
        """Stop after the request in flight; raises what went wrong."""
        assert self._task is not None
        self._stopping = True
        task, self._task = self._task, None
        await task

    async def at_least(self, requests: int) -> None:
        """Wait until so many more requests are answered."""
        goal = self.acknowledged + requests
        while self.acknowledged < goal:
            assert self._task is not None
            if self._task.done():
                self._task.result()
            await asyncio.sleep(_THINKS_S)

    async def _hammer(self) -> None:
        chance, names = self._random, list(self._disks)
        while not self._stopping:
            name, number = chance.choice(names), self.acknowledged + 1
            length = chance.choice((1, 1, 2, 16)) * _BLOCK
            blocks = (len(self._origin[name]) - length) // _BLOCK
            offset = chance.randrange(blocks) * _BLOCK
            if chance.random() < 0.1:
                data = bytes(length)
                request = self._disks[name].write_zeroes(offset, length, unmap=True)
            else:
                block = _HEADER.pack(_MARK, number) + bytes([number & 255]) * (_BLOCK - 16)
                data = block * (length // _BLOCK)
                request = self._disks[name].write(offset, data)
            # Before it is answered it may be in a copy already, or not yet.
            self._journal.append((name, offset, data))
            await request
            self.acknowledged = number
            if chance.random() < 0.02:
                await self._disks[name].flush()
            await asyncio.sleep(_THINKS_S)

    async def lost_nothing(self, name: str) -> bool:
        """Whether the disk, which is paused, holds exactly what was written."""
        assert self._task is None
        self._settle()
        disk = self._disks[name]
        return await disk.read(0, disk.size) == bytes(self._origin[name])

    def _settle(self) -> None:
        """Every request of the journal has been answered: start a new one."""
        for name, offset, data in self._journal:
            self._origin[name][offset : offset + len(data)] = data
        self._first += len(self._journal)
        self._journal.clear()

    def moment(self, **copies: bytes) -> int | None:
        """The number of requests after which the disks were exactly like ``copies``.

        Only moments since the guest last was paused and compared are found; None: there is none.
        """
        known = {name: bytearray(self._origin[name]) for name in copies}
        newest = max(_newest(copy) for copy in copies.values())
        done = self._first - 1
        for name, offset, data in [*self._journal, ("", 0, b"")]:
            if done >= newest and all(known[each] == copies[each] for each in copies):
                return done
            if done > newest + _LATER:
                break
            done += 1
            if name in known:
                known[name][offset : offset + len(data)] = data
        return None


def _newest(copy: bytes) -> int:
    """The greatest number that a write has left in ``copy``."""
    greatest = 0
    for offset in range(0, len(copy), _BLOCK):
        mark, number = _HEADER.unpack_from(copy, offset)
        if mark == _MARK and number > greatest:
            greatest = number
    return greatest
