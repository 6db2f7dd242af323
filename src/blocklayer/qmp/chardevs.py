"""Character devices: where a monitor's connections come from.

1. A device is open from ``open`` to ``close`` and has one user at a time.
2. ``connection`` waits for the next peer; None means that no further one can come. A socket that
   listens takes one client at a time: the next one waits in the kernel's queue.
3. While standard output is a device's, whatever else prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import Any, Final

from msgspec import UNSET

from blocklayer import net
from blocklayer.codec.addresses import AnyAddress, InetSocketAddress, UnixSocketAddress
from blocklayer.errors import StorageError
from blocklayer.qmp.chardev_options import (
    ChardevBackend,
    ChardevCommon,
    ChardevFile,
    ChardevPty,
    ChardevRingbuf,
    ChardevSocket,
    ChardevStdio,
)
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.streams import ByteStream, FileStream, SocketStream
from blocklayer.units import MIB, is_power_of_two

_MAX_RING: Final = 64 * MIB


class Chardev:
    """What all character devices are; by itself the one called ``null``."""

    def __init__(self, label: str, options: ChardevCommon) -> None:
        self.label = label
        self.options = options
        self.user: str | None = None
        """Who uses it, for messages."""
        self._stream: ByteStream | None = None

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        return "null"

    async def open(self, names: Mapping[str, int]) -> None:
        """Make it ready; ``names`` are named descriptors. Raises StorageError or UsageError."""
        self._stream = self._logged(await self._make_stream())

    async def _make_stream(self) -> ByteStream:
        return FileStream(None, None)

    async def connection(self) -> ByteStream | None:
        """The next peer, or None. Raises OSError or StorageError."""
        stream, self._stream = self._stream, None
        return stream

    def disconnected(self) -> None:
        """The last peer has gone."""

    async def close(self) -> None:
        """Let go of everything."""
        if self._stream is not None:
            self._stream.close()

    def _logged(self, stream: ByteStream) -> ByteStream:
        if not isinstance(self.options.logfile, str):
            return stream
        return _LoggedStream(stream, self.options.logfile, append=self.options.logappend)


class FileChardev(Chardev):
    """Regular files, pipes or devices by their paths."""

    options: ChardevFile

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        return "file"

    async def _make_stream(self) -> ByteStream:
        options = self.options
        input = _open_file(options.input, os.O_RDONLY) if isinstance(options.input, str) else None
        end = os.O_APPEND if options.append else os.O_TRUNC
        try:
            output = _open_file(options.out, os.O_WRONLY | os.O_CREAT | end)
        except BaseException:
            if input is not None:
                os.close(input)
            raise
        return FileStream(input, output)


class StdioChardev(Chardev):
    """Standard input and output; one device at most."""

    options: ChardevStdio
    _taken = False

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        return "stdio"

    async def _make_stream(self) -> ByteStream:
        if StdioChardev._taken:
            raise CommandError("cannot use stdio by multiple character devices")
        StdioChardev._taken = True
        self._output = os.dup(1)
        os.dup2(2, 1)
        self._terminal: list[Any] | None = None
        if not self.options.signal and os.isatty(0):
            import termios

            self._terminal = termios.tcgetattr(0)
            changed = [*self._terminal]
            changed[3] &= ~termios.ISIG
            termios.tcsetattr(0, termios.TCSANOW, changed)
        return FileStream(0, self._output, shared=True)

    async def close(self) -> None:
        """Give standard output and the terminal back."""
        await super().close()
        if not hasattr(self, "_output"):
            return
        if self._terminal is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self._terminal)
        os.dup2(self._output, 1)
        os.close(self._output)
        del self._output
        StdioChardev._taken = False


class PtyChardev(Chardev):
    """A pseudo terminal of its own."""

    options: ChardevPty
    path = ""

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        return f"pty:{self.path}"

    async def _make_stream(self) -> ByteStream:
        import pty
        import tty

        ours, theirs = pty.openpty()
        tty.setraw(theirs)
        self.path = os.ttyname(theirs)
        # Held open: without anyone on the other side, reading would fail instead of wait.
        self._theirs = theirs
        if isinstance(self.options.path, str):
            try:
                os.symlink(self.path, self.options.path)
            except OSError as error:
                os.close(ours)
                os.close(theirs)
                raise StorageError.from_os(
                    error, f"Failed to create '{self.options.path}'"
                ) from None
        return FileStream(ours, ours)

    async def close(self) -> None:
        """Close both sides and remove the link."""
        await super().close()
        if self.path:
            os.close(self._theirs)
            if isinstance(self.options.path, str) and os.path.islink(self.options.path):
                os.unlink(self.options.path)
            self.path = ""


class RingbufChardev(Chardev):
    """A buffer that keeps the last bytes written, until they are read."""

    options: ChardevRingbuf

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        return "ringbuf"

    async def _make_stream(self) -> ByteStream:
        if not is_power_of_two(self.options.size):
            raise CommandError("size of ringbuf chardev must be power of two")
        if self.options.size > _MAX_RING:
            raise CommandError(f"size of ringbuf chardev must be at most {_MAX_RING} bytes")
        self._kept = bytearray()
        return _RingStream(self)

    def put(self, data: bytes) -> None:
        """Append ``data``; what no longer fits is lost from the front."""
        self._kept += data
        del self._kept[: -self.options.size]

    def take(self, count: int) -> bytes:
        """At most ``count`` bytes from the front."""
        taken = bytes(self._kept[:count])
        del self._kept[:count]
        return taken


class _RingStream(FileStream):
    def __init__(self, ring: RingbufChardev) -> None:
        super().__init__(None, None)
        self._ring = ring

    async def write(self, data: bytes) -> None:
        self._ring.put(data)


class SocketChardev(Chardev):
    """A stream socket, listening or connecting."""

    options: ChardevSocket

    def __init__(self, label: str, options: ChardevSocket) -> None:
        super().__init__(label, options)
        self._address: AnyAddress = options.addr.data
        self._listener: socket.socket | None = None
        self._first: socket.socket | None = None
        self._connected = False
        self._connects = not options.server
        self._names: Mapping[str, int] = {}

    @property
    def filename(self) -> str:
        """What ``query-chardev`` shows."""
        where = str(self._address)
        if self._listener is not None:
            where = net.local_address(self._listener)
        kind = "tcp" if isinstance(self._address, InetSocketAddress) else "unix"
        end = ",server=on" if self.options.server else ""
        return f"{'' if self._connected else 'disconnected:'}{kind}:{where}{end}"

    async def open(self, names: Mapping[str, int]) -> None:
        """Listen, or connect; with ``wait`` the first client is waited for."""
        self._names = names
        options = self.options
        if options.reconnect is not UNSET and options.reconnect_ms is not UNSET:
            raise CommandError("'reconnect' and 'reconnect-ms' are mutually exclusive")
        if options.wait is not UNSET and not options.server:
            raise CommandError("'wait' option is incompatible with socket in client connect mode")
        if options.server:
            self._listener = await net.listen(self._address, names)
            if options.wait is True:
                self._first = await net.accept(self._listener, self._address)
        elif not self._reconnect_s:
            self._first = await net.connect(self._address, names)
            self._connects = False

    @property
    def _reconnect_s(self) -> float:
        if self.options.reconnect is not UNSET:
            return max(0.0, self.options.reconnect)
        return (
            0.0 if self.options.reconnect_ms is UNSET else max(0, self.options.reconnect_ms) / 1000
        )

    async def connection(self) -> ByteStream | None:
        """The next client, or the server we connect to (again)."""
        sock, self._first = self._first, None
        if sock is None and self._listener is not None:
            sock = await net.accept(self._listener, self._address)
        while sock is None:
            if not self._reconnect_s:
                return None
            if self._connects:
                try:
                    sock = await net.connect(self._address, self._names)
                    break
                except StorageError:
                    pass  # not there yet: that is what reconnecting is for
            self._connects = True
            await asyncio.sleep(self._reconnect_s)
        self._connected = True
        return self._logged(SocketStream(sock))

    def disconnected(self) -> None:
        """The last peer has gone."""
        self._connected = False
        self._connects = False

    async def close(self) -> None:
        """Stop listening; the path in the file system goes."""
        if self._first is not None:
            self._first.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if isinstance(self._address, UnixSocketAddress):
                net.forget(self._address)


class _LoggedStream:
    """A stream, with a copy of what is written in a file."""

    def __init__(self, stream: ByteStream, path: str, *, append: bool) -> None:
        self._stream = stream
        end = os.O_APPEND if append else os.O_TRUNC
        self._log = _open_file(path, os.O_WRONLY | os.O_CREAT | end)
        self.read = stream.read
        self.take_descriptors = stream.take_descriptors

    async def write(self, data: bytes) -> None:
        os.write(self._log, data)
        await self._stream.write(data)

    def close(self) -> None:
        os.close(self._log)
        self._stream.close()


_CLASSES: Final[dict[str, type[Any]]] = {
    "file": FileChardev,
    "socket": SocketChardev,
    "pty": PtyChardev,
    "null": Chardev,
    "stdio": StdioChardev,
    "ringbuf": RingbufChardev,
    "memory": RingbufChardev,
}


def make_chardev(label: str, backend: ChardevBackend) -> Chardev:
    """The device that ``backend`` declares, not yet open."""
    made: Chardev = _CLASSES[str(backend.__struct_config__.tag)](label, backend.data)
    return made


def _open_file(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise StorageError.from_os(error, f"Could not open '{path}'", path) from error
