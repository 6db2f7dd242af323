"""File names: what a name stands for, what a node is called, and where relative names start.

1. ``json:{…}`` holds options; ``scheme:…`` belongs to a protocol driver; ``file:`` is stripped;
   everything else is a path. A ``/`` before the first ``:`` makes it a path too.
2. A relative name found in an image starts from the folder of that image, not from the process's.
3. ``describe`` gives a plain name only where opening that name would give an equal node; otherwise
   a ``json:`` one.
"""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING, Any

from blocklayer.errors import UsageError
from blocklayer.graph.options import parse_json_name

if TYPE_CHECKING:
    from blocklayer.graph.node import Node
    from blocklayer.graph.registry import Registry


def scheme_of(name: str) -> str | None:
    """The protocol prefix of ``name``, or None for a path."""
    head, colon, _ = name.partition(":")
    return head if colon and head and "/" not in head else None


def protocol_options(name: str, registry: Registry) -> dict[str, Any]:
    """Options of the protocol node that plain ``name`` stands for (``json:`` is not plain)."""
    scheme = scheme_of(name)
    if scheme is None or scheme == "file":
        return path_options(name.removeprefix("file:"))
    driver_name = registry.scheme_driver(scheme)
    if driver_name is None:
        raise UsageError(f"Unknown protocol '{scheme}'")
    return {"driver": driver_name, **registry.load_protocol(driver_name).parse_filename(name)}


def path_options(path: str) -> dict[str, Any]:
    """Options of the protocol node for a path of this host."""
    return {"driver": "host_device" if _is_device(path) else "file", "filename": path}


def _is_device(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def image_options(name: str, registry: Registry, format: str | None = None) -> dict[str, Any]:
    """Options that an image ``name`` given by a user or an image stands for.

    Without ``format`` the result may lack ``driver``: the format is then probed.
    """
    if name.startswith("json:"):
        options = parse_json_name(name)
        if format is not None and options.setdefault("driver", format) != format:
            raise UsageError(f"Driver specified twice: '{format}' and '{options['driver']}'")
        return options
    storage = protocol_options(name, registry)
    if format is not None and registry.table.get(format) and registry.table[format].protocol:
        return {**storage, "driver": format}
    return {"file": storage} if format is None else {"driver": format, "file": storage}


def resolve_relative(image: str, name: str) -> str:
    """``name`` as found in ``image``, made relative to where ``image`` is."""
    if not name or name.startswith("/") or name.startswith("json:") or scheme_of(name):
        return name
    if image.startswith("json:"):
        raise UsageError(f"Cannot tell the folder of '{image}', to which '{name}' is relative")
    folder, slash, _ = image.rpartition("/")
    if not slash:
        scheme = scheme_of(image)
        return f"{scheme}:{name}" if scheme else name
    return f"{folder}/{name}"


def backing_name(image: str, below: Node) -> str:
    """What the image called ``image`` can call ``below``: its name, absolute where a relative one
    would be taken to start from another folder.
    """
    name = below.filename
    if name.startswith(("/", "json:")) or scheme_of(name):
        return name
    if not image.startswith("json:") and resolve_relative(image, name) == name:
        return name
    return os.path.abspath(name)


def storage_of(node: Node) -> Node:
    """The protocol node at the bottom of ``node``'s ``file`` children."""
    while "file" in node.children:
        node = node.children["file"].node
    return node


def describe(node: Node) -> str:
    """A name that opens an equal node: plain if there is one, else ``json:{…}``."""
    below = node
    if "file" in node.children and not node.overrides:
        # Formats on formats are not what a plain name opens.
        below = node.children["file"].node
    plain = getattr(below.driver, "filename", None) if not below.overrides else None
    if plain is not None:
        return str(plain)
    return "json:" + json.dumps(options_of(node))


def options_of(node: Node) -> dict[str, Any]:
    """Options that open an equal node, children included."""
    options: dict[str, Any] = {"driver": node.driver.NAME, **node.overrides}
    for name, edge in node.children.items():
        if name == "backing" and "backing" not in node.overrides:
            continue
        options[name] = options_of(edge.node)
    if "file" not in node.children:
        plain = getattr(node.driver, "filename", None)
        if plain is not None:
            options.setdefault("filename", plain)
    return options
