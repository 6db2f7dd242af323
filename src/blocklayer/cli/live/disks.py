"""What the daemon's disks are: their names, and the layers below each.

1. A disk is known by the name of what uses it (a device, then an export), which stays the same when
   layers come and go; else by the node of its active layer.
2. Filters belong to nobody's chain: one looks through them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client, CommandFailed

FILTERS: Final = frozenset(
    (
        "blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress",
        "copy-before-write", "copy-on-read", "mirror_top", "preallocate", "throttle",
    )
)  # fmt: skip

_INDEXED = re.compile(r"(.*)\[(\d+)\]\Z")


class Layer(msgspec.Struct, frozen=True):
    """One image of a chain."""

    node: str
    driver: str
    filename: str
    size: int
    read_only: bool
    allocated: int
    physical: int
    bitmaps: list[dict[str, Any]]


class Disk(msgspec.Struct, frozen=True):
    """A disk in use: ``layers`` from the active one down."""

    name: str
    kind: str
    """device, export or node."""
    layers: list[Layer]

    @property
    def active(self) -> Layer:
        """The layer that the guest writes to."""
        return self.layers[0]

    def layer(self, text: str, option: str) -> int:
        """The depth of the layer that ``text`` names: a node, a file, or ``DISK[DEPTH]``."""
        index = _INDEXED.match(text)
        if index and index[1] == self.name:
            if int(index[2]) < len(self.layers):
                return int(index[2])
            raise UsageError(f"--{option}: '{self.name}' has {len(self.layers)} layers only")
        for depth, layer in enumerate(self.layers):
            if text == layer.node:
                return depth
        for depth, layer in enumerate(self.layers):
            if text == layer.filename or layer.filename.endswith(f"/{text}"):
                return depth
        raise UsageError(f"--{option}: '{text}' is no layer of '{self.name}'; {self.described()}")

    def described(self) -> str:
        """The chain in one line, from the active layer down."""
        chain = ", ".join(f"{layer.node} ({layer.filename})" for layer in self.layers)
        return f"its layers are, from the active one down: {chain}"


class Disks:
    """The daemon's disks as they were when asked for."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        graph: dict[str, Any],
        devices: list[dict[str, Any]],
        exports: list[dict[str, Any]],
    ) -> None:
        self._nodes = {node["node-name"]: node for node in nodes}
        names = {node["id"]: node["name"] for node in graph["nodes"] if _is_node(node)}
        self._children: dict[str, dict[str, str]] = {}
        self._parents: dict[str, list[tuple[str, str]]] = {}
        for edge in graph["edges"]:
            parent, child = names.get(edge["parent"]), names.get(edge["child"])
            if parent is not None and child is not None:
                self._children.setdefault(parent, {})[edge["name"]] = child
                self._parents.setdefault(child, []).append((parent, edge["name"]))
        self._fronts: dict[str, tuple[str, str]] = {}
        for export in exports:
            self._fronts[export["id"]] = ("export", export["node-name"])
        for device in devices:
            inserted = device.get("inserted")
            for name in (device.get("device"), device.get("qdev")):
                if inserted and name:
                    self._fronts[name] = ("device", inserted["node-name"])

    @classmethod
    async def ask(cls, client: Client) -> Disks:
        """The disks of the daemon behind ``client``."""
        return cls(
            await client.execute("query-named-block-nodes", {"flat": True}),
            await client.execute("x-debug-query-block-graph"),
            await _devices(client),
            await client.execute("query-block-exports"),
        )

    def __iter__(self) -> Iterator[Disk]:
        """Devices and exports, then the active layers that none of these use."""
        used = set()
        for name, (kind, node) in sorted(self._fronts.items(), key=_in_order):
            layers = self._chain(node)
            if layers and (kind, layers[0].node) not in used:
                used.add((kind, layers[0].node))
                yield Disk(name, kind, layers)
        fronted = {node for _, node in used}
        for name, info in sorted(self._nodes.items()):
            if name in fronted or info["drv"] in FILTERS or self._users(name):
                continue
            yield Disk(name, "node", self._chain(name))

    def find(self, name: str) -> Disk:
        """The disk called ``name``. Raises UsageError."""
        if name in self._fronts:
            kind, node = self._fronts[name]
            return Disk(name, kind, self._chain(node))
        if name not in self._nodes:
            known = ", ".join(disk.name for disk in self) or "none"
            raise UsageError(f"There is no disk '{name}' (disks: {known})")
        users = self._users(name)
        if users:
            parent, role = users[0]
            raise UsageError(
                f"Node '{name}' is not the active layer of a disk: it is the {role} of "
                f"'{parent}'. Name the disk by its active layer, or by its device or export"
            )
        return Disk(name, "node", self._chain(name))

    def has_node(self, name: str) -> bool:
        """Whether a node of that name exists."""
        return name in self._nodes

    def _users(self, name: str) -> list[tuple[str, str]]:
        """Nodes that use ``name``, seen through filters, and as what."""
        found: list[tuple[str, str]] = []
        for parent, role in self._parents.get(name, ()):
            if self._nodes.get(parent, {}).get("drv") in FILTERS:
                found += self._users(parent)
            elif role not in ("target", "data-file"):
                found.append((parent, role))
        return found

    def _chain(self, name: str | None) -> list[Layer]:
        layers: list[Layer] = []
        while name is not None and name in self._nodes:
            node, children = self._nodes[name], self._children.get(name, {})
            if node["drv"] in FILTERS:
                name = children.get("file") or children.get("backing")
                continue
            image, stored = node["image"], self._nodes.get(children.get("file", ""))
            layers.append(
                Layer(
                    node=name,
                    driver=node["drv"],
                    filename=node["file"],
                    size=image["virtual-size"],
                    read_only=node["ro"],
                    allocated=image.get("actual-size", 0),
                    physical=(stored or node)["image"]["virtual-size"],
                    bitmaps=node.get("dirty-bitmaps", []),
                )
            )
            name = children.get("backing")
        return layers


async def _devices(client: Client) -> list[dict[str, Any]]:
    try:
        return list(await client.execute("query-block"))
    except CommandFailed as error:
        if error.error_class != "CommandNotFound":
            raise
        # A daemon that has exports only.
        return []


def _in_order(front: tuple[str, tuple[str, str]]) -> tuple[str, str]:
    name, (kind, _) = front
    return kind, name


def _is_node(node: dict[str, Any]) -> bool:
    return bool(node["type"] == "block-driver")
