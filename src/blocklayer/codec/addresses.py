"""Socket addresses: declared once for QMP, dotted options and the short texts of command lines.

1. ``SocketAddress`` is flat (``{"type": "unix", "path": …}``), ``SocketAddressLegacy`` keeps the
   members in ``data``, as character devices do. The members are the same declarations.
2. Nothing is resolved or opened here; ``net`` does that.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blocklayer.errors import UsageError

UInt16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
UInt32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]

MAX_UNIX_PATH = 107
"""Bytes of a Unix socket's path that the kernel takes."""


class _Address(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """What all addresses are."""


class InetSocketAddress(_Address):
    """A host and a port (number or service name). ``to`` is the last port to try to listen on."""

    host: str
    port: str
    numeric: bool = False
    to: UInt16 | UnsetType = UNSET
    ipv4: bool | UnsetType = UNSET
    ipv6: bool | UnsetType = UNSET
    keep_alive: bool = False
    keep_alive_count: UInt32 | UnsetType = UNSET
    keep_alive_idle: UInt32 | UnsetType = UNSET
    keep_alive_interval: UInt32 | UnsetType = UNSET
    mptcp: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class UnixSocketAddress(_Address):
    """A path in the file system, or with ``abstract`` a name outside of it.

    ``tight``: the name is no longer than its text; else it is filled up with zero bytes.
    """

    path: str
    abstract: bool = False
    tight: bool = True

    def __str__(self) -> str:
        return f"@{self.path}" if self.abstract else self.path


class VsockSocketAddress(_Address):
    """A virtual machine's context identifier and a port."""

    cid: str
    port: str

    def __str__(self) -> str:
        return f"{self.cid}:{self.port}"


class FdSocketAddress(_Address):
    """A socket that is open already: its number, or the name it was given with ``getfd``."""

    name: str = msgspec.field(name="str")

    def __str__(self) -> str:
        return self.name


class InetSocket(InetSocketAddress, tag_field="type", tag="inet"):
    """``type=inet``"""


class UnixSocket(UnixSocketAddress, tag_field="type", tag="unix"):
    """``type=unix``"""


class VsockSocket(VsockSocketAddress, tag_field="type", tag="vsock"):
    """``type=vsock``"""


class FdSocket(FdSocketAddress, tag_field="type", tag="fd"):
    """``type=fd``"""


class InetSocketLegacy(_Address, tag_field="type", tag="inet"):
    """``type=inet`` with members in ``data``"""

    data: InetSocketAddress


class UnixSocketLegacy(_Address, tag_field="type", tag="unix"):
    """``type=unix`` with members in ``data``"""

    data: UnixSocketAddress


class VsockSocketLegacy(_Address, tag_field="type", tag="vsock"):
    """``type=vsock`` with members in ``data``"""

    data: VsockSocketAddress


class FdSocketLegacy(_Address, tag_field="type", tag="fd"):
    """``type=fd`` with members in ``data``"""

    data: FdSocketAddress


SocketAddress = InetSocket | UnixSocket | VsockSocket | FdSocket
SocketAddressLegacy = InetSocketLegacy | UnixSocketLegacy | VsockSocketLegacy | FdSocketLegacy
AnyAddress = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress
"""An address without its tag; the flat tagged ones are such addresses as well."""


def parse_address(text: str) -> AnyAddress:
    """``unix:PATH``, ``fd:NAME``, ``vsock:CID:PORT``, ``tcp:HOST:PORT`` or ``HOST:PORT``.

    A text with a slash, or without a colon, is a path. Raises UsageError.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return UnixSocketAddress(path=_given(rest, "unix: needs a path"))
    if kind == "fd":
        return FdSocketAddress(name=_given(rest, "fd: needs a number or a name"))
    if kind == "vsock":
        cid, colon, port = rest.partition(":")
        if not colon:
            raise UsageError(f"Invalid address '{text}': use vsock:CID:PORT")
        return VsockSocketAddress(cid=cid, port=port)
    if kind == "tcp" and ":" in rest:
        return parse_host_port(rest)
    if "/" in text or ":" not in text:
        return UnixSocketAddress(path=_given(text, "an address is needed"))
    return parse_host_port(text)


def parse_host_port(text: str) -> InetSocketAddress:
    """``HOST:PORT`` or ``[IPV6]:PORT``; no host means every address. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port:
        raise UsageError(f"Invalid address '{text}': use HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        return InetSocketAddress(host=host[1:-1], port=port, ipv6=True)
    if ":" in host:
        raise UsageError(f"Invalid address '{text}': write an IPv6 address in brackets")
    return InetSocketAddress(host=host, port=port)


def _given(text: str, complaint: str) -> str:
    if not text:
        raise UsageError(f"Invalid address: {complaint}")
    return text
