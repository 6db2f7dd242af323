"""Byte streams that monitors speak over: sockets, pipes, terminals, regular files.

1. ``read`` returns what there is, at most 64 KiB, and b"" at the end; ``write`` returns when the
   last byte has been taken. Both may wait for ever: that is the peer's choice, and cancelling them
   is ours.
2. Descriptors that came along (SCM_RIGHTS) are kept, closed on exec, until they are taken, or a new
   lot comes, or the stream is closed. At most 64 of one message are taken in.
3. A descriptor that is ours alone is made non-blocking. One that others may hold as well (standard
   input) is left as it is, and read only when it is readable.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
from collections.abc import Iterable
from typing import Protocol

from blocklayer import net

_CHUNK = 64 * 1024
_MAX_DESCRIPTORS = 64


class ByteStream(Protocol):
    """What a monitor needs of its connection."""

    async def read(self) -> bytes:
        """What came, b"" at the end. Raises OSError."""

    async def write(self, data: bytes) -> None:
        """Send all of ``data``. Raises OSError."""

    def take_descriptors(self) -> list[int]:
        """The descriptors that came last, now the caller's to close."""

    def close(self) -> None:
        """End both directions."""


class SocketStream:
    """A connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._descriptors: list[int] = []

    async def read(self) -> bytes:
        """What came, b"" at the end."""
        if self._socket.family != socket.AF_UNIX:
            return await asyncio.get_running_loop().sock_recv(self._socket, _CHUNK)
        while True:
            try:
                return self._receive()
            except (BlockingIOError, InterruptedError):
                await net.wait_readable(self._socket.fileno())

    def _receive(self) -> bytes:
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, _, _ = self._socket.recvmsg(_CHUNK, room, socket.MSG_CMSG_CLOEXEC)
        came = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                came.frombytes(content[: len(content) - len(content) % came.itemsize])
        if came:
            close_all(self._descriptors)
            self._descriptors = list(came)
        return data

    async def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def take_descriptors(self) -> list[int]:
        """The descriptors that came last."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """End both directions."""
        close_all(self.take_descriptors())
        self._socket.close()


class FileStream:
    """One descriptor to read from and one to write to; None: nothing comes, all is thrown away."""

    def __init__(self, input: int | None, output: int | None, *, shared: bool = False) -> None:
        self._input = input
        self._output = output
        self._shared = shared
        for descriptor in {input, output} - {None}:
            assert descriptor is not None
            if not shared:
                os.set_blocking(descriptor, False)

    async def read(self) -> bytes:
        """What came, b"" at the end."""
        while self._input is not None:
            try:
                if self._shared:
                    await net.wait_readable(self._input)
                return os.read(self._input, _CHUNK)
            except (BlockingIOError, InterruptedError):
                await net.wait_readable(self._input)
        return b""

    async def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        rest = memoryview(data)
        while rest and self._output is not None:
            try:
                if self._shared:
                    await net.wait_writable(self._output)
                # Not more than a pipe has room for once it is writable at all.
                rest = rest[
                    os.write(self._output, rest[:_CHUNK] if not self._shared else rest[:4096]) :
                ]
            except (BlockingIOError, InterruptedError):
                await net.wait_writable(self._output)

    def take_descriptors(self) -> list[int]:
        """None come this way."""
        return []

    def close(self) -> None:
        """Close what is ours alone."""
        if not self._shared:
            close_all({d for d in (self._input, self._output) if d is not None})
        self._input = self._output = None


def close_all(descriptors: Iterable[int]) -> None:
    """Close ``descriptors``."""
    for descriptor in descriptors:
        os.close(descriptor)
