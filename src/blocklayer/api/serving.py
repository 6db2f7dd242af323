"""Serving a disk by NBD from Python: for asyncio (``serve``), and beside other code (``Server``).

    with blocklayer.serve("disk.qcow2", "nbd+unix:///?socket=/tmp/disk.sock") as server:
        subprocess.run(["nbdinfo", server.uri])

1. When ``serve`` returns clients may come; when ``close`` has, none is served any more, and
   everything that was acknowledged is with the image.
2. A synchronous caller's server runs on a loop and in a thread of its own, and shares nothing with
   disks opened elsewhere; the image's locks keep them apart.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec

from blocklayer import net
from blocklayer.api.disk import Disk, Image
from blocklayer.codec.addresses import SocketAddress, UnixSocketAddress
from blocklayer.errors import UsageError
from blocklayer.graph.gate import Policy

_ID = "serve"


class AsyncServer:
    """A disk that is being served. Made by ``serve``."""

    def __init__(self, disk: Disk, server: Any, uri: str) -> None:
        self._disk = disk
        self._server = server
        self.uri = uri
        """Where clients find it; a port that was 0 is the real one."""

    async def close(self) -> None:
        """Drop all clients, and close the image. Raises what could not be stored."""
        try:
            await self._server.stop()
        finally:
            await self._disk.close()

    async def __aenter__(self) -> AsyncServer:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


async def serve(
    image: Image,
    uri: str,
    *,
    writable: bool = False,
    format: str | None = None,
    description: str = "",
    bitmaps: Sequence[str] = (),
    allocation_depth: bool = False,
    max_connections: int = 100,
    certificates: str | None = None,
    policy: Policy | None = None,
) -> AsyncServer:
    """Serve ``image`` at ``uri``: ``nbd://host:port/name`` or ``nbd+unix:///name?socket=path``.

    ``bitmaps`` and ``allocation_depth`` are what clients may ask about besides holes;
    ``max_connections`` 0 lets any number in. With ``certificates``, a folder in QEMU's layout,
    clients must encrypt and be known to its authority. Raises BlockError.
    """
    from blocklayer.drivers.nbd.names import parse
    from blocklayer.exports.nbd.export import NbdExport
    from blocklayer.exports.nbd.server import NbdServer
    from blocklayer.graph.tls_credentials import server_context

    options = parse(uri)
    if "tls-creds" in options:
        raise UsageError("Name a folder of certificates, in place of tls-creds in the URI")
    address: Any = msgspec.convert(options["server"], SocketAddress)
    name = options.get("export", "")
    if certificates is not None:
        server_context(certificates)
    disk = await Disk.open(image, format=format, writable=writable, policy=policy)
    try:
        export = await NbdExport.open(
            _ID,
            disk.root.node,
            name=name,
            description=description,
            writable=writable,
            bitmaps=bitmaps,
            allocation_depth=allocation_depth,
        )
        try:
            listener = await net.listen(address)
        except BaseException:
            await export.close()
            raise
        server = NbdServer(
            [listener],
            max_connections=max_connections,
            tls=None if certificates is None else lambda: server_context(certificates),
            on_stop=lambda: net.forget(address),
        )
        server.add(export)
        server.start()
    except BaseException:
        await disk.close()
        raise
    if not isinstance(address, UnixSocketAddress):
        uri = f"nbd://{net.local_address(listener)}/{name}"
    return AsyncServer(disk, server, uri)


class Server:
    """A disk that is being served beside synchronous code."""

    def __init__(self, image: Image, uri: str, **options: Any) -> None:
        """See ``serve``."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._server: AsyncServer = self._run(serve(image, uri, **options))
        except BaseException:
            self._end()
            raise
        self._closed = False

    @property
    def uri(self) -> str:
        """Where clients find it."""
        return self._server.uri

    def close(self) -> None:
        """Drop all clients, and close the image. Raises what could not be stored."""
        if not self._closed:
            self._closed = True
            try:
                self._run(self._server.close())
            finally:
                self._end()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
