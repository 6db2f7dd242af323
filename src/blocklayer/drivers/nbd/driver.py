"""``nbd``: an export of an NBD server, as storage.

1. Requests are cut to what the server takes: its block sizes, and at most 32 MiB of data. What is
   not aligned to its minimum block is read, changed and written back, one at a time.
2. When a connection breaks, requests fail, or with ``reconnect-delay`` wait that long for a new
   one and are then sent again; all requests of the protocol may be sent twice.
3. What was written but not flushed when a connection broke may be lost on the server's side. The
   next flush says so: it fails, once (R3, R6).
4. Block status is a hint for copying; it is asked for again after each change.
"""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import UNSET, UnsetType

from blocklayer.codec.addresses import AnyAddress, InetSocket, SocketAddress, UnixSocket
from blocklayer.codec.nbd.constants import (
    BASE_ALLOCATION,
    DEFAULT_PORT,
    Allocation,
    Command,
    CommandFlag,
    Mode,
    TransmissionFlag,
)
from blocklayer.codec.nbd.records import Offer
from blocklayer.drivers.nbd import names
from blocklayer.drivers.nbd.connection import Connection, Pending, connect
from blocklayer.errors import BlockError, ProtocolError, StorageError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer, DriverInfo, ProtocolDriver
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.graph.options import NodeOptions
from blocklayer.graph.request import Claims
from blocklayer.units import GIB, MIB, SECTOR, align_down, align_up

if TYPE_CHECKING:
    from ssl import SSLContext

_RETRY_S = 0.5
_STATUS_LENGTH = GIB
_LIMIT_32 = (1 << 32) - 1
_MAX_TRANSFER = 32 * MIB


class NbdOptions(NodeOptions):
    """``server`` says where, ``export`` which; ``reconnect-delay`` and ``open-timeout`` in
    seconds. ``connections`` is how many to make where the server allows several.
    """

    server: SocketAddress | UnsetType = UNSET
    export: str | None = None
    tls_creds: str | None = None
    tls_hostname: str | None = None
    x_dirty_bitmap: str | None = None
    reconnect_delay: int = 0
    open_timeout: int = 0
    connections: int = 1
    host: str | UnsetType = UNSET
    port: str | UnsetType = UNSET
    path: str | UnsetType = UNSET


class NbdDriver(ProtocolDriver):
    """One export."""

    NAME: ClassVar[str] = "nbd"
    Options = NbdOptions
    CreateOptions: ClassVar[type[AnyCreateOptions] | None] = AnyCreateOptions
    filename_option = None

    @classmethod
    async def create(cls, graph: Graph, filename: str, options: AnyCreateOptions) -> None:
        """Check that the export is there and large enough; its first sector is cleared."""
        named = {"driver": cls.NAME, **names.parse(filename)}
        node = await open_options(graph, named, Flags(read_only=False))
        try:
            if node.size < options.size:
                raise UsageError(
                    f"Export '{filename}' is too small: {options.size} bytes are needed"
                )
            await io.write_zeroes(node, 0, min(SECTOR, node.size))
        finally:
            await graph.release(node)

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Any]:
        """What an NBD URI, or QEMU's older form, stands for."""
        return names.parse(name)

    async def open(self) -> None:
        """Connect, within ``open-timeout`` if the server is not there yet."""
        options = self.node.options
        assert isinstance(options, NbdOptions)
        self._settings = options
        self._address = _address(options)
        self._tls = self._make_tls()
        self._context = options.x_dirty_bitmap or BASE_ALLOCATION
        self._blocks = Claims()
        self._connections: list[Connection] = []
        self._turn = 0
        self._unflushed = False
        self._lost = False
        self._connecting = asyncio.Lock()
        self._forget_status()
        first = await self._connect(options.open_timeout)
        self._offer: Offer = first.offer
        if TransmissionFlag.READ_ONLY in self._offer.flags and not self.node.flags.read_only:
            if not self.node.flags.auto_read_only:
                first.close()
                raise StorageError(
                    f"Could not open '{self._where}': the server offers the export read-only",
                    errno.EACCES,
                )
            self.node.flags.read_only = True
        self._connections.append(first)
        if TransmissionFlag.CAN_MULTI_CONN in self._offer.flags:
            for _ in range(options.connections - 1):
                self._connections.append(await self._connect(0))
        self.zero_alignment = self.discard_alignment = self._offer.block_sizes.minimum

    def _make_tls(self) -> SSLContext | None:
        if self._settings.tls_creds is None:
            if self._settings.tls_hostname is not None:
                raise UsageError("tls-hostname needs tls-creds")
            return None
        from blocklayer.graph.tls_credentials import TlsCredentials

        found = self.node.graph.objects.get(self._settings.tls_creds, TlsCredentials)
        return found.client_context()

    async def close(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()

    @property
    def _where(self) -> str:
        return self.filename or f"nbd:{self._address}"

    @property
    def filename(self) -> str | None:
        """The export's URI, if that is all there is to it."""
        if self._settings.tls_creds is not None:
            return None
        return names.describe(self._address, self._settings.export)

    def identity(self) -> object | None:
        """The server and the export's name."""
        return "nbd", str(self._address), self._settings.export or ""

    @classmethod
    def identity_of(cls, options: Mapping[str, Any]) -> object | None:
        """Not worth asking for: opening an export locks nothing."""
        return None

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self._offer.size

    def info(self) -> DriverInfo:
        """No clusters, nothing dirty."""
        return DriverInfo()

    # Connections.

    async def _connect(self, timeout_s: float) -> Connection:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_s
        options = self._settings
        while True:
            try:
                return await connect(
                    self._address, options.export or "", (self._context,), tls=self._tls,
                    hostname=options.tls_hostname or getattr(self._address, "host", None),
                    mode=Mode.EXTENDED,
                )  # fmt: skip
            except StorageError as error:
                if loop.time() + _RETRY_S > end_s:
                    raise error.reworded(f"Could not open '{self._at}': {error}") from error
            await asyncio.sleep(_RETRY_S)

    @property
    def _at(self) -> str:
        return names.describe(self._address, self._settings.export) or f"nbd:{self._address}"

    async def _connection(self) -> Connection:
        """One that works, the next in turn; a new one if that is allowed."""
        self._turn += 1
        for number in range(len(self._connections)):
            found = self._connections[(self._turn + number) % len(self._connections)]
            if found.broken is None:
                return found
        broken = self._connections[0].broken
        assert broken is not None
        if not self._settings.reconnect_delay:
            raise StorageError(f"'{self._where}': {broken}", errno.EIO)
        async with self._connecting:
            if self._connections[0].broken is not None:
                await self._reconnect()
        return self._connections[0]

    async def _reconnect(self) -> None:
        new = await self._connect(self._settings.reconnect_delay)
        if new.offer.size < self._offer.size:
            new.close()
            raise StorageError(
                f"'{self._where}' came back with {new.offer.size:#x} bytes instead of "
                f"{self._offer.size:#x}",
                errno.EIO,
            )
        self._connections = [new]

    async def _request(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: Sequence[Buffer] = (),
        view: memoryview | None = None,
    ) -> tuple[Connection, Pending]:
        while True:
            connection = await self._connection()
            try:
                pending = await connection.request(
                    command, offset, length, flags=flags, data=data, view=view
                )
                return connection, pending
            except BlockError:
                if connection.broken is None:
                    raise
                # Loss is noted by whoever sees the connection end; several may.
                self._lost = self._lost or self._unflushed
                self._forget_status()
                if not self._settings.reconnect_delay or isinstance(
                    connection.broken, ProtocolError
                ):
                    raise

    # Requests.

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; what lies past the end of the export reads as zeros."""
        within = max(0, min(len(view), self.size - offset))
        view[within:] = bytes(len(view) - within)
        view = view[:within]
        unit = self._offer.block_sizes.minimum
        if (offset | within) % unit:
            start, end = align_down(offset, unit), align_up(offset + within, unit)
            whole = memoryview(bytearray(end - start))
            await self._read_aligned(start, whole)
            view[:] = whole[offset - start : offset - start + within]
            return
        await self._read_aligned(offset, view)

    async def _read_aligned(self, offset: int, view: memoryview) -> None:
        most = min(self._offer.block_sizes.maximum, _MAX_TRANSFER)
        if len(view) <= most:
            if len(view):
                await self._request(Command.READ, offset, len(view), view=view)
            return
        for at in range(0, len(view), most):
            piece = view[at : at + most]
            await self._request(Command.READ, offset + at, len(piece), view=piece)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store ``buffers``."""
        self.node.check_writable()
        length = sum(map(len, buffers))
        if offset + length > self.size:
            raise StorageError(
                f"Writing {length:#x} bytes at {offset:#x} goes past the end of '{self._where}'",
                errno.ENOSPC,
            )
        unit = self._offer.block_sizes.minimum
        if (offset | length) % unit == 0:
            await self._write_aligned(offset, buffers, length)
            return
        start, end = align_down(offset, unit), align_up(offset + length, unit)
        async with self._blocks.claim(start, end):
            whole = bytearray(end - start)
            await self._read_aligned(start, memoryview(whole))
            whole[offset - start : offset - start + length] = b"".join(buffers)
            await self._write_aligned(start, (whole,), len(whole))

    async def _write_aligned(self, offset: int, buffers: Sequence[Buffer], length: int) -> None:
        most = min(self._offer.block_sizes.maximum, _MAX_TRANSFER)
        self._changing()
        if length <= most:
            if length:
                await self._request(Command.WRITE, offset, length, data=buffers)
        else:
            view = memoryview(b"".join(buffers))
            for at in range(0, length, most):
                piece = view[at : at + most]
                await self._request(Command.WRITE, offset + at, len(piece), data=(piece,))
        self._changing()

    def _changing(self) -> None:
        self._unflushed = True
        self._forget_status()

    async def flush(self) -> None:
        """Ask the server to put everything on stable storage."""
        self._report_loss()
        if TransmissionFlag.SEND_FLUSH not in self._offer.flags or self.node.flags.read_only:
            return
        self._unflushed = False
        try:
            await self._request(Command.FLUSH)
        except BaseException:
            self._unflushed = True
            raise
        self._report_loss()

    def _report_loss(self) -> None:
        if self._lost:
            self._lost = False
            raise StorageError(
                f"The connection to '{self._where}' broke before what was written had been "
                "flushed: it may be lost",
                errno.EIO,
            )

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero on the server's side. ``graph.io`` writes zeros itself where that is refused."""
        flags = self._offer.flags
        if TransmissionFlag.SEND_WRITE_ZEROES not in flags:
            raise UnsupportedError(f"The server of '{self._where}' cannot write zeros by itself")
        how = 0 if unmap else CommandFlag.NO_HOLE
        if TransmissionFlag.SEND_FAST_ZERO in flags:
            how |= CommandFlag.FAST_ZERO
        try:
            await self._each(Command.WRITE_ZEROES, offset, length, how)
        except StorageError as error:
            if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise UnsupportedError(str(error)) from error
            raise

    async def discard(self, offset: int, length: int) -> None:
        """Tell the server that the range is of no more use."""
        if TransmissionFlag.SEND_TRIM not in self._offer.flags:
            raise UnsupportedError(f"The server of '{self._where}' takes no discards")
        await self._each(Command.TRIM, offset, length, 0)

    async def _each(self, command: Command, offset: int, length: int, flags: int) -> None:
        """A request without data, in pieces that its header can tell."""
        self.node.check_writable()
        length = min(length, self.size - offset)
        unit = self._offer.block_sizes.minimum
        most = align_down(_LIMIT_32, max(unit, MIB))
        self._changing()
        for at in range(0, length, most):
            await self._request(command, offset + at, min(most, length - at), flags=flags)
        self._changing()

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """An export has the size that it has."""
        if size != self.size:
            raise UnsupportedError(f"Cannot resize NBD export '{self._where}'")

    # Block status.

    def _forget_status(self) -> None:
        self._status: tuple[list[int], list[int]] = ([], [])
        """Where the known extents start (and, last, where they end), and their flags."""

    async def map(self, offset: int, length: int) -> Extent:
        """Data and zeros, as the server tells them."""
        if offset >= self.size:
            return Extent(offset, length, Kind.ZERO, offset, None, writable=False)
        starts, flags = self._status
        if not starts or not starts[0] <= offset < starts[-1]:
            starts, flags = await self._ask_status(offset)
        if not starts:
            return Extent(offset, length, Kind.DATA, offset, None, writable=True)
        index = bisect_right(starts, offset) - 1
        known = starts[index + 1] - offset
        kind = self._kind(flags[index])
        return Extent(offset, min(length, known), kind, offset, None, writable=True)

    def _kind(self, flags: int) -> Kind:
        if self._context != BASE_ALLOCATION:
            # A dirty bitmap shown as block status: what is clean looks like a hole.
            return Kind.DATA if flags & 1 else Kind.ZERO
        return Kind.ZERO if flags & Allocation.ZERO else Kind.DATA

    async def _ask_status(self, offset: int) -> tuple[list[int], list[int]]:
        unit = self._offer.block_sizes.minimum
        start = align_down(offset, unit)
        length = min(_STATUS_LENGTH, self.size - start)
        connection = await self._connection()
        if not connection.negotiated.contexts:
            return [], []
        try:
            connection, pending = await self._request(Command.BLOCK_STATUS, start, length)
        except StorageError:
            if connection.broken is not None:
                raise
            # A hint only: without it everything is data.
            return [], []
        wanted = [i for i, name in connection.negotiated.contexts.items() if name == self._context]
        extents = pending.extents.get(wanted[0]) if wanted else None
        if not extents:
            raise ProtocolError(f"The server of '{self._where}' told no block status")
        starts, flags = [start], []
        for size, state in extents:
            flags.append(state)
            starts.append(min(starts[-1] + size, self.size))
        if starts[-1] <= offset:
            raise ProtocolError(f"The server of '{self._where}' told block status of nothing")
        self._status = (starts, flags)
        return self._status


def _address(options: NbdOptions) -> AnyAddress:
    """Where the server is, also by the members of old."""
    if options.server is not UNSET:
        if UNSET is not options.host or UNSET is not options.path or UNSET is not options.port:
            raise UsageError("'server' and the old host, port and path are mutually exclusive")
        return options.server
    if isinstance(options.path, str):
        if options.host is not UNSET or options.port is not UNSET:
            raise UsageError("path and host may not be used at the same time")
        return UnixSocket(path=options.path)
    if isinstance(options.host, str):
        port = options.port if isinstance(options.port, str) else str(DEFAULT_PORT)
        return InetSocket(host=options.host, port=port)
    raise UsageError("NBD server address missing: give 'server'")
