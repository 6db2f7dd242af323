"""A served disk, and a client of ours that speaks by the codec: for tests of the NBD server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blocklayer import net
from blocklayer.codec.addresses import UnixSocketAddress
from blocklayer.codec.nbd import messages
from blocklayer.codec.nbd.client import ClientState, Connecting, Listing
from blocklayer.codec.nbd.constants import Chunk, Command, Mode
from blocklayer.codec.nbd.messages import Reply, Request
from blocklayer.drivers import REGISTRY
from blocklayer.exports.nbd.export import NbdExport
from blocklayer.exports.nbd.server import NbdServer
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from oracles import HANG_TIMEOUT_S

AnyResult = TypeVar("AnyResult")


def run(work: Coroutine[Any, Any, AnyResult]) -> AnyResult:
    """Run a test's coroutine; a hang fails it."""

    async def tidily() -> AnyResult:
        try:
            return await asyncio.wait_for(work, HANG_TIMEOUT_S)
        finally:
            while OPENED:
                OPENED.pop().close()

    return asyncio.run(tidily())


OPENED: list[asyncio.StreamWriter] = []
"""What clients of the running test hold open."""


class Served:
    """A server with one export of one node."""

    def __init__(self, graph: Graph, node: Node, server: NbdServer, path: Path) -> None:
        self.graph, self.node, self.server, self.path = graph, node, server, path
        self.reports: list[str] = []
        self.export: NbdExport

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export.name}?socket={self.path}"


@contextlib.asynccontextmanager
async def served(
    folder: Path,
    options: dict[str, Any],
    *,
    server: dict[str, Any] | None = None,
    **export: Any,
) -> AsyncIterator[Served]:
    """Serve the node of ``options`` on a socket in ``folder``."""
    graph = Graph(REGISTRY)
    node = await open_options(
        graph, {"node-name": "disk", "discard": "unmap", **options}, Flags(read_only=False)
    )
    path = folder / "nbd.sock"
    stage = Served(graph, node, None, path)  # type: ignore[arg-type]
    listener = await net.listen(UnixSocketAddress(path=str(path)))
    stage.server = NbdServer([listener], report=stage.reports.append, **(server or {}))
    export.setdefault("writable", not node.read_only)
    stage.export = await NbdExport.open("export0", node, **export)
    stage.server.add(stage.export)
    stage.server.start()
    try:
        yield stage
    finally:
        await stage.server.stop()
    assert not graph.roots
    assert not graph.nodes, "something still holds the node"


def memory(size: int = 1 << 20) -> dict[str, Any]:
    return {"driver": "memory", "size": size}


def image(path: Path, form: str = "qcow2") -> dict[str, Any]:
    return {"driver": form, "file": {"driver": "file", "filename": str(path)}}


class Answer:
    """All of a request's reply."""

    def __init__(self) -> None:
        self.error = 0
        self.message = ""
        self.data: dict[int, bytes] = {}
        self.holes: dict[int, int] = {}
        self.status: dict[int, list[tuple[int, int]]] = {}

    def content(self) -> bytes:
        """Data and holes, put together."""
        parts = {**self.data, **{offset: bytes(n) for offset, n in self.holes.items()}}
        return b"".join(parts[offset] for offset in sorted(parts))


class Client:
    """One connection in transmission."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        OPENED.append(writer)
        self.mode = Mode.SIMPLE
        self.contexts: dict[int, str] = {}
        self.size = 0
        self.flags = 0
        self._cookies = 0
        self.reads: dict[int, int] = {}

    @classmethod
    async def connect(
        cls,
        path: Path,
        name: str = "disk",
        mode: Mode = Mode.EXTENDED,
        contexts: Sequence[str] = (),
    ) -> Client:
        client = cls(*await asyncio.open_unix_connection(path))
        handshake = Connecting(name, mode=mode, contexts=contexts)
        await client.shake(handshake)
        assert handshake.result is not None
        client.mode, client.contexts = handshake.result.mode, handshake.result.contexts
        client.size, client.flags = handshake.result.offer.size, int(handshake.result.offer.flags)
        return client

    @classmethod
    async def listed(cls, path: Path, mode: Mode = Mode.EXTENDED) -> Listing:
        client = cls(*await asyncio.open_unix_connection(path))
        listing = Listing(mode=mode)
        await client.shake(listing)
        client.writer.close()
        return listing

    async def shake(self, handshake: Connecting | Listing) -> None:
        while handshake.state is ClientState.TALKING:
            data = await self.reader.read(65536)
            if not data:
                raise ConnectionError("closed by the server")
            self.writer.write(handshake.receive(data))
        assert not handshake.rest

    def ask(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> Request:
        """Send a request; do not wait."""
        self._cookies += 1
        request = Request(command, flags, self._cookies, offset, length or len(payload))
        if command == Command.READ:
            self.reads[request.cookie] = request.length
        self.writer.write(messages.pack_request(self.mode, request) + payload)
        return request

    async def answers(self, count: int) -> dict[int, Answer]:
        """The whole replies to that many requests, by cookie."""
        found: dict[int, Answer] = {}
        done = 0
        while done < count:
            reply = await self.reply()
            answer = found.setdefault(reply.cookie, Answer())
            if reply.type is None:
                answer.error = reply.error
                length = self.reads.get(reply.cookie, 0)
                if length and not reply.error:
                    answer.data[0] = await self.reader.readexactly(length)
            else:
                assert self.mode is not Mode.SIMPLE
                self._chunk(answer, reply, await self.reader.readexactly(reply.payload_length))
            done += reply.done
        return found

    async def reply(self) -> Reply:
        head = await self.reader.readexactly(4)
        size = messages.reply_size(self.mode, head, 0)
        return messages.unpack_reply(self.mode, head + await self.reader.readexactly(size - 4), 0)

    def _chunk(self, answer: Answer, reply: Reply, payload: bytes) -> None:
        if reply.is_error:
            assert reply.type is not None
            answer.error, answer.message = messages.unpack_error(reply.type, payload)
        elif reply.type == Chunk.OFFSET_DATA:
            answer.data[messages.unpack_offset(payload)] = payload[8:]
        elif reply.type == Chunk.OFFSET_HOLE:
            offset, length = messages.unpack_hole(payload)
            answer.holes[offset] = length
        elif reply.type in (Chunk.BLOCK_STATUS, Chunk.BLOCK_STATUS_EXT):
            number, extents = messages.unpack_extents(reply.type, payload)
            answer.status[number] = extents
        else:
            assert reply.type == Chunk.NONE

    async def do(self, command: int, *args: Any, **options: Any) -> Answer:
        """One request, and its whole reply."""
        request = self.ask(command, *args, **options)
        return (await self.answers(1))[request.cookie]

    async def close(self) -> None:
        """Say goodbye, and see the server go."""
        self.ask(Command.DISC)
        assert await self.reader.read() == b""
        self.writer.close()
