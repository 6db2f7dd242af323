"""``blockdev-set-active``: a disk is handed from one process to another, which has it open already.

1. An inactive node is as on disk: all it held back is stored, it holds no locks, and it refuses
   writes. Activating it reads the image anew.
2. What is below an active node is active; so a node is deactivated with its children, as far as no
   active node uses them, and is activated with all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph import edit
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.reopen import Reopen, reopen

_CHANGES = int(Permission.WRITE | Permission.RESIZE)


async def set_active(daemon: Daemon, name: str | None, active: bool) -> None:
    """Activate the node ``name`` (None: all nodes), or let another process have it."""
    if name is None:
        nodes = list(daemon.graph.nodes.values())
    else:
        node = daemon.graph.nodes.get(name)
        if node is None:
            raise UsageError(f"Failed to find node with node-name='{name}'")
        nodes = [node]
    async with edit.changing(daemon.graph, *nodes):
        if active:
            chosen = _below(nodes)
        else:
            chosen = _unused(nodes)
            _check(chosen, "all nodes" if name is None else "node")
        await reopen(
            [
                Reopen(
                    node, msgspec.structs.replace(node.wanted, inactive=not active), node.options
                )
                for node in chosen
                if node.active != active
            ]
        )


def _below(nodes: Iterable[Node]) -> list[Node]:
    found: dict[Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += [edge.node for edge in node.children.values()]
    return list(found)


def _unused(nodes: list[Node]) -> list[Node]:
    """``nodes`` and those below them that no other active node uses. Raises LockedError."""
    chosen = set(_below(nodes))

    def is_used(node: Node) -> bool:
        above = [edge.parent for edge in node.parents if edge.parent is not None]
        return any(parent.active and parent not in chosen for parent in above)

    if any(map(is_used, nodes)):
        raise LockedError("Node has active parent node")
    pending = list(chosen)
    while pending:
        node = pending.pop()
        if node in chosen and is_used(node):
            chosen.remove(node)
            pending += [edge.node for edge in node.children.values()]
    return [node for node in _below(nodes) if node in chosen]


def _check(nodes: Iterable[Node], what: str) -> None:
    for node in nodes:
        if node.busy or any(e.parent is None and e.taken & _CHANGES for e in node.parents):
            raise LockedError(f"Failed to inactivate {what}: Operation not permitted")
