"""Threads and workers for bulk work, which have always ended when their user goes on.

1. ``Threads.run`` returns or raises only after the function has ended, even when the task is
   cancelled: buffers and files may then be given up.
2. ``crew`` ends when all workers have ended; the first error stops the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class Threads:
    """A pool of ``count`` threads; use with ``with``."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args)`` in a thread."""
        assert not kwargs, "an executor passes on positional arguments only"
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            if not future.cancelled():
                # Its error matters no more, but asyncio wants somebody to have looked at it.
                future.exception()
            raise


async def crew(count: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``count`` workers side by side. Raises the first error met."""
    workers = [asyncio.create_task(work()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
