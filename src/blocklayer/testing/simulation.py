"""Deterministic simulation: an event loop whose time is not the clock's, and that tells a deadlock.

    result = simulate(main(random.Random(seed)))

Together with ``CrashingDisk`` (``concurrent``, ``chance``) a seed decides how long each request
takes, and so in which order they end; the same seed gives the same run.

1. Time passes only when nothing can run, and then at once: sleeping costs nothing.
2. When nothing can run and nothing ever will, ``DeadlockError`` says who waits where.
3. There are no threads: what would run in one runs at once, on the loop.
"""

from __future__ import annotations

import asyncio
import io
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from blocklayer.errors import BlockError

T = TypeVar("T")


class DeadlockError(BlockError):
    """Every task waits for another."""


class _Time(selectors.SelectSelector):
    """Instead of waiting, lets time pass."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise DeadlockError("Nothing is left that could happen")
            self.now += max(0.0, timeout)
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop in its own time, in seconds from 0."""

    def __init__(self) -> None:
        self._own_time = _Time()
        super().__init__(self._own_time)

    def time(self) -> float:
        """Seconds since the loop was made, as far as it is concerned."""
        return self._own_time.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, function: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call ``function`` now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` to its end. Raises DeadlockError, and what ``main`` raises."""
    loop = SimulatedLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    except DeadlockError as error:
        told = io.StringIO()
        for task in asyncio.all_tasks(loop):
            task.print_stack(file=told)
        raise DeadlockError(f"{error}\n{told.getvalue()}") from None
    finally:
        for task in asyncio.all_tasks(loop):
            # They will never run again: nobody is to complain of that.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        asyncio.set_event_loop(None)
        loop.close()
