"""Speaking QMP byte by byte: with a server in this process, and with the real storage daemon."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blocklayer.qmp.chardev_options import MonitorOptions, parse_chardev
from blocklayer.qmp.server import Server
from oracles import HANG_TIMEOUT_S, require

NEGOTIATE = {"execute": "qmp_capabilities"}
MARKER = {"execute": "no-such-command", "id": "marker"}
"""Its reply is the last of a conversation."""

Message = dict[str, Any] | bytes
AnyResult = TypeVar("AnyResult")


def run(work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
    """Run a test's coroutine; a hang fails it."""
    return asyncio.run(asyncio.wait_for(work, HANG_TIMEOUT_S))


def as_bytes(message: Message) -> bytes:
    return message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"


class Peer:
    """A client that sends what it is told and reads message by message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Peer:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 26))

    async def greeted(self) -> Peer:
        """Past greeting and negotiation."""
        await self.read()
        await self.ask(NEGOTIATE)
        return self

    async def read(self) -> dict[str, Any]:
        line = await self.reader.readline()
        assert line.endswith(b"\r\n"), line
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    async def ask(self, message: Message) -> dict[str, Any]:
        self.writer.write(as_bytes(message))
        await self.writer.drain()
        return await self.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(path: Path, mode: Any = "control", **options: Any) -> AsyncIterator[Server]:
    """A server with one monitor listening on `path`."""
    server = Server(**options)
    device = parse_chardev(f"socket,id=m,path={path},server=on,wait=off")
    try:
        await server.add_chardev(device.id, device.backend)
        server.add_monitor(MonitorOptions(chardev="m", mode=mode))
        yield server
    finally:
        await server.close()


@contextlib.contextmanager
def real_daemon(path: Path, *arguments: str) -> Iterator[None]:
    """The real storage daemon with one monitor listening on `path`."""
    command = [
        require("qemu-storage-daemon").path,
        *("--pidfile", str(path.with_suffix(".pid"))),
        *("--chardev", f"socket,id=m,path={path},server=on,wait=off"),
        *("--monitor", "chardev=m", *arguments, "--daemonize"),
    ]
    # It returns once the monitor listens.
    subprocess.run(command, check=True, timeout=HANG_TIMEOUT_S)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            talk(path, [{"execute": "quit"}])


def talk(path: Path, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The replies to `messages` sent at once after negotiation, up to a marker's at the end."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(HANG_TIMEOUT_S)
        sock.connect(str(path))
        file = sock.makefile("rwb")
        file.readline()
        file.write(as_bytes(NEGOTIATE))
        file.flush()
        file.readline()
        file.write(b"".join(map(as_bytes, messages)))
        # After whatever was broken, this byte starts afresh; both answer it.
        file.write(b"\xff\n" + as_bytes(MARKER))
        file.flush()
        replies = []
        for line in file:
            reply = json.loads(line.replace(b'"id": inf', b'"id": null'))
            if reply.get("id") == "marker":
                break
            replies.append(reply)
        return replies


def talk_in_turn(path: Path, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The greeting's capabilities, and the reply to each message before the next one is sent."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(HANG_TIMEOUT_S)
        sock.connect(str(path))
        file = sock.makefile("rwb")
        replies = [{"capabilities": json.loads(file.readline())["QMP"]["capabilities"]}]
        for message in messages:
            file.write(as_bytes(message))
            file.flush()
            replies.append(json.loads(file.readline()))
        return replies
