"""NBD URIs as options of a node, and addresses of servers, the way QMP wants them."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from blocklayer.errors import UsageError

DEFAULT_PORT = "10809"


def nbd_options(uri: str) -> dict[str, Any]:
    """``blockdev-add`` options for ``nbd://host[:port]/export`` and ``nbd+unix:///export?socket=``.

    Raises UsageError.
    """
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"Invalid NBD URI '{uri}': {error}") from None
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        socket = parse_qs(parts.query).get("socket", [""])[0]
        if not socket:
            raise UsageError(f"Invalid NBD URI '{uri}': no ?socket=PATH")
        server = {"type": "unix", "path": socket}
    elif parts.scheme == "nbd" and parts.hostname:
        server = {"type": "inet", "host": parts.hostname, "port": str(port or DEFAULT_PORT)}
    else:
        raise UsageError(
            f"Invalid NBD URI '{uri}': use nbd://HOST[:PORT]/EXPORT or "
            "nbd+unix:///EXPORT?socket=PATH"
        )
    return {"driver": "nbd", "server": server, **({"export": export} if export else {})}


def server_address(text: str) -> dict[str, Any]:
    """The address that an NBD server listens on: ``unix:PATH``, or ``HOST:PORT``."""
    if text.startswith("unix:"):
        return {"type": "unix", "data": {"path": text.removeprefix("unix:")}}
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"Invalid address '{text}': use unix:PATH or HOST:PORT")
    return {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}


def export_uri(address: dict[str, Any] | None, name: str) -> str:
    """The URI under which ``name`` is served at ``address`` (None: not known to us)."""
    if address is None:
        return f"export '{name}' of the server that was running"
    data = address["data"]
    if address["type"] == "unix":
        return f"nbd+unix:///{quote(name)}?socket={quote(data['path'])}"
    host = f"[{data['host']}]" if ":" in data["host"] else data["host"]
    port = "" if data["port"] == DEFAULT_PORT else f":{data['port']}"
    return f"nbd://{host}{port}/{quote(name)}"
