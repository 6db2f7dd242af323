"""NBD's names as QMP wants them: where a server listens, and the URI of what it serves."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from blocklayer.codec.addresses import (
    InetSocket,
    InetSocketAddress,
    UnixSocket,
    UnixSocketAddress,
    parse_address,
)
from blocklayer.drivers.nbd.names import SCHEMES, describe, parse
from blocklayer.errors import UsageError

Address = InetSocket | UnixSocket


def is_uri(name: str) -> bool:
    """Whether ``name`` is what an NBD server serves, not a file."""
    return name.partition(":")[0] in SCHEMES


def nbd_options(uri: str) -> dict[str, Any]:
    """``blockdev-add`` options for an NBD URI. Raises UsageError."""
    return {"driver": "nbd", **parse(uri)}


def server_address(text: str) -> Address:
    """The address that an NBD server is to listen on: ``unix:PATH`` or ``HOST:PORT``."""
    address = parse_address(text)
    if isinstance(address, UnixSocketAddress):
        return UnixSocket(path=os.path.abspath(address.path))
    if isinstance(address, InetSocketAddress):
        return InetSocket(host=address.host, port=address.port)
    raise UsageError(f"Invalid address '{text}': use unix:PATH or HOST:PORT")


def legacy_address(address: Address) -> dict[str, Any]:
    """``address`` as ``nbd-server-start`` takes it."""
    members = msgspec.to_builtins(address)
    return {"type": members.pop("type"), "data": members}


def export_uri(address: Address | None, name: str) -> str:
    """The URI under which ``name`` is served at ``address`` (None: not known to us)."""
    if address is None:
        return f"export '{name}' of the server that was running"
    return describe(address, name) or name
