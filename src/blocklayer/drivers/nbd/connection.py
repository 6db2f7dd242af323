"""One connection to an NBD server: requests go out as they come, replies are matched to them.

1. Reads land in the caller's buffer, without a copy where the socket has nothing before them.
2. Every reply must belong to a request in flight, and fit it; anything else ends the connection.
3. When the connection ends, for whatever reason, every request in flight fails with that reason,
   and none hangs.
4. A cancelled caller's request goes on until its reply is there: its buffer must outlive it, so the
   caller waits.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import deque
from collections.abc import Sequence

from blocklayer import net
from blocklayer.codec.addresses import AnyAddress
from blocklayer.codec.nbd import messages
from blocklayer.codec.nbd.client import (
    ClientHandshake,
    ClientState,
    Connecting,
    Listing,
    Negotiated,
)
from blocklayer.codec.nbd.constants import Chunk, Command, Mode
from blocklayer.codec.nbd.records import Offer
from blocklayer.errors import BlockError, ProtocolError, StorageError
from blocklayer.graph.driver import Buffer

_RECEIVE_SIZE = 256 * 1024
_HANDSHAKE_SIZE = 64 * 1024


class Pending:
    """A request in flight."""

    __slots__ = ("error", "extents", "future", "missing", "request", "view")

    def __init__(self, request: messages.Request, view: memoryview | None) -> None:
        self.request = request
        self.view = view
        self.missing = len(view) if view is not None else 0
        """Bytes of a read that have not come yet."""
        self.extents: dict[int, messages.Extents] = {}
        """Block status by context id."""
        self.error: StorageError | None = None
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Connection:
    """An established connection. Made by ``connect``."""

    def __init__(
        self, sock: socket.socket, negotiated: Negotiated, rest: bytes | bytearray
    ) -> None:
        self.negotiated = negotiated
        self.offer = negotiated.offer
        self.mode = negotiated.mode
        self.broken: BlockError | None = None
        """Why the connection has ended; None while it is in use."""
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, Pending] = {}
        self._cookie = 0
        self._received = bytearray(rest)
        self._scratch = memoryview(bytearray(_RECEIVE_SIZE))
        self._filling: tuple[Pending, memoryview, bool] | None = None
        """The read whose payload is coming, where the rest goes, and if that ends the reply."""
        self._out: deque[memoryview] = deque()
        self._loop.add_reader(sock, self._on_readable)
        if rest:
            self._loop.call_soon(self._on_readable)

    async def request(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: Sequence[Buffer] = (),
        view: memoryview | None = None,
    ) -> Pending:
        """Send a request and wait for its reply. Raises StorageError."""
        if self.broken is not None:
            raise self.broken.reworded(str(self.broken))
        self._cookie += 1
        request = messages.Request(command, int(flags), self._cookie, offset, length)
        pending = Pending(request, view)
        self._pending[self._cookie] = pending
        self._send((messages.pack_request(self.mode, request), *data))
        try:
            await asyncio.shield(pending.future)
        except asyncio.CancelledError:
            if not pending.future.done():
                await asyncio.wait((pending.future,))
            if not pending.future.cancelled():
                pending.future.exception()
            raise
        if pending.error is not None:
            raise pending.error
        return pending

    def _send(self, buffers: Sequence[Buffer]) -> None:
        waiting = bool(self._out)
        self._out.extend(memoryview(each).cast("B") for each in buffers if len(each))
        if not waiting:
            self._on_writable()
            if self._out and self.broken is None:
                self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        try:
            while self._out:
                if isinstance(self._sock, ssl.SSLSocket):
                    done = self._sock.send(self._out[0])
                else:
                    done = self._sock.sendmsg([*self._out][:64])
                while done and done >= len(self._out[0]):
                    done -= len(self._out.popleft())
                if done:
                    self._out[0] = self._out[0][done:]
            self._loop.remove_writer(self._sock)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._end(_trouble(error, "Sending to the NBD server"))

    def _on_readable(self) -> None:
        try:
            self._parse()
            while self.broken is None:
                target = self._filling[1] if self._filling is not None else self._scratch
                count = self._sock.recv_into(target)
                if not count:
                    raise StorageError("The NBD server closed the connection", errno.EIO)
                if self._filling is None:
                    self._received += self._scratch[:count]
                    self._parse()
                else:
                    self._filled(count)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except BlockError as error:
            self._end(error)
        except OSError as error:
            self._end(_trouble(error, "Receiving from the NBD server"))

    def _filled(self, count: int) -> None:
        assert self._filling is not None
        pending, rest, done = self._filling
        pending.missing -= count
        if count < len(rest):
            self._filling = (pending, rest[count:], done)
            return
        self._filling = None
        if done:
            self._finish(pending)

    def _parse(self) -> None:
        """Take all whole replies from what was received."""
        buffer, at = self._received, 0
        try:
            while self._filling is None and len(buffer) - at >= 4:
                size = messages.reply_size(self.mode, buffer, at)
                if len(buffer) - at < size:
                    return
                reply = messages.unpack_reply(self.mode, buffer, at)
                pending = self._pending.get(reply.cookie)
                if pending is None:
                    raise ProtocolError(f"NBD reply to request {reply.cookie:#x}, never sent")
                taken = self._take(pending, reply, buffer, at + size)
                if taken is None:
                    return
                at = taken
        finally:
            if at:
                del buffer[:at]

    def _take(
        self, pending: Pending, reply: messages.Reply, buffer: bytearray, at: int
    ) -> int | None:
        """Handle one chunk; where the next begins, or None if its payload is not there yet."""
        if reply.type is None:
            if reply.error:
                pending.error = _failure(pending.request, reply.error)
            elif pending.view is not None:
                return self._data(pending, pending.view, buffer, at, True)
            self._finish(pending)
            return at
        if reply.type == Chunk.OFFSET_DATA and pending.view is not None:
            if reply.payload_length <= 8:
                raise ProtocolError("NBD reply with data of no length")
            if len(buffer) - at < 8:
                return None
            start = messages.unpack_offset(memoryview(buffer)[at : at + 8])
            length = reply.payload_length - 8
            view = self._part(pending, start, length)
            return self._data(pending, view, buffer, at + 8, reply.done)
        end = at + reply.payload_length
        if len(buffer) < end:
            return None
        self._note(pending, reply, bytes(buffer[at:end]))
        if reply.done:
            self._finish(pending)
        return end

    def _data(
        self, pending: Pending, view: memoryview, buffer: bytearray, at: int, done: bool
    ) -> int:
        here = min(len(view), len(buffer) - at)
        view[:here] = memoryview(buffer)[at : at + here]
        if here < len(view):
            pending.missing -= here
            self._filling = (pending, view[here:], done)
        else:
            pending.missing -= here
            if done:
                self._finish(pending)
        return at + here

    def _part(self, pending: Pending, offset: int, length: int) -> memoryview:
        start = offset - pending.request.offset
        assert pending.view is not None
        if start < 0 or start + length > len(pending.view) or length > pending.missing:
            raise ProtocolError(f"NBD data for {length:#x} bytes at {offset:#x}, never asked for")
        return pending.view[start : start + length]

    def _note(self, pending: Pending, reply: messages.Reply, payload: bytes) -> None:
        """A chunk without data."""
        if reply.is_error:
            assert reply.type is not None
            number, words = messages.unpack_error(reply.type, payload)
            pending.error = pending.error or _failure(pending.request, number, words)
        elif reply.type == Chunk.OFFSET_HOLE and pending.view is not None:
            offset, length = messages.unpack_hole(payload)
            view = self._part(pending, offset, length)
            view[:] = bytes(length)
            pending.missing -= length
        elif reply.type in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
            if pending.request.command != Command.BLOCK_STATUS:
                raise ProtocolError("NBD block status, never asked for")
            context, extents = messages.unpack_extents(reply.type, payload)
            pending.extents[context] = extents
        elif reply.type != Chunk.NONE:
            raise ProtocolError(f"NBD reply chunk of type {reply.type:#x} does not fit its request")

    def _finish(self, pending: Pending) -> None:
        del self._pending[pending.request.cookie]
        if pending.missing and pending.error is None:
            raise ProtocolError(f"NBD reply that lacks {pending.missing:#x} bytes of a read")
        if not pending.future.done():
            pending.future.set_result(None)

    def _end(self, reason: BlockError) -> None:
        if self.broken is not None:
            return
        self.broken = reason
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._out.clear()
        self._filling = None
        pending, self._pending = self._pending, {}
        for each in pending.values():
            each.error = StorageError(str(reason), errno.EIO)
            if not each.future.done():
                each.future.set_result(None)

    def close(self) -> None:
        """Say goodbye, as far as the socket takes it, and end."""
        if self.broken is None:
            goodbye = messages.Request(Command.DISC, 0, 0, 0, 0)
            self._send((messages.pack_request(self.mode, goodbye),))
            self._end(StorageError("The NBD connection was closed", errno.ESHUTDOWN))


def _failure(request: messages.Request, number: int, words: str = "") -> StorageError:
    what = f"{Command(request.command).name.lower()} of {request.length:#x} bytes"
    said = f" ({words})" if words else ""
    failure = StorageError.from_os(
        OSError(number, ""), f"NBD {what} at {request.offset:#x} failed{said}"
    )
    return failure


def _trouble(error: OSError, doing: str) -> StorageError:
    if isinstance(error, ssl.SSLError):
        # Its number is TLS's own, not the system's.
        said = getattr(error, "verify_message", "") or error.reason or str(error)
        return StorageError(f"{doing}: TLS failed: {said}", errno.EPROTO)
    return StorageError.from_os(error, doing)


async def connect(
    address: AnyAddress,
    export: str,
    contexts: Sequence[str],
    *,
    tls: ssl.SSLContext | None = None,
    hostname: str | None = None,
    mode: Mode = Mode.EXTENDED,
) -> Connection:
    """Connect, and agree with the server on ``export``. Raises StorageError or ProtocolError."""
    handshake = Connecting(export, mode=mode, contexts=contexts, tls=tls is not None)
    sock = await _negotiate(address, handshake, tls, hostname)
    assert handshake.result is not None
    return Connection(sock, handshake.result, handshake.rest)


async def list_exports(
    address: AnyAddress, *, tls: ssl.SSLContext | None = None, hostname: str | None = None
) -> tuple[list[Offer], Mode]:
    """All that a server offers, and how it would talk. Raises as ``connect`` does."""
    handshake = Listing(tls=tls is not None)
    sock = await _negotiate(address, handshake, tls, hostname)
    sock.close()
    return handshake.result, handshake.mode


async def _negotiate(
    address: AnyAddress,
    handshake: ClientHandshake,
    tls: ssl.SSLContext | None,
    hostname: str | None,
) -> socket.socket:
    """Connect, and carry the handshake to its end."""
    loop = asyncio.get_running_loop()
    sock = await net.connect(address)
    try:
        while handshake.state is not ClientState.DONE:
            if handshake.state is ClientState.TLS:
                assert tls is not None
                sock = await _start_tls(sock, tls, hostname)
                await _send_all(sock, handshake.tls_started())
                continue
            data = await _receive(sock)
            if not data:
                raise StorageError("The NBD server closed the connection early", errno.EIO)
            await _send_all(sock, handshake.receive(data))
        return sock
    except OSError as error:
        sock.close()
        raise _trouble(error, f"Talking to the NBD server at '{address}'") from error
    except BaseException:
        loop.remove_reader(sock)
        sock.close()
        raise


async def _start_tls(
    sock: socket.socket, context: ssl.SSLContext, hostname: str | None
) -> ssl.SSLSocket:
    secure = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=hostname)
    try:
        while True:
            try:
                secure.do_handshake()
                return secure
            except ssl.SSLWantReadError:
                await net.wait_readable(secure.fileno())
            except ssl.SSLWantWriteError:
                await net.wait_writable(secure.fileno())
    except BaseException:
        # It has taken the socket over.
        secure.close()
        raise


async def _receive(sock: socket.socket) -> bytes:
    while True:
        try:
            return sock.recv(_HANDSHAKE_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):
            await net.wait_readable(sock.fileno())


async def _send_all(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await net.wait_writable(sock.fileno())
