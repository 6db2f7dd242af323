"""Names of exports: NBD URIs and QEMU's older form, to options and back.

nbd://HOST[:PORT]/EXPORT        nbd+unix:///EXPORT?socket=PATH        nbds…: with TLS
nbd:HOST:PORT[:exportname=EXPORT]        nbd:unix:PATH[:exportname=EXPORT]
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from blocklayer.codec.addresses import InetSocket, UnixSocket, VsockSocket
from blocklayer.codec.nbd.constants import DEFAULT_PORT
from blocklayer.errors import UsageError

SCHEMES = ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix")

_EXPORT_NAME = ":exportname="


def parse(name: str) -> dict[str, Any]:
    """The options that ``name`` stands for. Raises UsageError."""
    return _parse_uri(name) if "://" in name else _parse_old(name)


def _parse_uri(name: str) -> dict[str, Any]:
    try:
        parts = urlsplit(name)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"Invalid NBD URI '{name}': {error}") from None
    query = parse_qs(parts.query, keep_blank_values=True)
    unknown = sorted(query.keys() - {"socket", "tls-hostname", "tls-creds"})
    if parts.scheme not in SCHEMES or parts.fragment or unknown:
        what = f"query parameter '{unknown[0]}'" if unknown else "form"
        raise UsageError(f"Invalid NBD URI '{name}': unknown {what}")
    options: dict[str, Any] = {}
    if parts.path.removeprefix("/"):
        options["export"] = unquote(parts.path.removeprefix("/"))
    if parts.scheme.endswith("+unix"):
        if parts.netloc or "socket" not in query:
            raise UsageError(f"Invalid NBD URI '{name}': it takes ?socket=PATH and no host")
        options["server"] = {"type": "unix", "path": query["socket"][0]}
    else:
        if "socket" in query:
            raise UsageError(f"Invalid NBD URI '{name}': a socket is for nbd+unix")
        host = parts.hostname or "localhost"
        options["server"] = {"type": "inet", "host": host, "port": str(port or DEFAULT_PORT)}
    for key in ("tls-creds", "tls-hostname"):
        if key in query:
            options[key] = query[key][0]
    if parts.scheme.startswith("nbds") and "tls-creds" not in options:
        raise UsageError(f"NBD URI '{name}' asks for TLS: name the credentials with ?tls-creds=ID")
    return options


def _parse_old(name: str) -> dict[str, Any]:
    place, marked, export = name.removeprefix("nbd:").partition(_EXPORT_NAME)
    options: dict[str, Any] = {"export": export} if marked else {}
    if place.startswith("unix:"):
        options["server"] = {"type": "unix", "path": place.removeprefix("unix:")}
        return options
    host, colon, port = place.rpartition(":")
    if not colon or not port:
        raise UsageError(f"File name '{name}' names no port: write nbd:HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")
    options["server"] = {"type": "inet", "host": host or "localhost", "port": port}
    return options


def describe(server: object, export: str | None) -> str | None:
    """The URI of an export that is reached without further options, if it has one."""
    path = f"/{quote(export, safe='/')}" if export else ""
    if isinstance(server, UnixSocket) and not server.abstract:
        return f"nbd+unix://{path}?socket={quote(server.path, safe='/')}"
    if isinstance(server, InetSocket):
        host = f"[{server.host}]" if ":" in server.host else server.host
        return f"nbd://{host}:{server.port}{path}"
    assert not isinstance(server, VsockSocket) or server.cid
    return None
