"""Exports: nodes served to others, and the servers that they are found at.

1. An export's id is free again when its BLOCK_EXPORT_DELETED is sent: nobody is served by it then,
   and its node is given back.
2. Removing is asked for, and happens later: `block_export_del` returns when no new client comes in
   and, with mode hard, every client is dropped.
3. There may be several NBD servers, told apart by ``server``; "" is the one that QMP knows.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial
from typing import Literal

import msgspec

from blocklayer import net
from blocklayer.codec.addresses import AnyAddress
from blocklayer.daemon import devices
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import BlockError, StorageError, UsageError
from blocklayer.exports.export import Export
from blocklayer.exports.nbd.export import NbdExport
from blocklayer.exports.nbd.server import (
    DEFAULT_HANDSHAKE_MAX_SECONDS,
    DEFAULT_MAX_CONNECTIONS,
    NbdServer,
)
from blocklayer.graph.authorization import Authorization
from blocklayer.graph.events import BlockExportDeleted
from blocklayer.graph.graph import is_well_formed_id
from blocklayer.graph.node import Node
from blocklayer.graph.tls_credentials import TlsCredentials

RemoveMode = Literal["safe", "hard"]


class BlockExportInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """One export, as ``query-block-exports`` shows it."""

    id: str
    type: str
    node_name: str
    shutting_down: bool


async def nbd_server_start(
    daemon: Daemon,
    address: AnyAddress,
    *,
    handshake_max_seconds: float = DEFAULT_HANDSHAKE_MAX_SECONDS,
    max_connections: int = DEFAULT_MAX_CONNECTIONS,
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    descriptors: dict[str, int] | None = None,
    server: str = "",
) -> NbdServer:
    """Listen for NBD clients at ``address``; ``descriptors`` are those with names (``getfd``).

    With ``tls_creds``, the id of TLS credentials, clients must encrypt; ``tls_authz`` is the id of
    who decides about their names. Where there is no such object, everybody is denied.
    """
    if server in daemon.nbd_servers:
        raise UsageError("NBD server already running")
    tls = None if tls_creds is None else _credentials(daemon, tls_creds).server_context
    listener = await net.listen(address, descriptors)
    if server in daemon.nbd_servers:
        listener.close()
        raise UsageError("NBD server already running")
    started = NbdServer(
        [listener],
        on_stop=lambda: net.forget(address),
        handshake_max_seconds=handshake_max_seconds,
        max_connections=max_connections,
        tls=tls,
        authorize=None if tls_authz is None else partial(_allows, daemon, tls_authz),
    )
    daemon.nbd_servers[server] = started
    daemon.front_ends.append(started.stop)
    started.start()
    return started


def _credentials(daemon: Daemon, identifier: str) -> TlsCredentials:
    found = daemon.graph.objects.find(identifier)
    if found is None:
        raise UsageError(f"No TLS credentials with id '{identifier}'")
    credentials = found[1]
    if not isinstance(credentials, TlsCredentials):
        raise UsageError(f"Object with id '{identifier}' is not TLS credentials")
    credentials.server_context()
    return credentials


def _allows(daemon: Daemon, identifier: str, name: str) -> bool:
    found = daemon.graph.objects.find(identifier)
    return found is not None and isinstance(found[1], Authorization) and found[1].allows(name)


async def nbd_server_stop(daemon: Daemon, *, server: str = "") -> None:
    """Drop all clients, remove all exports of the server, listen no more."""
    running = _server(daemon, server)
    del daemon.nbd_servers[server]
    daemon.front_ends.remove(running.stop)
    gone = list(running.exports.values())
    try:
        await running.stop()
    finally:
        for export in reversed(gone):
            _forget(daemon, export)


def _server(daemon: Daemon, name: str) -> NbdServer:
    running = daemon.nbd_servers.get(name)
    if running is None:
        raise UsageError("NBD server not running")
    return running


async def block_export_add(
    daemon: Daemon,
    identifier: str,
    node_name: str,
    *,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
    writethrough: bool = False,
    bitmaps: Sequence[str | tuple[str, str]] = (),
    allocation_depth: bool = False,
    server: str = "",
) -> NbdExport:
    """Serve the node by NBD, as ``name`` (its own name, if none is given)."""
    _check_id(daemon, identifier)
    node = daemon.graph.nodes.get(node_name)
    if node is None:
        raise UsageError(f"Cannot find device='' nor node-name='{node_name}'")
    return await _add_nbd(
        daemon,
        identifier,
        node,
        server,
        name=name,
        description=description,
        writable=writable,
        writethrough=writethrough,
        bitmaps=bitmaps,
        allocation_depth=allocation_depth,
    )


def _check_id(daemon: Daemon, identifier: str) -> None:
    if not is_well_formed_id(identifier):
        raise UsageError("Invalid block export id")
    if identifier in daemon.exports:
        raise UsageError(f"Block export id '{identifier}' is already in use")


async def _add_nbd(
    daemon: Daemon,
    identifier: str,
    node: Node,
    server: str,
    *,
    name: str | None,
    description: str,
    writable: bool,
    writethrough: bool = False,
    bitmaps: Sequence[str | tuple[str, str]],
    allocation_depth: bool = False,
) -> NbdExport:
    if writable and node.read_only:
        raise UsageError("Cannot export read-only node as writable")
    running = _server(daemon, server)
    if (node.name if name is None else name) in running.exports:
        raise UsageError(f"NBD server already has export named '{name or node.name}'")
    export = await NbdExport.open(
        identifier,
        node,
        name=name,
        description=description,
        writable=writable,
        writethrough=writethrough,
        bitmaps=bitmaps,
        allocation_depth=allocation_depth,
    )
    try:
        # Reading bitmaps may have taken its time: what was free may be taken.
        _check_id(daemon, identifier)
        _server(daemon, server).add(export)
    except BlockError:
        await export.close()
        raise
    daemon.exports[identifier] = export
    devices.meet(daemon, export.root)
    return export


async def block_export_del(daemon: Daemon, identifier: str, mode: RemoveMode = "safe") -> None:
    """Remove an export; one that has clients only with mode ``hard``."""
    export = daemon.exports.get(identifier)
    if export is None:
        raise StorageError(f"Export '{identifier}' is not found", errno.ENOENT)
    assert isinstance(export, NbdExport)
    if export.shutting_down:
        return
    busy = export.clients > 0
    server = next(
        each for each in daemon.nbd_servers.values() if each.exports.get(export.name) is export
    )
    removal = server.begin_removal(export, hard=mode == "hard")
    removal.add_done_callback(lambda _: _forget(daemon, export))
    if not busy:
        # Nothing keeps it: as with QEMU, it is gone when the command returns.
        await removal


def _forget(daemon: Daemon, export: Export) -> None:
    if daemon.exports.pop(export.id, None) is not None:
        daemon.graph.notify(BlockExportDeleted(id=export.id))


def query_block_exports(daemon: Daemon) -> list[BlockExportInfo]:
    """All exports, the newest first."""
    return [
        BlockExportInfo(
            id=export.id,
            type=export.TYPE,
            node_name=export.node.name,
            shutting_down=export.shutting_down,
        )
        for export in reversed(daemon.exports.values())
    ]


async def nbd_server_add(
    daemon: Daemon,
    device: str,
    *,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
    bitmap: str | None = None,
) -> NbdExport:
    """As ``block_export_add``, for a device or node, in the words of older clients.

    The export's id is its name; a node that is read-only is exported so.
    """
    _server(daemon, "")
    identifier = device if name is None else name
    node = daemon.find(device)
    if identifier in daemon.exports:
        raise UsageError(f"Block export id '{identifier}' is already in use")
    return await _add_nbd(
        daemon,
        identifier,
        node,
        "",
        name=identifier,
        description=description,
        writable=writable and not node.read_only,
        bitmaps=[] if bitmap is None else [bitmap],
    )


async def nbd_server_remove(daemon: Daemon, name: str, mode: RemoveMode = "safe") -> None:
    """Remove the export called ``name`` of the server that QMP knows."""
    export = daemon.exports.get(name)
    if not isinstance(export, NbdExport):
        raise StorageError(f"Export '{name}' is not found", errno.ENOENT)
    await block_export_del(daemon, name, mode)
