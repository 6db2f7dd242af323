"""Waiting without a thread hop where nobody else waits: blocking calls and in-place coroutines.

A coroutine of this package runs in one of two ways: as a task of a running asyncio loop, beside
others, or *in place*, driven by ``run`` for a synchronous caller who has nothing else to do. A
blocking call would stop everybody in the first case and nobody in the second.

1. ``offload`` never blocks a loop that runs tasks; in place it just calls.
2. What runs in a thread has ended when its caller goes on, even if that was cancelled: buffers,
   files and the space written to may then be given up.
3. ``run`` gives a coroutine that does suspend a real loop to finish on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_place = threading.local()


def in_place() -> bool:
    """Whether the current coroutine is driven by ``run`` and has not suspended so far."""
    return getattr(_place, "active", False)


async def offload(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """``function(*args)``, which may block: in a thread if the loop has other tasks to serve."""
    if in_place():
        return function(*args)
    return await in_thread(None, function, *args)


async def in_thread(pool: Executor | None, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """``function(*args)`` in a thread of ``pool`` (None: the loop's own)."""
    future = asyncio.get_running_loop().run_in_executor(pool, function, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        if not future.cancelled():
            # Its error matters no more, but asyncio wants somebody to have looked at it.
            future.exception()
        raise


class _Resumed:
    """The rest of a coroutine that already yielded once, awaitable from a task."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], first: Any) -> None:
        self._coroutine = coroutine
        self._first = first

    def __await__(self) -> Generator[Any, Any, Any]:
        waited_for = self._first
        while True:
            failure: BaseException | None = None
            value = None
            try:
                # The future is handed to the task that runs us, as if it had been awaited here.
                value = yield waited_for
            except BaseException as error:
                failure = error
            try:
                if failure is None:
                    waited_for = self._coroutine.send(value)
                else:
                    waited_for = self._coroutine.throw(failure)
            except StopIteration as stop:
                return stop.value


async def _finish(rest: _Resumed) -> Any:
    return await rest


def run(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Drive ``coroutine`` to its end for a synchronous caller; ``loop`` is used if it suspends."""
    if in_place():
        raise RuntimeError("the synchronous API was called from inside one of its own requests")
    # A caller inside a loop of its own (a notebook) is as synchronous as any: that loop stands
    # still meanwhile.
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(loop)
    _place.active = True
    try:
        first = coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        _place.active = False
        asyncio._set_running_loop(outer)
    asyncio._set_running_loop(None)
    try:
        result: T = loop.run_until_complete(_finish(_Resumed(coroutine, first)))
        return result
    finally:
        asyncio._set_running_loop(outer)


def begin(coroutine: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
    """Drive ``coroutine`` until it first waits; the rest, for a task to run, or None if it ended.

    For servers on a running loop: what can be answered at once costs no task. An exception is
    raised here if it comes before the first wait.
    """
    try:
        first = coroutine.send(None)
    except StopIteration:
        return None
    return _finish(_Resumed(coroutine, first))
