"""Real NBD servers for tests, and a proxy that breaks what they say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from oracles import HANG_TIMEOUT_S, require


class QemuNbd:
    """A qemu-nbd that serves `image`; `stop` and `start` it as often as wanted."""

    def __init__(self, folder: Path, image: Path, *arguments: str, format: str = "raw") -> None:
        self.socket = folder / f"{image.name}.sock"
        self._pid = folder / f"{image.name}.pid"
        self._command = [
            require("qemu-nbd").path,
            *("--fork", "--pid-file", str(self._pid), "--persistent", "--shared", "0"),
            *("--socket", str(self.socket), "--format", format, *arguments, str(image)),
        ]

    def start(self) -> None:
        """Returns once it listens."""
        subprocess.run(self._command, check=True, timeout=HANG_TIMEOUT_S, capture_output=True)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Returns once it is gone."""
        pid = int(self._pid.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
            handle = os.pidfd_open(pid)
            _until_gone(handle)
        self.socket.unlink(missing_ok=True)


def _until_gone(handle: int) -> None:
    import select

    poll = select.poll()
    poll.register(handle, select.POLLIN)
    assert poll.poll(HANG_TIMEOUT_S * 1000), "qemu-nbd does not end"
    os.close(handle)


@contextlib.contextmanager
def qemu_nbd(folder: Path, image: Path, *arguments: str, format: str = "raw") -> Iterator[QemuNbd]:
    """A running server."""
    server = QemuNbd(folder, image, *arguments, format=format)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def uri(server: QemuNbd, export: str = "") -> str:
    """Its export's name."""
    return f"nbd+unix:///{export}?socket={server.socket}"


@contextlib.asynccontextmanager
async def proxy(path: Path, server: Path, limit: int) -> AsyncIterator[None]:
    """At `path`: what is at `server`, cut off after `limit` bytes from it."""

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if left is not None:
                    data, left = data[:left], left - len(data)
                writer.write(data)
                await writer.drain()
                if left is not None and left <= 0:
                    break
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(str(server))
        back = asyncio.ensure_future(pump(theirs, writer, limit))
        await asyncio.gather(pump(reader, ours, None), back, return_exceptions=True)

    listener = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        listener.close()
