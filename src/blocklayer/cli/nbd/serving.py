"""`blk nbd` at work: from the image to the last client.

1. Clients come in only when everything is set up; what fails before leaves nothing behind.
2. SIGTERM, SIGINT and SIGHUP end it in order: what clients asked for ends, caches and bitmaps are
   stored, and the exit code is 0 unless something could not be stored.
3. A socket handed over by the service manager (LISTEN_FDS) is used where no place is named.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from blocklayer import net
from blocklayer.api.disk import CACHE_MODES
from blocklayer.cli import console
from blocklayer.cli.background import PidFile, detach
from blocklayer.cli.common import image_argument, warn_if_guessed
from blocklayer.cli.objects import new_graph
from blocklayer.errors import BlockError, UsageError
from blocklayer.exports.nbd.export import NbdExport
from blocklayer.exports.nbd.server import NbdServer
from blocklayer.graph.authorization import Authorization
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image, open_options
from blocklayer.graph.temporary import temporary_storage
from blocklayer.graph.tls_credentials import TlsCredentials

if TYPE_CHECKING:
    from blocklayer.cli.nbd.main import Nbd

_FIRST_DESCRIPTOR = 3


async def serve(command: Nbd, ready: int | None) -> int:
    """Serve until the last client has left, or a signal comes."""
    name = command.operands[0]
    mode = "none" if command.nocache else command.cache or "writeback"
    read_only = command.read_only or command.load_snapshot is not None
    graph = new_graph()
    tls = _credentials(command, graph)
    write_through, direct, no_flush = CACHE_MODES[mode]
    flags = Flags(
        read_only=read_only or command.snapshot,
        direct=direct,
        no_flush=no_flush,
        discard_unmap=command.unmaps,
        detect_zeroes=command.detect_zeroes,
    )
    try:
        image = image_argument(name, command.image_opts)
        node = await open_image(graph, image, format=command.format, flags=flags)
    except BlockError as error:
        raise error.reworded(f"Failed to blk_new_open '{name}': {error}") from error
    try:
        if not flags.read_only:
            warn_if_guessed(node, name)
        node = await _view(node, command)
        export = await NbdExport.open(
            "blk-nbd",
            node,
            name=command.export_name,
            description=command.description,
            writable=not read_only,
            writethrough=write_through,
            bitmaps=command.bitmap,
            allocation_depth=command.allocation_depth,
        )
    except BaseException:
        for each in list(graph.nodes.values()):
            await graph.release(each)
        raise
    await _serve_export(command, export, tls, ready)
    return 0


async def _view(node: Node, command: Nbd) -> Node:
    """What of the image is served: a snapshot, an overlay, a window."""
    if command.load_snapshot is not None:
        await _load_snapshot(node, command.load_snapshot)
    if command.snapshot:
        node = await _overlay(node, command)
    if command.start():
        node = await _window(node, command)
    return node


async def _load_snapshot(node: Node, wanted: str) -> None:
    from blocklayer.cli.img.snapshot import load_snapshot

    await load_snapshot([node], wanted)


async def _overlay(node: Node, command: Nbd) -> Node:
    """What clients write goes to a file without a name."""
    storage = await temporary_storage(node.graph, node.size)
    flags = Flags(
        read_only=command.read_only,
        discard_unmap=command.unmaps,
        detect_zeroes=command.detect_zeroes,
    )
    options = {"driver": "qcow2", "file": storage.name, "backing": node.name}
    try:
        return await open_options(node.graph, options, flags)
    except BaseException:
        await node.graph.release(storage)
        raise


async def _window(node: Node, command: Nbd) -> Node:
    """The node without its start."""
    if command.start() > node.size:
        raise UsageError(f"Invalid offset '{command.offset}'")
    options = {"driver": "raw", "offset": command.start(), "file": node.name}
    return await open_options(node.graph, options, node.flags)


async def _serve_export(
    command: Nbd, export: NbdExport, tls: TlsCredentials | None, ready: int | None
) -> None:
    ended = asyncio.Event()
    listeners: list[socket.socket] = []
    server: NbdServer | None = None

    def changed() -> None:
        if command.persistent or server is None:
            return
        if server.served_any and not export.clients:
            ended.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    pid: PidFile | None = None
    try:
        listeners = _inherited(command)
        on_stop = None
        if not listeners:
            address = command.address()
            listeners = [await net.listen(address)]
            on_stop = lambda: net.forget(address)  # noqa: E731 - a name for it says no more
        server = NbdServer(
            listeners,
            handshake_max_seconds=command.handshake_seconds(),
            max_connections=command.clients(),
            tls=None if tls is None else tls.server_context,
            authorize=_authorization(command, export.node.graph),
            report=console.complain if command.verbose else lambda message: None,
            on_change=changed,
            on_stop=on_stop or (lambda: None),
        )
        server.add(export)
        if command.pid_file is not None:
            pid = PidFile(command.pid_file)
        server.start()
        if ready is not None:
            detach(ready)
        await ended.wait()
    finally:
        if server is None:
            for listener in listeners:
                listener.close()
            await export.close()
        else:
            await server.stop()
        if pid is not None:
            pid.remove()


def _credentials(command: Nbd, graph: Graph) -> TlsCredentials | None:
    if command.tls_creds is None:
        return None
    found = graph.objects.find(command.tls_creds)
    if found is None or not isinstance(found[1], TlsCredentials):
        raise UsageError(
            f"Failed to get TLS creds: No TLS credentials with id '{command.tls_creds}'"
        )
    found[1].server_context()
    return found[1]


def _authorization(command: Nbd, graph: Graph) -> Callable[[str], bool] | None:
    if command.tls_authz is None:
        return None
    found = graph.objects.find(command.tls_authz)
    if found is None or not isinstance(found[1], Authorization):
        # As with the original: who cannot be asked allows nobody.
        return lambda name: False
    return found[1].allows


def _inherited(command: Nbd) -> list[socket.socket]:
    """Sockets from the service manager, if it started us with some."""
    count = os.environ.pop("LISTEN_FDS", "")
    owner = os.environ.pop("LISTEN_PID", "")
    if not count.isdigit() or owner != str(os.getpid()):
        return []
    if command.socket is not None or command.port is not None or command.bind is not None:
        raise UsageError("NBD server can't set an address with socket activation")
    listeners = []
    for number in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        listener = socket.socket(fileno=number)
        listener.setblocking(False)
        os.set_inheritable(number, False)
        listeners.append(listener)
    return listeners
