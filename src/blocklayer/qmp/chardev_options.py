"""Character devices and monitors as they are declared: in QMP, and in the words of command lines.

1. One declaration a back end; ``parse_chardev`` reads ``socket,id=m,path=q.sock,server=on``,
   ``parse_device`` the short form of ``-qmp`` (``unix:q.sock,server,nowait``, ``stdio``), and both
   end in the structs that ``chardev-add`` takes.
2. Only what is built is declared: no telnet, TLS or websocket in front of a monitor.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.codec.addresses import (
    AnyAddress,
    FdSocketAddress,
    FdSocketLegacy,
    InetSocketAddress,
    InetSocketLegacy,
    SocketAddressLegacy,
    UnixSocketAddress,
    UnixSocketLegacy,
    VsockSocketLegacy,
    parse_address,
    parse_host_port,
)
from blocklayer.errors import UsageError
from blocklayer.graph.options import decode, parse_pairs
from blocklayer.qmp.shapes import DEPRECATED


class ChardevCommon(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What every character device takes: a file that gets a copy of what is written to it."""

    logfile: str | UnsetType = UNSET
    logappend: bool = False


class ChardevSocket(ChardevCommon):
    """A stream socket: a server with one client at a time, or a client."""

    addr: SocketAddressLegacy
    server: bool = True
    wait: bool | UnsetType = UNSET
    nodelay: bool = False
    reconnect: Annotated[int | UnsetType, DEPRECATED] = UNSET
    reconnect_ms: int | UnsetType = UNSET
    """How long a client waits before it connects anew; 0: it does not."""


class ChardevFile(ChardevCommon, kw_only=True):
    """Files: what is written goes to ``out``, what is read comes from ``in``."""

    out: str
    input: str | UnsetType = msgspec.field(default=UNSET, name="in")
    append: bool = False


class ChardevStdio(ChardevCommon):
    """Standard input and output; with ``signal`` off, Ctrl-C is a character like others."""

    signal: bool = True


class ChardevPty(ChardevCommon):
    """A new pseudo terminal; ``path`` becomes a link to it."""

    path: str | UnsetType = UNSET


class ChardevRingbuf(ChardevCommon):
    """A buffer in memory that keeps the last ``size`` bytes."""

    size: int = 65536


class _Backend(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """A back end's type with its members in ``data``."""


class FileBackend(_Backend, tag="file"):
    """``type=file``"""

    data: ChardevFile


class SocketBackend(_Backend, tag="socket"):
    """``type=socket``"""

    data: ChardevSocket


class PtyBackend(_Backend, tag="pty"):
    """``type=pty``"""

    data: ChardevPty


class NullBackend(_Backend, tag="null"):
    """``type=null``: nothing comes, everything is thrown away"""

    data: ChardevCommon


class StdioBackend(_Backend, tag="stdio"):
    """``type=stdio``"""

    data: ChardevStdio


class RingbufBackend(_Backend, tag="ringbuf"):
    """``type=ringbuf``"""

    data: ChardevRingbuf


class MemoryBackend(_Backend, tag="memory"):
    """``type=memory``, the old name of ringbuf"""

    data: ChardevRingbuf


ChardevBackend = (
    FileBackend
    | SocketBackend
    | PtyBackend
    | NullBackend
    | StdioBackend
    | RingbufBackend
    | MemoryBackend
)
_BACKENDS: Final[dict[str, tuple[type[Any], type[ChardevCommon]]]] = {
    "file": (FileBackend, ChardevFile),
    "socket": (SocketBackend, ChardevSocket),
    "pty": (PtyBackend, ChardevPty),
    "null": (NullBackend, ChardevCommon),
    "stdio": (StdioBackend, ChardevStdio),
    "ringbuf": (RingbufBackend, ChardevRingbuf),
    "memory": (MemoryBackend, ChardevRingbuf),
}
BACKEND_NAMES: Final = tuple(_BACKENDS)
_NEGATED: Final = {"nowait": "wait", "noserver": "server"}


class ChardevOptions(msgspec.Struct, kw_only=True):
    """One ``--chardev``: ``id``, and what ``chardev-add`` calls ``backend``."""

    id: str
    backend: ChardevBackend


class MonitorOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """One ``--monitor``: the character device it speaks over, and what it speaks."""

    id: str | None = None
    chardev: str
    mode: Literal["control", "readline"] = "control"
    pretty: bool = False


def parse_chardev(text: str) -> ChardevOptions:
    """``socket,id=m,path=q.sock,server=on,wait=off`` and its like. Raises UsageError."""
    values: dict[str, Any] = dict(parse_pairs(text, implied="backend"))
    kind, name = values.pop("backend", None), values.pop("id", None)
    if kind is None:
        raise UsageError(f"Invalid character device '{text}': it needs a backend ({_known()})")
    if not name:
        raise UsageError(f"chardev: no id specified in '{text}'")
    return ChardevOptions(id=name, backend=_backend(kind, values))


def parse_monitor(text: str) -> MonitorOptions:
    """``[chardev=]ID[,mode=control|readline][,pretty=on|off]``. Raises UsageError."""
    return decode(MonitorOptions, parse_pairs(text, implied="chardev"), "Parameter")


def parse_device(text: str, name: str) -> ChardevOptions | str:
    """What ``-qmp`` takes: a character device to be called ``name``, or the id of an existing one.

    ``unix:PATH,…``, ``tcp:HOST:PORT,…``, ``fd:N,…``, ``stdio``, ``pty``, ``null``, ``file:PATH`` or
    ``chardev:ID``. Raises UsageError.
    """
    first, *rest = text.split(",", 1)
    kind, colon, value = first.partition(":")
    if kind == "chardev" and value:
        return value
    options: dict[str, Any] = dict(parse_pairs(rest[0])) if rest else {}
    if kind in ("unix", "tcp", "fd", "vsock") and colon:
        address = parse_host_port(value) if kind == "tcp" else parse_address(first)
        return ChardevOptions(id=name, backend=_socket(address, options))
    if kind == "file" and colon:
        options["path"] = value
    elif colon or kind not in ("stdio", "pty", "null"):
        raise UsageError(
            f"Invalid device '{text}': use unix:PATH, tcp:HOST:PORT, fd:N, stdio, pty, null, "
            "file:PATH or chardev:ID, and for the first three server=on,wait=off to listen"
        )
    return ChardevOptions(id=name, backend=_backend(kind, options))


def _known() -> str:
    return ", ".join(_BACKENDS)


def _backend(kind: str, values: dict[str, Any]) -> ChardevBackend:
    if kind not in _BACKENDS:
        raise UsageError(f"'{kind}' is not a valid char driver name (there are: {_known()})")
    if kind == "socket":
        return _socket(None, values)
    if kind == "file" and "path" in values:
        values["out"] = values.pop("path")
    if "input-path" in values:
        values["in"] = values.pop("input-path")
    wrapper, struct = _BACKENDS[kind]
    backend: ChardevBackend = wrapper(data=decode(struct, values, "Parameter"))
    return backend


def _socket(address: AnyAddress | None, values: dict[str, Any]) -> SocketBackend:
    values = _old_words(values)
    if address is None:
        address = _address(values)
    if values.setdefault("server", "off") != "off":
        # A server on the command line waits for its first client unless told otherwise.
        values.setdefault("wait", "on")
    legacy = _legacy(address)
    decoded = decode(_SocketWords, values, "Parameter")
    return SocketBackend(data=ChardevSocket(addr=legacy, **msgspec.structs.asdict(decoded)))


class _SocketWords(ChardevCommon):
    """The members of a socket device beside its address."""

    server: bool = False
    wait: bool | UnsetType = UNSET
    nodelay: bool = False
    reconnect: int | UnsetType = UNSET
    reconnect_ms: int | UnsetType = UNSET


def _old_words(values: dict[str, Any]) -> dict[str, Any]:
    """``server,nowait`` as ``server=on,wait=off``."""
    return dict(
        (_NEGATED[name], "off") if name in _NEGATED else (name, value)
        for name, value in values.items()
    )


def _address(values: dict[str, Any]) -> AnyAddress:
    """The address that ``path``, ``host`` and ``port``, or ``fd`` name; they are taken out."""
    kinds: tuple[tuple[str, type[Any], dict[str, str]], ...] = (
        ("path", UnixSocketAddress, {}),
        ("fd", FdSocketAddress, {"fd": "str"}),
        ("port", InetSocketAddress, {}),
    )
    present = [kind for kind in kinds if kind[0] in values]
    if len(present) != 1:
        raise UsageError("chardev: socket: give one of path=, fd=, or host= and port=")
    _, struct, renamed = present[0]
    fields = {f.encode_name for f in msgspec.structs.fields(struct)}
    chosen = {
        renamed.get(name, name): values.pop(name)
        for name in list(values)
        if renamed.get(name, name) in fields
    }
    if struct is InetSocketAddress:
        chosen.setdefault("host", "")
    address: AnyAddress = decode(struct, chosen, "Parameter")
    return address


def _legacy(address: AnyAddress) -> SocketAddressLegacy:
    if isinstance(address, UnixSocketAddress):
        return UnixSocketLegacy(data=address)
    if isinstance(address, InetSocketAddress):
        return InetSocketLegacy(data=address)
    if isinstance(address, FdSocketAddress):
        return FdSocketLegacy(data=address)
    return VsockSocketLegacy(data=address)
