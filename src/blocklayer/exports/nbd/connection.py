"""One client of an NBD server, from its first byte to its last.

1. A client is in one phase: handshake, TLS being set up, transmission, leaving. What arrives goes
   to the phase's own parser; nothing is read in a phase that waits.
2. Requests of a client run side by side and are answered in any order; how many (`MAX_IN_FLIGHT`)
   and how many bytes of requests and replies (`MAX_BYTES`, and one request more) is bounded. A
   client that sends but does not read is read from no more.
3. A request that has begun ends, whatever becomes of its client; ``ended`` is set after the last.
4. What can be answered at once is answered without a task; replies of one batch leave together.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from blocklayer.codec.nbd.constants import MAX_PAYLOAD, Command, CommandFlag, Mode, wire_errno
from blocklayer.codec.nbd.messages import (
    Buffer,
    Request,
    pack_data_header,
    pack_done,
    pack_error,
    request_size,
    unpack_request,
)
from blocklayer.codec.nbd.server import ServerHandshake, ServerState
from blocklayer.errors import BlockError, ProtocolError
from blocklayer.exports.nbd.commands import Session, serve
from blocklayer.exports.nbd.wire import PlainWire, TlsWire, Wire
from blocklayer.exports.translation import Translation
from blocklayer.graph.waiting import begin
from blocklayer.units import MIB

if TYPE_CHECKING:
    from blocklayer.exports.nbd.server import NbdServer

MAX_IN_FLIGHT: Final = 64
MAX_BYTES: Final = 32 * MIB

_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)
_PAYLOAD: Final = int(CommandFlag.PAYLOAD_LEN)
_DISC: Final = int(Command.DISC)


class Connection:
    """A client. Made by the server when it comes; ends by itself, or by ``drop``."""

    def __init__(self, server: NbdServer, sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self.ended = asyncio.Event()
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._handshake: ServerHandshake | None = server.handshake()
        self._session: Session | None = None
        self._translation: Translation | None = None
        self._mode = Mode.SIMPLE
        self._header_size = 0
        self._in_flight = 0
        self._bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._upgrading = False
        self._flush_soon = False
        self._receiving: tuple[Request, memoryview, int] | None = None
        """A request whose payload is still coming: the payload, and how much of it is there."""
        limit = server.handshake_max_seconds
        self._deadline = self._loop.call_later(limit, self.drop) if limit else None
        self._wire: Wire = PlainWire(self, sock)
        self._wire.send([ServerHandshake.greeting()])
        self._wire.flush()

    # What the wire calls.

    def target(self) -> memoryview | None:
        """See ``Taker``."""
        if self._receiving is None:
            return None
        _, payload, filled = self._receiving
        return payload[filled:]

    def filled(self, length: int) -> None:
        """See ``Taker``."""
        assert self._receiving is not None
        request, payload, before = self._receiving
        if before + length < len(payload):
            self._receiving = (request, payload, before + length)
            return
        self._receiving = None
        self._bytes -= len(payload)
        if not self._write_at_once(request, payload):
            self._start(request, payload)

    def wants_more(self) -> bool:
        """See ``Taker``."""
        return not (self._leaving or self._upgrading) and (
            self._receiving is not None or not self._full()
        )

    def lost(self) -> None:
        """See ``Taker``."""
        self.drop()

    def take(self, view: memoryview) -> int:
        """See ``Taker``."""
        if self._leaving or self._upgrading:
            return 0
        try:
            if self._handshake is not None:
                return self._take_handshake(self._handshake, view)
            return self._take_requests(view)
        except ProtocolError as error:
            self._server.report(f"{self.peer}: {error}")
            self.drop()
            return len(view)

    # The phases.

    def _take_handshake(self, handshake: ServerHandshake, view: memoryview) -> int:
        self._wire.send([handshake.receive(view)])
        used = len(view)
        if handshake.state is ServerState.TLS:
            self._upgrading = True
            self._upgrade_when_sent()
        elif handshake.state is ServerState.CLOSED:
            self._leave()
        elif handshake.state is ServerState.CHOSEN:
            used -= len(handshake.rest)
            self._begin_transmission(handshake)
        return used

    def _begin_transmission(self, handshake: ServerHandshake) -> None:
        assert handshake.chosen is not None
        export = self._server.exports[handshake.chosen.name]
        offered = {context.name: context for context in export.contexts}
        contexts = {number: offered[name] for number, name in handshake.contexts.items()}
        self._stop_clock()
        self._handshake = None
        self._mode = handshake.mode
        self._header_size = request_size(handshake.mode)
        self._session = Session(export, handshake.mode, contexts)
        self._translation = export.translation
        export.connections.add(self)
        self._server.served(self)

    def _upgrade_when_sent(self) -> None:
        wire = self._wire
        assert isinstance(wire, PlainWire)
        wire.flush()
        if wire.closed:
            return
        if wire.pending:
            wire.drained = self._upgrade
        else:
            self._upgrade()

    def _upgrade(self) -> None:
        wire = self._wire
        assert isinstance(wire, PlainWire)
        wire.drained = None
        self._spawn(self._start_tls(wire.detach()))

    async def _start_tls(self, sock: socket.socket) -> None:
        make_context = self._server.tls
        assert make_context is not None
        try:
            wire = await TlsWire.begin(
                self, sock, make_context(), self._server.handshake_max_seconds
            )
        except (OSError, EOFError, BlockError) as error:
            self._server.report(f"{self.peer}: TLS failed: {error}")
            self._upgrading = False
            sock.close()
            self.drop()
            return
        self._wire = wire
        if self._leaving or not self._server.admits(wire.certificate):
            self.drop()
            wire.close()
            return
        assert self._handshake is not None
        self._handshake.tls_started()
        self._upgrading = False
        wire.wake()

    def _take_requests(self, view: memoryview) -> int:
        """Begin every whole request in ``view``, and the payload of a last one that is not."""
        at, end, size = 0, len(view), self._header_size
        while at + size <= end and not self._full():
            request = unpack_request(self._mode, view, at)
            at += size
            length = request.payload_length
            if not length:
                if request.command == _DISC:
                    self._leave()
                    return end
                if not self._read_at_once(request):
                    self._start(request, b"")
            elif at + length <= end:
                payload = view[at : at + length]
                if not self._write_at_once(request, payload):
                    # What the wire received into is used again; the request may outlast that.
                    self._start(request, bytes(payload))
                at += length
            else:
                self._receiving = (request, memoryview(bytearray(length)), 0)
                self._bytes += length
                return at
        return at

    def _full(self) -> bool:
        return self._in_flight >= MAX_IN_FLIGHT or self._bytes + self._wire.pending >= MAX_BYTES

    # Requests.

    def _read_at_once(self, request: Request) -> bool:
        """Answer a plain READ that the translation has all of."""
        translation = self._translation
        if translation is None or request.command != _READ or request.flags:
            return False
        if request.length > MAX_PAYLOAD:
            return False
        data = translation.read(request.offset, request.length)
        if data is None:
            return False
        header = pack_data_header(self._mode, request, request.offset, request.length)
        self._wire.send([header, data])
        return True

    def _write_at_once(self, request: Request, payload: memoryview) -> bool:
        """Carry out and answer a plain WRITE to where the translation may write."""
        translation = self._translation
        if (
            translation is None
            or request.command != _WRITE
            or request.flags & ~_PAYLOAD
            or self._leaving
        ):
            return False
        try:
            if not translation.write(request.offset, payload):
                return False
        except BlockError as error:
            message = str(error)
            self._wire.send([pack_error(self._mode, request, wire_errno(error.errno), message)])
            return True
        self._wire.send([pack_done(self._mode, request)])
        return True

    def _start(self, request: Request, payload: Buffer) -> None:
        if self._leaving:
            return
        size = len(payload) or (request.length if request.command == _READ else 0)
        size = min(size, MAX_BYTES)
        self._in_flight += 1
        self._bytes += size
        rest = begin(self._serve(request, payload, size))
        if rest is not None:
            self._spawn(rest)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    async def _serve(self, request: Request, payload: Buffer, size: int) -> None:
        session = self._session
        assert session is not None
        try:
            reply = await serve(session, request, payload)
        except Exception as error:
            # A bug of ours: the client learns that its request failed, the log learns why.
            reply = [pack_error(self._mode, request, errno.EIO, "internal error")]
            self._loop.call_exception_handler(
                {"message": "Serving an NBD request failed", "exception": error}
            )
        self._wire.send(reply)
        if not self._flush_soon:
            self._flush_soon = True
            self._loop.call_soon(self._flush)
        translation = self._translation
        if (
            translation is not None
            and request.command in (_READ, _WRITE)
            and translation.is_settled()
        ):
            await self._learn(session, translation, request)
        self._in_flight -= 1
        self._bytes -= size

    async def _learn(self, session: Session, translation: Translation, request: Request) -> None:
        writing = request.command == _WRITE
        if writing and not session.export.writable:
            return
        try:
            async with session.export.root.request():
                await translation.learn(request.offset, request.length, writing=writing)
        except BlockError:
            # Whoever needs it will hear of it; here nobody asked.
            return

    def _flush(self) -> None:
        self._flush_soon = False
        self._wire.flush()
        self._wire.wake()
        self._settle()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._settle()

    # The end.

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _leave(self) -> None:
        """Serve what has begun, send what there is, then close."""
        self._leaving = True
        self._wire.flush()
        self._settle()

    def drop(self) -> None:
        """Close at once; what has begun still ends, unanswered."""
        self._leaving = True
        self._wire.close()
        self._settle()

    def _settle(self) -> None:
        """If nothing is left to do, this is the end."""
        if not self._leaving or self._in_flight or self._tasks or self.ended.is_set():
            return
        wire = self._wire
        if not wire.closed:
            if wire.pending:
                if isinstance(wire, PlainWire):
                    wire.drained = self._settle
                return
            wire.close()
        self._stop_clock()
        self._receiving = None
        if self._session is not None:
            self._session.export.connections.discard(self)
        self.ended.set()
        self._server.left(self)
