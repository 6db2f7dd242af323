"""A QMP client: connect, negotiate, execute, follow events.

    async with await Client.connect("q.sock") as client:
        print(await client.execute("query-version"))
        async for event in client.events():
            ...

1. Any number of tasks may execute commands at once; replies find their task by ``id``.
2. Events are kept for ``events()``, the last ``MAX_EVENTS`` of them.
3. When the connection ends, every waiting task gets ``ConnectionLost``, and so does every later
   command.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import AsyncIterator
from typing import Any, Final

from blocklayer import net
from blocklayer.codec.addresses import AnyAddress, parse_address
from blocklayer.errors import BlockError
from blocklayer.qmp.streams import ByteStream, SocketStream
from blocklayer.qmp.wire import BadInput, Decoder, encode

MAX_EVENTS: Final = 4096
GREETING_TIMEOUT_S: Final = 10.0
"""How long a server may take to greet; one that serves another client takes for ever."""


class CommandFailed(BlockError):  # noqa: N818 - it is what the server says
    """The server refused a command. ``error_class`` is QMP's, ``str()`` its description."""

    def __init__(self, message: str, error_class: str = "GenericError") -> None:
        super().__init__(message)
        self.error_class = error_class


class ConnectionLost(BlockError):  # noqa: N818 - what happened
    """The server has gone, or never spoke QMP."""


class Client:
    """One connection to a QMP server."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._numbers = itertools.count(1)
        self._replies: dict[Any, asyncio.Future[dict[str, Any]]] = {}
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=MAX_EVENTS)
        self._news = asyncio.Event()
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sending = asyncio.Lock()
        self._lost: ConnectionLost | None = None
        self._reader: asyncio.Task[None] | None = None
        self.greeting: dict[str, Any] = {}
        """What the server said it is: ``version`` and ``capabilities``."""

    @classmethod
    async def connect(
        cls,
        address: str | AnyAddress,
        *,
        negotiate: bool = True,
        oob: bool = False,
        timeout_s: float | None = GREETING_TIMEOUT_S,
    ) -> Client:
        """A client of the server at ``address`` (a path, or HOST:PORT), ready for commands.

        With ``negotiate`` false it is left in negotiation mode. Raises ConnectionLost when no
        greeting comes within ``timeout_s``, StorageError when nobody is there.
        """
        place = parse_address(address) if isinstance(address, str) else address
        client = cls(SocketStream(await net.connect(place)))
        try:
            await client.start(negotiate=negotiate, oob=oob, timeout_s=timeout_s)
        except BaseException:
            await client.close()
            raise
        return client

    async def start(
        self, *, negotiate: bool, oob: bool = False, timeout_s: float | None = GREETING_TIMEOUT_S
    ) -> None:
        """Read the greeting, and negotiate."""
        self._reader = asyncio.create_task(self._read())
        try:
            await asyncio.wait_for(asyncio.shield(self._greeted), timeout_s)
        except TimeoutError:
            raise ConnectionLost(
                f"no QMP greeting came within {timeout_s:g} s (another client may be connected)"
            ) from None
        if negotiate:
            await self.execute("qmp_capabilities", {"enable": ["oob"]} if oob else None)

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        oob: bool = False,
    ) -> Any:
        """What ``command`` returns.

        Raises CommandFailed, ConnectionLost, or TimeoutError after ``timeout_s``; the command goes
        on in the server then.
        """
        message: dict[str, Any] = {"exec-oob" if oob else "execute": command}
        if arguments:
            message["arguments"] = arguments
        reply = await asyncio.wait_for(self.exchange(message), timeout_s)
        if "error" in reply:
            error = reply["error"]
            raise CommandFailed(str(error.get("desc")), str(error.get("class")))
        return reply["return"]

    async def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to ``message``, whole but for the ``id`` that is added here."""
        if self._lost is not None:
            raise self._lost
        number = f"blk-{next(self._numbers)}"
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            async with self._sending:
                await self._stream.write(encode({**message, "id": number}))
            answer: dict[str, Any] = await reply
            return answer
        except OSError as error:
            raise ConnectionLost(f"the connection broke: {error.strerror}") from error
        finally:
            del self._replies[number]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events as they come, those first that came before; ends with the connection."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._lost is not None:
                return
            self._news.clear()
            await self._news.wait()

    async def close(self) -> None:
        """Leave."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._stream.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *failure: object) -> None:
        await self.close()

    async def _read(self) -> None:
        decoder, why = Decoder(), "the server closed the connection"
        try:
            while data := await self._stream.read():
                for message in decoder.feed(data):
                    self._take(message)
        except OSError as error:
            why = f"the connection broke: {error.strerror}"
        except ConnectionLost as error:
            why = str(error)
        finally:
            self._lose(ConnectionLost(why))

    def _take(self, message: Any) -> None:
        if isinstance(message, BadInput) or not isinstance(message, dict):
            raise ConnectionLost(f"what came is not QMP: {message}")
        if "QMP" in message:
            self.greeting = message["QMP"]
            if not self._greeted.done():
                self._greeted.set_result(None)
        elif "event" in message:
            self._events.append(message)
            self._news.set()
        else:
            waiting = self._replies.get(message.pop("id", None))
            if waiting is not None and not waiting.done():
                waiting.set_result(message)

    def _lose(self, lost: ConnectionLost) -> None:
        self._lost = lost
        self._news.set()
        if not self._greeted.done():
            self._greeted.set_exception(lost)
            self._greeted.exception()  # seen, also if nobody waits for it any more
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(lost)
