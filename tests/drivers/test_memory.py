"""``memory``: a disk by the contract, and memory in proportion to what is touched."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from blocklayer.drivers.memory import PAGE, MemoryDriver
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import resolve
from blocklayer.graph.extent import Kind
from blocklayer.graph.root import Root
from blocklayer.units import GIB, TIB
from drivers.opening import using

MEMORY = {"driver": "memory", "discard": "unmap"}


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


def storage(root: Root) -> MemoryDriver:
    assert isinstance(root.node.driver, MemoryDriver)
    return root.node.driver


def test_only_what_is_written_takes_memory() -> None:
    async def main() -> None:
        async with using({**MEMORY, "size": 8 * TIB}) as root:
            assert storage(root).actual_size() == 0
            await root.write(GIB - 1, b"two pages")
            await root.write(8 * TIB - 1, b"x")
            assert storage(root).actual_size() == 3 * PAGE
            found = [run_ async for run_ in resolve.runs(root.node, 0, root.node.size)]
            assert [(r.offset, r.length) for r in found if r.kind is Kind.DATA] == [
                (GIB - PAGE, 2 * PAGE),
                (8 * TIB - PAGE, PAGE),
            ]
            # One request over everything costs by what is there, not by what is asked.
            await root.discard(GIB, 7 * TIB)
            assert storage(root).actual_size() == 2 * PAGE
            await root.write_zeroes(0, 8 * TIB, unmap=True)
            assert storage(root).actual_size() == 0

    run(main())


def test_storage_grows_on_a_write_past_its_end() -> None:
    """As a file does under a format."""

    async def main() -> None:
        async with using(MEMORY) as root:
            await storage(root).write(1000, [b"a" * 10, b"b" * 10])
            assert root.node.size == 1020
            assert await root.read(990, 30) == bytes(10) + b"a" * 10 + b"b" * 10
            view = bytearray(b"-" * 8)
            await storage(root).read(1016, memoryview(view))
            assert view == b"bbbb" + bytes(4)

    run(main())


def test_nothing_comes_back_after_a_shrink() -> None:
    async def main() -> None:
        async with using({**MEMORY, "size": 3 * PAGE}) as root:
            await root.write(0, b"x" * 3 * PAGE)
            with pytest.raises(UsageError, match="would lose data"):
                await root.truncate(100)
            await root.truncate(100, shrink=True)
            await root.truncate(3 * PAGE)
            assert await root.read(0, 3 * PAGE) == b"x" * 100 + bytes(3 * PAGE - 100)
            with pytest.raises(BlockError, match="preallocation"):
                await root.truncate(4 * PAGE, preallocation="full")

    run(main())


def test_threads_may_write_one_page_at_once() -> None:
    async def main() -> None:
        async with using(MEMORY) as root:
            access = storage(root).thread_safe_io()
            pieces = [(at * 100, bytes([at]) * 100) for at in range(200)]
            await asyncio.gather(*(asyncio.to_thread(access.write, *piece) for piece in pieces))
            assert await root.read(0, 20_000) == b"".join(data for _, data in pieces)

    run(main())


def test_two_nodes_are_two_disks() -> None:
    async def main() -> None:
        async with using(MEMORY) as one, using(MEMORY) as other:
            assert storage(one).identity() != storage(other).identity()

    run(main())
