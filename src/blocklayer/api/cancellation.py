"""Calling off long operations of synchronous callers: by a token, or by Ctrl-C.

1. The operation ends at its next safe point, as a cancelled task of asyncio does: what it had made
   is removed or left valid, and no thread of it goes on.
2. Who called it off gets ``CancelledError``, or after Ctrl-C ``KeyboardInterrupt``.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from blocklayer.errors import CancelledError

T = TypeVar("T")


class Cancellation:
    """Give it to an operation as ``cancel=``, and call ``cancel`` from anywhere: another thread, a
    signal handler, or the operation's own progress callback.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
        self.cancelled = False
        """Whether ``cancel`` was called; operations given this token then refuse to begin."""

    def cancel(self) -> None:
        """Call off what runs with this token, and what would begin."""
        with self._lock:
            self.cancelled = True
            for loop, task in self._running:
                loop.call_soon_threadsafe(task.cancel)

    def _enter(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        with self._lock:
            self._running.append((loop, task))
            if self.cancelled:
                task.cancel()

    def _leave(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        with self._lock:
            self._running.remove((loop, task))


def run_cancellable(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T], token: Cancellation | None
) -> T:
    """The coroutine's result; ``loop`` is not running. Raises CancelledError, KeyboardInterrupt."""
    token = token or Cancellation()
    task = loop.create_task(coroutine)
    interrupted = False

    def on_interrupt(*received: object) -> None:
        nonlocal interrupted
        interrupted = True
        # A signal handler runs in the loop's own thread, between two of its steps or inside one.
        loop.call_soon_threadsafe(task.cancel)

    restore = _handle_interrupt(on_interrupt)
    token._enter(loop, task)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        if interrupted:
            raise KeyboardInterrupt from None
        raise CancelledError("Cancelled by its caller") from None
    finally:
        token._leave(loop, task)
        if restore:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle_interrupt(handler: Any) -> bool:
    """Let ``handler`` have Ctrl-C, unless the program has its own way with it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, handler)
    return True
