"""A guest that knows, sector by sector, what its disk holds, and what it may hold after a crash."""

from __future__ import annotations

import asyncio
import random

from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import SECTOR


def pattern(token: int) -> bytes:
    """The content of a sector that was written with `token`; 0 stands for zeros."""
    return token.to_bytes(8, "big") * (SECTOR // 8)


class Writer:
    """Sends one request after the other through `root`, until told to stop."""

    def __init__(self, root: Root, chance: random.Random) -> None:
        self.root = root
        self.now = [0] * (root.node.size // SECTOR)
        self.possible = [{0} for _ in self.now]
        """What each sector may hold if the power fails: since the last flush, old or new."""
        self._chance = chance
        self._token = 0
        self._stopping = False
        self._task = asyncio.create_task(self._go())

    async def _go(self) -> None:
        while not self._stopping:
            await self._one()
            await asyncio.sleep(self._chance.random() * 0.02)

    async def _one(self) -> None:
        chance = self._chance
        count = chance.choice((1, 1, 8, 8, 16, 40))
        first = chance.randrange(0, len(self.now) - count)
        place = first * SECTOR, count * SECTOR
        kind = chance.randrange(10)
        if kind == 0:
            await self.root.flush()
            self.possible = [{token} for token in self.now]
        elif kind in (1, 2):
            assert await self.root.read(*place) == self.content(first, count)
        else:
            self._token += 1
            token = 0 if kind == 3 else self._token
            for sector in range(first, first + count):
                self.possible[sector].add(token)
            if token:
                await self.root.write(place[0], pattern(token) * count)
            else:
                await self.root.write_zeroes(*place, unmap=chance.random() < 0.5)
            self.now[first : first + count] = [token] * count

    def content(self, first: int, count: int) -> bytes:
        """What these sectors hold."""
        return b"".join(map(pattern, self.now[first : first + count]))

    async def stop(self) -> None:
        """Stop after the request under way; raises what went wrong."""
        self._stopping = True
        await self._task

    async def check(self) -> None:
        """The disk holds what was written."""
        await check(self.root.node, self.now)


async def check(node: Node, tokens: list[int]) -> None:
    """`node` holds exactly that."""
    found = await read(node, len(tokens))
    wrong = [n for n, token in enumerate(tokens) if found[n] != pattern(token)]
    assert not wrong, f"{node.name}: sectors {wrong[:8]} differ"


async def read(node: Node, count: int) -> list[bytes]:
    """The sectors of `node`."""
    reader = Root(node, "the test", Permission.CONSISTENT_READ, follows=False)
    data = await reader.read(0, count * SECTOR)
    await reader.close()
    return [data[at : at + SECTOR] for at in range(0, len(data), SECTOR)]
