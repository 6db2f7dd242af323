"""A disk in use, for tests of live jobs: a guest that writes all the time, and knows what is there.

The guest is a coroutine with a seed: the same seed gives the same requests.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from blocklayer import aio
from blocklayer.drivers import REGISTRY
from blocklayer.graph.events import Event, JobStatusChange
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.group import Group, Jobs
from blocklayer.units import KIB
from oracles import HANG_TIMEOUT_S

SIZE = 3 << 20
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


class Guest:
    """Writes, zeroes and discards through ``root``, one request after the other, until stopped."""

    def __init__(self, root: Root, seed: int, content: bytes = b"") -> None:
        self.root = root
        self.content = bytearray(content.ljust(root.node.size, b"\0"))
        self.requests = 0
        self._random = random.Random(seed)
        self._task: asyncio.Task[None] | None = None

    async def one(self) -> None:
        """One request."""
        chance = self._random
        length = chance.choice((512, 4096, 4096, 65536, 200_000))
        offset = chance.randrange(0, (len(self.content) - length) // 512) * 512
        match chance.randrange(8):
            case 0:
                await self.root.write_zeroes(offset, length, unmap=chance.random() < 0.5)
                self.content[offset : offset + length] = bytes(length)
            case 1:
                await self.root.flush()
            case 2:
                got = await self.root.read(offset, length)
                assert got == self.content[offset : offset + length], hex(offset)
            case _:
                data = chance.randbytes(16) * (length // 16)
                await self.root.write(offset, data)
                self.content[offset : offset + length] = data
        self.requests += 1

    async def _go(self) -> None:
        while True:
            await self.one()
            await asyncio.sleep(0)

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._go())

    async def at_least(self, requests: int) -> None:
        """Wait until so many more requests are done."""
        goal = self.requests + requests
        while self.requests < goal:
            assert self._task is not None
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0)

    async def stop(self) -> None:
        """Stop between two requests; raises what went wrong."""
        assert self._task is not None
        task, self._task = self._task, None
        if task.done():
            task.result()
        # Not cancelled within a request: the content would not be known.
        stopped = asyncio.Event()
        original = self.one

        async def last() -> None:
            stopped.set()
            await asyncio.get_running_loop().create_future()

        self.one = last  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(stopped.wait())
        await asyncio.wait((waiting, task), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        task.cancel()
        self.one = original  # type: ignore[method-assign]

    async def check(self, node: Node | None = None) -> None:
        """The disk (or ``node``) holds exactly what was written."""
        if node is None:
            assert await self.root.read(0, len(self.content)) == bytes(self.content)
            return
        reader = Root(node, "the test", Permission.CONSISTENT_READ)
        assert await reader.read(0, len(self.content)) == bytes(self.content)
        await reader.close()


class Stage:
    """A graph with jobs, in a folder, and the events heard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.graph = Graph(REGISTRY)
        self.jobs = Jobs()
        self.heard: list[str] = []
        self.graph.listeners.append(self._hear)

    def _hear(self, event: Event) -> None:
        self.heard.append(event.status if isinstance(event, JobStatusChange) else event.NAME)

    def group(self) -> Group:
        """A new group."""
        return Group(self.jobs)

    async def image(self, name: str, *, size: int = SIZE, **options: object) -> Path:
        """A new qcow2 image."""
        path = self.folder / f"{name}.qcow2"
        await aio.create(path, size, **options)  # type: ignore[arg-type]
        return path

    async def open(self, name: str, *, read_only: bool = False, **options: object) -> Node:
        """A node ``name`` for the image of that name, held by the graph."""
        path = self.folder / f"{name}.qcow2"
        node = await open_options(
            self.graph,
            {
                "driver": "qcow2", "node-name": name,
                "file": {"driver": "file", "filename": str(path)}, **options,
            },
            Flags(read_only=read_only, discard_unmap=True),
        )  # fmt: skip
        node.held = True
        return node

    async def disk(self, name: str) -> Node:
        """A new image, opened."""
        await self.image(name)
        return await self.open(name)

    async def chain(self, *names: str, seed: int = 1) -> list[Node]:
        """Images ``names`` from the base up, each with some data; opened from the top down."""
        chance = random.Random(seed)
        below: str | None = None
        for name in names:
            if below is None:
                await self.image(name)
            else:
                await self.image(
                    name, backing=self.folder / f"{below}.qcow2", backing_format="qcow2"
                )
            below = name
            async with await aio.Disk.open(self.folder / f"{name}.qcow2", writable=True) as disk:
                for _ in range(6):
                    offset = chance.randrange(0, SIZE // (64 * KIB)) * 64 * KIB
                    await disk.write(offset, chance.randbytes(64) * KIB)
        nodes: list[Node] = []
        for name in names:
            backing = nodes[-1].name if nodes else None
            nodes.append(await self.open(name, read_only=name != names[-1], backing=backing))
        return nodes

    def attach(self, node: Node) -> Root:
        """A guest's root."""
        return Root(node, "the guest", READ_WRITE)

    async def close(self) -> None:
        """Give back everything; nothing may be left."""
        await self.jobs.cancel_all()
        for root in list(self.graph.roots):
            await root.close()
        for node in list(self.graph.nodes.values()):
            if node.held:
                node.held = False
                await self.graph.release(node)
        assert self.graph.nodes == {}


def play(folder: Path, scene: Callable[[Stage], Awaitable[None]]) -> list[str]:
    """Run ``scene`` on a new stage; the answer is what was heard."""

    async def main() -> list[str]:
        stage = Stage(folder)
        async with asyncio.timeout(HANG_TIMEOUT_S):
            await scene(stage)
            await stage.close()
        return stage.heard

    return asyncio.run(main())
