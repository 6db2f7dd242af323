"""Exports: nodes served to others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.codec.addresses import SocketAddressLegacy, UInt32
from blocklayer.daemon import exports
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments, Result
from blocklayer.qmp.shapes import Variants

BlockExportRemoveMode = Literal["safe", "hard"]


class NbdServerOptions(Arguments, kw_only=True):
    """Where to listen, for whom, and how many at once (0: any number)."""

    handshake_max_seconds: UInt32 = 10
    tls_creds: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    max_connections: UInt32 = 100
    addr: SocketAddressLegacy


class NbdServerAdd(Arguments, kw_only=True):
    """A device or node, and the name it is served under."""

    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    device: str
    writable: bool = False
    bitmap: str | UnsetType = UNSET


class NbdServerRemove(Arguments, kw_only=True):
    """The name of an export; ``safe``: only if nobody uses it."""

    name: str
    mode: BlockExportRemoveMode = "safe"


class BlockDirtyBitmapLocator(Arguments, kw_only=True, rename="kebab"):
    """A bitmap of a node."""

    node: str
    name: str


class BlockExportCommon(Arguments, kw_only=True):
    """What exports of all types have in common."""

    type: Literal["nbd"]
    id: str
    node_name: str
    fixed_iothread: bool = False
    iothread: str | UnsetType = UNSET
    writable: bool = False
    writethrough: bool = False
    allow_inactive: bool = False


class BlockExportNbd(BlockExportCommon, kw_only=True):
    """An export for NBD clients."""

    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    bitmaps: list[str | BlockDirtyBitmapLocator] | UnsetType = UNSET
    allocation_depth: bool = False


BlockExportOptions = Annotated[
    dict[str, Any],
    Variants("BlockExportOptions", "type", BlockExportCommon, lambda: {"nbd": BlockExportNbd}),
]


class BlockExportDel(Arguments, kw_only=True):
    """The id of an export; ``safe``: only if nobody uses it."""

    id: str
    mode: BlockExportRemoveMode = "safe"


class BlockExportInfo(Result):
    """One export."""

    id: str
    type: Literal["nbd"]
    node_name: str
    shutting_down: bool


def _given(value: Any) -> Any:
    return None if value is UNSET else value


@COMMANDS.command("nbd-server-start")
async def nbd_server_start(monitor: Monitor, arguments: NbdServerOptions) -> None:
    """Listen for NBD clients."""
    await exports.nbd_server_start(
        monitor.server.daemon,
        arguments.addr.data,
        handshake_max_seconds=arguments.handshake_max_seconds,
        max_connections=arguments.max_connections,
        tls_creds=_given(arguments.tls_creds),
        tls_authz=_given(arguments.tls_authz),
        descriptors=monitor.named_descriptors,
    )


@COMMANDS.command("nbd-server-stop")
async def nbd_server_stop(monitor: Monitor) -> None:
    """Drop all NBD clients and exports, and listen no more."""
    await exports.nbd_server_stop(monitor.server.daemon)


@COMMANDS.command("nbd-server-add", features=("deprecated",))
async def nbd_server_add(monitor: Monitor, arguments: NbdServerAdd) -> None:
    """Serve a device or node by NBD."""
    await exports.nbd_server_add(
        monitor.server.daemon,
        arguments.device,
        name=_given(arguments.name),
        description=_given(arguments.description) or "",
        writable=arguments.writable,
        bitmap=_given(arguments.bitmap),
    )


@COMMANDS.command("nbd-server-remove", features=("deprecated",))
async def nbd_server_remove(monitor: Monitor, arguments: NbdServerRemove) -> None:
    """Serve it no more."""
    await exports.nbd_server_remove(monitor.server.daemon, arguments.name, arguments.mode)


@COMMANDS.command("block-export-add")
async def block_export_add(monitor: Monitor, options: BlockExportOptions) -> None:
    """Serve a node."""
    arguments = msgspec.convert(options, BlockExportNbd)
    if arguments.iothread is not UNSET:
        raise CommandError(f'iothread "{arguments.iothread}" not found')
    await exports.block_export_add(
        monitor.server.daemon,
        arguments.id,
        arguments.node_name,
        name=_given(arguments.name),
        description=_given(arguments.description) or "",
        writable=arguments.writable,
        writethrough=arguments.writethrough,
        bitmaps=[
            each if isinstance(each, str) else (each.node, each.name)
            for each in _given(arguments.bitmaps) or ()
        ],
        allocation_depth=arguments.allocation_depth,
    )


@COMMANDS.command("block-export-del")
async def block_export_del(monitor: Monitor, arguments: BlockExportDel) -> None:
    """Serve a node no more."""
    await exports.block_export_del(monitor.server.daemon, arguments.id, arguments.mode)


@COMMANDS.command("query-block-exports")
async def query_block_exports(monitor: Monitor) -> list[BlockExportInfo]:
    """All exports."""
    return [
        BlockExportInfo(
            id=export.id,
            type="nbd",
            node_name=export.node_name,
            shutting_down=export.shutting_down,
        )
        for export in exports.query_block_exports(monitor.server.daemon)
    ]
