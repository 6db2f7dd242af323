"""A control monitor: one client's conversation in QMP.

1. Requests of one monitor are carried out one after the other, in order, and so are the answers to
   input that is no request. Only ``exec-oob`` overtakes, where the command allows it and the client
   has negotiated it.
2. ``MAX_REQUESTS`` wait at most; then nothing is read until one is done.
3. Arguments are checked before the command begins. Whatever a command raises becomes an error
   reply; what is not a BlockError is our bug, and is printed to standard error as well.
4. Until capabilities are negotiated there is one command, and there are no events.
5. Descriptors belong to the last request in the bytes they came with, and are closed with it unless
   its command took them.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from blocklayer.errors import BlockError
from blocklayer.qmp.errors import CommandError, CommandNotFoundError, describe
from blocklayer.qmp.registry import Command
from blocklayer.qmp.session import Session
from blocklayer.qmp.streams import ByteStream, close_all
from blocklayer.qmp.version import version_info
from blocklayer.qmp.wire import BadInput, Decoder, encode

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

MAX_REQUESTS: Final = 8
CAPABILITIES: Final = ("oob",)
NEGOTIATION: Final = "qmp_capabilities"


class _Request:
    """What the client asked for, and the descriptors that came with it."""

    __slots__ = ("content", "descriptors")

    def __init__(self, content: Any) -> None:
        self.content = content
        self.descriptors: list[int] = []


class Monitor(Session):
    """One client of the server, speaking QMP. Commands get it as their first argument."""

    def __init__(self, server: Server, stream: ByteStream, *, pretty: bool = False) -> None:
        super().__init__(stream)
        self.server = server
        self.negotiated = False
        self.oob = False
        self.named_descriptors: dict[str, int] = {}
        """What ``getfd`` named."""
        self._pretty = pretty
        self._current: _Request | None = None
        self._requests: asyncio.Queue[_Request | None] = asyncio.Queue(MAX_REQUESTS)

    def negotiate(self, *, oob: bool) -> None:
        """The client is ready: commands and events from now on."""
        self.negotiated = True
        self.oob = oob
        self.server.events.listen(self._on_event)

    def take_descriptor(self) -> int:
        """A descriptor that came with the command under way. Raises CommandError."""
        if self._current is None or not self._current.descriptors:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        return self._current.descriptors.pop(0)

    async def _converse(self) -> None:
        greeting = {"version": version_info(), "capabilities": list(CAPABILITIES)}
        self._say({"QMP": greeting})
        worker = asyncio.create_task(self._work())
        try:
            await self._listen()
            await self._requests.put(None)
            await asyncio.shield(worker)
        finally:
            await self._wind_up(worker)

    async def _wind_up(self, worker: asyncio.Task[None]) -> None:
        """Let the command under way end; forget those that wait, and what the client left here."""
        while not self._requests.empty():
            request = self._requests.get_nowait()
            close_all(request.descriptors if request else ())
        self._requests.put_nowait(None)
        try:
            await worker
        finally:
            self.server.events.unlisten(self._on_event)
            close_all(self.named_descriptors.values())
            self.named_descriptors.clear()

    async def _listen(self) -> None:
        decoder = Decoder()
        descriptors: list[int] = []
        try:
            async for data in self._input():
                descriptors += self._stream.take_descriptors()
                for request in self._requests_in(decoder, data, descriptors):
                    await self._accept(request)
        finally:
            close_all(descriptors)

    @staticmethod
    def _requests_in(decoder: Decoder, data: bytes, descriptors: list[int]) -> Iterator[_Request]:
        """The requests that ``data`` completes; the last takes the descriptors."""
        last = None
        for content in decoder.feed(data):
            if last is not None:
                yield last
            last = _Request(content)
        if last is not None:
            last.descriptors, descriptors[:] = [*descriptors], []
            yield last

    async def _accept(self, request: _Request) -> None:
        content = request.content
        verbs = {"execute", "exec-oob"} & content.keys() if isinstance(content, dict) else ()
        if self.oob and verbs == {"exec-oob"}:
            await self.room()
            await self._answer(request)
        else:
            await self._requests.put(request)

    async def _work(self) -> None:
        while True:
            await self.room()
            request = await self._requests.get()
            if request is None:
                return
            if self._broken:
                close_all(request.descriptors)
                continue
            self._current = request
            try:
                await self._answer(request)
            finally:
                self._current = None

    async def _answer(self, request: _Request) -> None:
        """Carry ``request`` out and queue the reply."""
        content = request.content
        reply: dict[str, Any] = {}
        if isinstance(content, dict) and "id" in content:
            reply["id"] = content["id"]
        try:
            self._say({"return": await self._execute(content), **reply})
        except BlockError as error:
            self._say({**reply, "error": describe(error)})
        except OSError as error:
            self._say({**reply, "error": describe(CommandError(error.strerror or str(error)))})
        except Exception as error:
            traceback.print_exc()
            what = (
                f"internal error: {type(error).__name__}: {error}. This is a bug, please report it"
            )
            self._say({**reply, "error": describe(CommandError(what))})
        finally:
            close_all(request.descriptors)

    async def _execute(self, content: Any) -> Any:
        if isinstance(content, BadInput):
            raise CommandError(str(content))
        command, arguments = self._command(content)
        result = await command.run(self, command.decode(arguments))
        self.server.after_command()
        return result

    def _command(self, content: Any) -> tuple[Command, dict[str, Any]]:
        """The command meant, and its arguments unchecked. Raises CommandError."""
        name, out_of_band, arguments = self._members(content)
        command = self.server.commands.get(name)
        if not self.negotiated and (command is None or name != NEGOTIATION):
            raise CommandNotFoundError(f"Expecting capabilities negotiation with '{NEGOTIATION}'")
        if command is None:
            raise CommandNotFoundError(f"The command {name} has not been found")
        if out_of_band and not command.allow_oob:
            raise CommandError(f"The command {name} does not support OOB")
        return command, arguments

    def _members(self, content: Any) -> tuple[str, bool, dict[str, Any]]:
        if not isinstance(content, dict):
            raise CommandError("QMP input must be a JSON object")
        verbs = ("execute", "exec-oob") if self.oob else ("execute",)
        verb = next((verb for verb in verbs if verb in content), None)
        for name in content:
            if name in verbs and name != verb:
                raise CommandError(f"QMP input member '{verb}' clashes with '{name}'")
            if name not in (verb, "arguments", "id"):
                raise CommandError(f"QMP input member '{name}' is unexpected")
        if "arguments" in content and not isinstance(content["arguments"], dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if verb is None:
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(content[verb], str):
            raise CommandError(f"QMP input member '{verb}' must be a string")
        return content[verb], verb == "exec-oob", content.get("arguments", {})

    def _say(self, message: dict[str, Any]) -> None:
        self.send(encode(message, pretty=self._pretty))

    def _on_event(self, message: dict[str, Any]) -> None:
        self.send_event(encode(message, pretty=self._pretty))
