"""An NBD server: where clients come in, and the exports that they find.

    server = NbdServer(await net.listen(address))
    server.add(await NbdExport.open("e0", node, name="disk"))
    server.start()

1. A process may have several servers, each with its own exports, credentials and limits.
2. At most ``max_connections`` clients are served at once; further ones wait in the system's queue.
3. With credentials nothing is said to clients before TLS, nor to those whose name ``authorize``
   refuses.
4. ``remove`` and ``stop`` return when nobody is served any more and the nodes are given back.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from blocklayer.codec.nbd.records import Offer
from blocklayer.codec.nbd.server import ServerHandshake
from blocklayer.errors import BlockError, LockedError, UsageError
from blocklayer.exports.nbd.connection import Connection
from blocklayer.exports.nbd.export import NbdExport

if TYPE_CHECKING:
    import ssl

DEFAULT_HANDSHAKE_MAX_SECONDS: Final = 10
DEFAULT_MAX_CONNECTIONS: Final = 100

_RETRY_S: Final = 0.1
"""After the system had no descriptor for a client."""


class NbdServer:
    """A server on sockets that listen. 0 stands for no limit."""

    def __init__(
        self,
        listeners: Iterable[socket.socket],
        *,
        handshake_max_seconds: float = DEFAULT_HANDSHAKE_MAX_SECONDS,
        max_connections: int = DEFAULT_MAX_CONNECTIONS,
        tls: Callable[[], ssl.SSLContext] | None = None,
        authorize: Callable[[str], bool] | None = None,
        report: Callable[[str], None] = lambda message: None,
        on_change: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._listeners = list(listeners)
        self._accepting = False
        self.handshake_max_seconds = handshake_max_seconds
        self.max_connections = max_connections
        self.tls = tls
        """Makes what TLS needs, for each client anew: certificates may change meanwhile."""
        self._authorize = authorize
        self.report = report
        """Told of clients that were sent away, and why."""
        self._on_change = on_change
        """Told when a client has come to an export, or left."""
        self._on_stop = on_stop
        self._removals: set[asyncio.Task[None]] = set()
        self.exports: dict[str, NbdExport] = {}
        self.connections: set[Connection] = set()
        self.served_any = False
        self._stopped = False

    def start(self) -> None:
        """Let clients in."""
        self._accept(True)

    def add(self, export: NbdExport) -> None:
        """Offer ``export``. Raises UsageError if its name is taken."""
        if export.name in self.exports:
            raise UsageError(f"NBD server already has export named '{export.name}'")
        self.exports[export.name] = export

    async def remove(self, export: NbdExport, *, hard: bool = False) -> None:
        """Offer it no more. Raises LockedError if it has clients, unless ``hard``."""
        await self.begin_removal(export, hard=hard)

    def begin_removal(self, export: NbdExport, *, hard: bool = False) -> asyncio.Task[None]:
        """As ``remove``, but what takes time is left to the task."""
        if export.clients and not hard:
            raise LockedError(f"export '{export.id}' still in use")
        self.exports.pop(export.name, None)
        export.shutting_down = True
        removal = asyncio.get_running_loop().create_task(export.close())
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)
        return removal

    async def stop(self) -> None:
        """Let nobody in, drop everybody, give all nodes back. Raises the first error met."""
        self._stopped = True
        self._accept(False)
        for listener in self._listeners:
            listener.close()
        self._on_stop()
        failure: BlockError | None = None
        for connection in list(self.connections):
            connection.drop()
        for export in list(self.exports.values()):
            _ = self.begin_removal(export, hard=True)
        for connection in list(self.connections):
            await connection.ended.wait()
        for removal in list(self._removals):
            try:
                await removal
            except BlockError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def handshake(self) -> ServerHandshake:
        """A handshake for a new client."""
        return ServerHandshake(self._find, self._offers, tls=self.tls is not None)

    def admits(self, certificate: dict[str, object]) -> bool:
        """Whether a client with this certificate may stay."""
        if self._authorize is None:
            return True
        from blocklayer.graph.tls_credentials import distinguished_name

        name = distinguished_name(certificate)
        if self._authorize(name):
            return True
        self.report(f"TLS client '{name}' is not authorized")
        return False

    def served(self, connection: Connection) -> None:
        """``connection`` has chosen an export."""
        self.served_any = True
        self._on_change()

    def left(self, connection: Connection) -> None:
        """``connection`` has ended."""
        self.connections.discard(connection)
        if not self._stopped:
            self._accept(True)
        self._on_change()

    def _find(self, name: str) -> Offer | None:
        export = self.exports.get(name)
        return None if export is None else export.offer(several=self.max_connections != 1)

    def _offers(self) -> Iterable[Offer]:
        return [each.offer(several=self.max_connections != 1) for each in self.exports.values()]

    def _accept(self, on: bool) -> None:
        on = on and not self._stopped and not self._full()
        if on == self._accepting:
            return
        loop = asyncio.get_running_loop()
        self._accepting = on
        for listener in self._listeners:
            if on:
                loop.add_reader(listener.fileno(), self._come_in, listener)
            else:
                loop.remove_reader(listener.fileno())

    def _full(self) -> bool:
        return bool(self.max_connections) and len(self.connections) >= self.max_connections

    def _come_in(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: the client waits, and the loop must not spin on it.
            self.report(f"Accepting a client failed: {error.strerror}")
            self._accept(False)
            asyncio.get_running_loop().call_later(_RETRY_S, self._accept, True)
            return
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(self, sock, str(address) if address else "a local client")
        self.connections.add(connection)
        if self._full():
            self._accept(False)
