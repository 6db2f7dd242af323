"""The shell's connection: the client in a thread of its own, so that typing and events coexist.

1. Calls come from the main thread, one at a time. Ctrl-C gives up waiting for a reply; the command
   itself goes on in the server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from blocklayer.qmp.client import Client

AnyResult = TypeVar("AnyResult")


class Connection:
    """A connected client. ``on_event`` is called in the client's thread."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._on_event = on_event
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._client: Client | None = None
        self._follower: concurrent.futures.Future[None] | None = None

    def open(self, address: str, *, negotiate: bool) -> dict[str, Any]:
        """Connect; the server's greeting. Raises BlockError."""
        self._client = self._call(Client.connect(address, negotiate=negotiate))
        self._follower = asyncio.run_coroutine_threadsafe(self._follow(self._client), self._loop)
        return self._client.greeting

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to ``message``. Raises BlockError when the connection has ended."""
        assert self._client is not None
        return self._call(self._client.exchange(message))

    @property
    def ended(self) -> bool:
        """Whether the server has gone."""
        return self._follower is not None and self._follower.done()

    def close(self) -> None:
        """Leave the server and end the thread."""
        try:
            if self._client is not None:
                self._call(self._client.close())
            if self._follower is not None:
                concurrent.futures.wait([self._follower])
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        # Ctrl-C is the main thread's: one that came here would not wake it at its prompt.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._loop.run_forever()

    async def _follow(self, client: Client) -> None:
        async for event in client.events():
            self._on_event(event)

    def _call(self, work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
