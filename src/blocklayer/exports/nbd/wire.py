"""A connection's bytes, in and out: a plain socket, or TLS.

1. Whoever takes what arrives (``Taker``) answers how much of it was of use; the rest is kept, and
   shown again with what comes next. More is read only while the taker wants it.
2. What is sent goes out in order, as much as the socket takes at once; ``pending`` bytes wait.
3. A plain wire at rest holds no buffer: all of one loop share one to receive into.
4. Nothing is called after ``close``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from blocklayer.codec.nbd.messages import Buffer
from blocklayer.units import KIB

if TYPE_CHECKING:
    import ssl

_SCRATCH_SIZE: Final = 256 * KIB
_SCRATCH: Final = memoryview(bytearray(_SCRATCH_SIZE))
"""Received into, and done with, between two waits of a loop. One loop a process uses it."""
_MAX_BUFFERS: Final = 512
"""Buffers handed to the system in one call."""


class Taker(Protocol):
    """What a wire works for."""

    def target(self) -> memoryview | None:
        """Where the next bytes belong, if somebody waits for that many (a payload)."""

    def filled(self, length: int) -> None:
        """So many bytes were put into the target."""

    def take(self, view: memoryview) -> int:
        """Use what arrived; how much of it was used. It is not valid any longer afterwards."""

    def wants_more(self) -> bool:
        """Whether anything should be read now."""

    def lost(self) -> None:
        """The peer has closed, or the connection broke."""


class Wire:
    """What plain and encrypted wires have in common."""

    pending: int
    """Bytes that were sent, but not taken by the system so far."""

    def __init__(self, taker: Taker) -> None:
        self.taker = taker
        self.closed = False
        self._kept = b""

    def send(self, buffers: list[Buffer]) -> None:
        """Queue ``buffers``; they must not change any more. ``flush`` sends them."""
        raise AssertionError(type(self).__name__)

    def flush(self) -> None:
        """Send as much as can be sent now."""
        raise AssertionError(type(self).__name__)

    def wake(self) -> None:
        """The taker may want more again."""
        raise AssertionError(type(self).__name__)

    def close(self) -> None:
        """End the connection at once; what is pending is lost."""
        raise AssertionError(type(self).__name__)

    def _feed(self, view: memoryview) -> None:
        """Show ``view`` (what was kept, and what is new) to the taker; keep the rest."""
        taker, at, end = self.taker, 0, len(view)
        while at < end and not self.closed:
            target = taker.target()
            if target is not None:
                length = min(len(target), end - at)
                target[:length] = view[at : at + length]
                at += length
                taker.filled(length)
                continue
            used = taker.take(view[at:end])
            if not used:
                break
            at += used
        self._kept = bytes(view[at:end]) if at < end else b""


class PlainWire(Wire):
    """A socket without encryption."""

    def __init__(self, taker: Taker, sock: socket.socket) -> None:
        super().__init__(taker)
        self.pending = 0
        self._loop = asyncio.get_running_loop()
        self.socket = sock
        self._descriptor = sock.fileno()
        self._out: list[Buffer] = []
        self._writing = False
        self._reading = False
        self.drained: Callable[[], None] | None = None
        """Called once when nothing is pending any more."""
        self._read(True)

    def _read(self, on: bool) -> None:
        if on and not self._reading:
            self._loop.add_reader(self._descriptor, self._readable)
        elif self._reading and not on:
            self._loop.remove_reader(self._descriptor)
        self._reading = on

    def _readable(self) -> None:
        kept = self._kept
        start = len(kept)
        try:
            target = None if start else self.taker.target()
            if target is not None:
                received, _, _, _ = self.socket.recvmsg_into([target, _SCRATCH])
                if received:
                    inside = min(received, len(target))
                    self.taker.filled(inside)
                    received -= inside
                    if received:
                        self._feed(_SCRATCH[:received])
                    self._settle()
                    return
            elif start >= _SCRATCH_SIZE // 2:
                raise AssertionError("a wire that keeps more than a taker may leave")
            else:
                _SCRATCH[:start] = kept
                received = self.socket.recv_into(_SCRATCH[start:])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            received = 0
        if not received:
            self._read(False)
            self.taker.lost()
            return
        self._feed(_SCRATCH[: start + received])
        self._settle()

    def _settle(self) -> None:
        """Send what was answered; go on with what was kept, and with reading, or not."""
        while not self.closed:
            if self._out and not self._writing:
                self.flush()
            kept = self._kept
            if not kept or not self.taker.wants_more():
                break
            self._feed(memoryview(kept))
            if len(self._kept) == len(kept):
                break
        if not self.closed:
            self._read(self.taker.wants_more())

    def wake(self) -> None:
        """See ``Wire``."""
        if not self.closed and not self._reading:
            self._settle()

    def send(self, buffers: list[Buffer]) -> None:
        """See ``Wire``."""
        if not self.closed:
            self._out += buffers
            for buffer in buffers:
                self.pending += len(buffer)

    def flush(self) -> None:
        """See ``Wire``."""
        if self._writing or self.closed:
            return
        try:
            self._push()
        except OSError:
            self.taker.lost()
            return
        if self._out:
            self._writing = True
            self._loop.add_writer(self._descriptor, self._writable)

    def _push(self) -> None:
        out = self._out
        while out:
            try:
                sent = self.socket.sendmsg(out[:_MAX_BUFFERS] if len(out) > _MAX_BUFFERS else out)
            except (BlockingIOError, InterruptedError):
                return
            self.pending -= sent
            if not self.pending:
                out.clear()
                break
            count = 0
            while sent >= len(out[count]):
                sent -= len(out[count])
                count += 1
            del out[:count]
            if sent:
                out[0] = memoryview(out[0])[sent:]

    def _writable(self) -> None:
        try:
            self._push()
        except OSError:
            self._stop_writing()
            self.taker.lost()
            return
        if not self._out:
            self._stop_writing()
            if self.drained is not None:
                self.drained()
        self.wake()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self._descriptor)
            self._writing = False

    def detach(self) -> socket.socket:
        """Give the socket away; this wire is closed."""
        self.closed = True
        self._read(False)
        self._stop_writing()
        return self.socket

    def close(self) -> None:
        """See ``Wire``."""
        if not self.closed:
            self.detach().close()
            self._out.clear()
            self._kept = b""
            self.pending = 0


class TlsWire(Wire, asyncio.Protocol):
    """A socket that TLS was begun on; asyncio's own transport moves the bytes."""

    def __init__(self, taker: Taker) -> None:
        super().__init__(taker)
        self._transport: asyncio.Transport | None = None
        self._paused = False

    @classmethod
    async def begin(
        cls, taker: Taker, sock: socket.socket, context: ssl.SSLContext, timeout_s: float | None
    ) -> TlsWire:
        """The server's side of the TLS handshake. Raises OSError (ssl.SSLError)."""
        loop = asyncio.get_running_loop()
        _, wire = await loop.connect_accepted_socket(
            lambda: cls(taker), sock, ssl=context, ssl_handshake_timeout=timeout_s or None
        )
        return wire

    @property
    def certificate(self) -> dict[str, object]:
        """The client's, as the ssl module decodes it; empty if it sent none."""
        assert self._transport is not None
        return self._transport.get_extra_info("peercert") or {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes, decrypted."""
        whole = self._kept + data if self._kept else data
        self._feed(memoryview(whole))
        self._pause()

    def _pause(self) -> None:
        assert self._transport is not None
        wanted = self.closed or self.taker.wants_more()
        if wanted == self._paused and not self.closed:
            self._paused = not wanted
            if self._paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def wake(self) -> None:
        """See ``Wire``."""
        if self.closed or not self.taker.wants_more():
            return
        if self._paused and self._kept:
            self._feed(memoryview(self._kept))
        self._pause()

    def send(self, buffers: list[Buffer]) -> None:
        """See ``Wire``."""
        if not self.closed and self._transport is not None:
            self._transport.write(b"".join(buffers))

    def flush(self) -> None:
        """The transport sends by itself."""

    @property
    def pending(self) -> int:  # type: ignore[override]
        """See ``Wire``."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        """The peer does not read; the taker sees it by ``pending``."""

    def resume_writing(self) -> None:
        """The peer reads again."""
        self.wake()

    def connection_lost(self, error: Exception | None) -> None:
        """It is over."""
        if not self.closed:
            self.taker.lost()

    def close(self) -> None:
        """See ``Wire``."""
        if not self.closed:
            self.closed = True
            self._kept = b""
            if self._transport is not None:
                self._transport.abort()
