"""One connection to a monitor: bytes in, bytes out, and nobody else held up by either.

1. What is to be sent waits in a queue. A client that does not read makes its own session wait at
   ``LOW_WATER``: no further request of its is begun, then none is read.
2. Events do not wait for a client: beyond ``MAX_QUEUED`` they are dropped (the newest), counted,
   and a line about it goes to standard error once.
3. At the end of input what was asked for is still carried out and answered, so that scripts may be
   piped in; once output has failed, nothing more is begun. A command that has begun is carried out
   to its end in either case.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import sys
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

from blocklayer.qmp.streams import ByteStream

LOW_WATER: Final = 64 * 1024
"""Bytes unsent above which a session waits before it begins something new."""
MAX_QUEUED: Final = 4 << 20
"""Bytes unsent above which events are dropped."""
FLUSH_TIMEOUT_S: Final = 1.0
"""How long closing waits for a client to take its last replies."""


AnyResult = TypeVar("AnyResult")


class Session:
    """The common part of control and human monitors; they fill in ``_converse``."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._queue: collections.deque[bytes] = collections.deque()
        self._queued = 0
        self._sent = asyncio.Event()
        self._wake = asyncio.Event()
        self._broken = False
        self.dropped_events = 0
        """Events this client never got, since it did not read."""

    async def run(self) -> None:
        """Serve the client until it leaves. Errors of the connection end it quietly."""
        writer = asyncio.create_task(self._write())
        try:
            await self._until_broken(self._converse(), writer)
            await self._flushed()
        finally:
            try:
                await _end(writer)
            finally:
                self._stream.close()

    async def _converse(self) -> None:
        raise AssertionError(f"{type(self).__name__} has no _converse()")

    async def _until_broken(
        self, conversation: Coroutine[Any, Any, None], writer: asyncio.Task[None]
    ) -> None:
        talking = asyncio.create_task(conversation)
        try:
            await asyncio.wait((talking, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not talking.done():
                # Whatever waits for input or for room gives up; a command under way does not.
                self._break()
                talking.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await talking

    @staticmethod
    async def undisturbed(work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
        """Carry ``work`` out to its end even if the session ends meanwhile."""
        task = asyncio.create_task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            raise

    def send(self, data: bytes) -> None:
        """Queue ``data``."""
        if self._broken:
            return
        self._queue.append(data)
        self._queued += len(data)
        self._wake.set()

    def send_event(self, data: bytes) -> None:
        """Queue ``data``, unless too much waits already."""
        if self._queued + len(data) <= MAX_QUEUED:
            self.send(data)
            return
        if not self.dropped_events and not self._broken:
            print(  # noqa: T201 - the only place left to say it
                "blk: a monitor's client does not read: events for it are dropped", file=sys.stderr
            )
        self.dropped_events += 1

    async def room(self) -> None:
        """Wait until the client has read most of what it was sent."""
        await self._below(LOW_WATER)

    async def _flushed(self) -> None:
        await self._below(0)

    async def flush(self) -> None:
        """Wait until everything has been sent, but not for ever."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._flushed(), FLUSH_TIMEOUT_S)

    async def _below(self, limit: int) -> None:
        while self._queued > limit and not self._broken:
            self._sent.clear()
            await self._sent.wait()

    def _break(self) -> None:
        """Nothing can be sent any more."""
        self._broken = True
        self._queue.clear()
        self._sent.set()

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    data = self._queue.popleft()
                    await self._stream.write(data)
                    self._queued -= len(data)
                    self._sent.set()
        except OSError:
            pass  # the client has gone: nobody is left to tell
        finally:
            self._break()

    async def _input(self) -> AsyncIterator[bytes]:
        """What the client sends, piece by piece."""
        while not self._broken:
            try:
                data = await self._stream.read()
            except OSError:
                return
            if not data:
                return
            yield data


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel ``task`` and wait for its end, also if we are cancelled meanwhile."""
    cancelled = None
    task.cancel()
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
