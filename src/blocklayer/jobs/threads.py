"""Threads and workers for bulk work, which have always ended when their user goes on.

1. Neither ``Threads.run`` nor the pool's end leaves a function running (``graph.waiting``).
2. ``crew`` and ``in_order`` end when all their work has ended; the first error stops the others.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

from blocklayer.graph.waiting import in_thread

T = TypeVar("T")
U = TypeVar("U")
Ts = TypeVarTuple("Ts")


class Threads:
    """A pool for ``users`` that each wait for one function at a time; use with ``with``."""

    def __init__(self, users: int) -> None:
        # More threads than cores only get in each other's way; one more may wait for a disk.
        self._pool = ThreadPoolExecutor(min(users, (os.cpu_count() or 1) + 1))

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; nobody waits for one."""
        self._pool.shutdown()

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """``function(*args)`` in a thread."""
        return await in_thread(self._pool, function, *args)


async def crew(count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``count`` workers side by side. Raises the first error met."""
    workers = [asyncio.create_task(work()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def in_order(
    items: AsyncIterator[T], work: Callable[[T], Coroutine[Any, Any, U]], most: int
) -> AsyncGenerator[U, None]:
    """``work`` of each item, ``most`` at once, given in the items' order.

    Raises the first error met; all work has ended when this has.
    """
    running: deque[asyncio.Task[U]] = deque()
    try:
        ended = False
        while True:
            while not ended and len(running) < most:
                item = await anext(items, None)
                ended = item is None
                if item is not None:
                    running.append(asyncio.create_task(work(item)))
            if not running:
                return
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
