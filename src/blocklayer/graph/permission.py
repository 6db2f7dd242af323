"""Permissions: what each user of a node does to it, and what it lets others do.

1. A parent *takes* permissions on a child and *shares* those it lets other parents take. Two
   parents fit together when neither takes what the other does not share.
2. The numbers are QEMU's, since the file driver shows them to other processes as lock bytes.
3. An update is computed and checked for every affected node before any of it takes effect, and
   undone as a whole if one driver refuses (R7).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from blocklayer.errors import LockedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blocklayer.graph.child import Child
    from blocklayer.graph.node import Node


class Permission(enum.IntFlag):
    """What a parent may do to a child. Bit numbers are those of the lock bytes."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


NAMES: Final = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}


def names(permissions: int) -> str:
    """``permissions`` as people read them: "write, resize"."""
    return ", ".join(name for flag, name in NAMES.items() if permissions & flag)


def cumulative(node: Node) -> tuple[int, int]:
    """What all of ``node``'s parents together take of it, and what all of them share."""
    taken, shared = 0, int(Permission.ALL)
    for edge in node.parents:
        taken |= edge.taken
        shared &= edge.shared
    return taken, shared


def refresh(*changed: Node) -> None:
    """Recompute permissions from ``changed`` down, after parent edges of these nodes changed.

    Raises LockedError (nothing changed) when two users of a node do not fit together or another
    process holds the file.
    """
    before: dict[Child, tuple[int, int]] = {}
    applied: list[tuple[Node, int, int]] = []
    try:
        affected = _propagate(changed, before)
        for node in affected:
            check_conflicts(node)
        for node in affected:
            taken, shared = cumulative(node)
            if (taken, shared) != (node.taken, node.shared):
                previous = (node, node.taken, node.shared)
                node.driver.apply_permissions(taken, shared)
                node.taken, node.shared = taken, shared
                applied.append(previous)
    except BaseException:
        for edge, (taken, shared) in before.items():
            edge.taken, edge.shared = taken, shared
        for node, taken, shared in reversed(applied):
            node.driver.apply_permissions(taken, shared)
            node.taken, node.shared = taken, shared
        raise


def _propagate(changed: Iterable[Node], before: dict[Child, tuple[int, int]]) -> list[Node]:
    """Recompute all edges below ``changed``; the answer is the nodes whose users changed.

    Conflicts are judged afterwards: with edges half recomputed there may be some that pass.
    """
    # Iterative: chains of hundreds of layers must not meet the interpreter's recursion limit.
    pending = list(changed)
    affected: dict[Node, None] = {}
    while pending:
        node = pending.pop()
        affected[node] = None
        taken, shared = cumulative(node)
        for edge in node.children.values():
            wanted = node.driver.child_permissions(edge, taken, shared)
            if wanted != (edge.taken, edge.shared):
                before.setdefault(edge, (edge.taken, edge.shared))
                edge.taken, edge.shared = wanted
                pending.append(edge.node)
    return list(affected)


def check_conflicts(node: Node) -> None:
    """Raise LockedError if ``node``'s parents do not fit together or cannot have their way."""
    for one in node.parents:
        if not node.active:
            _check_at_rest(node, one)
        if one.taken & (Permission.WRITE | Permission.RESIZE) and node.flags.read_only:
            raise LockedError(f"Block node '{node.name}' is read-only")
        for other in node.parents:
            conflict = one.taken & ~other.shared
            if one is not other and conflict:
                raise LockedError(
                    f"Conflicts with use by {other.user} as '{other.name}', which does not allow "
                    f"'{names(conflict)}' on {node.name}"
                )


def _check_at_rest(node: Node, edge: Child) -> None:
    """Raise LockedError if ``edge`` uses ``node`` for more than an inactive node is good for."""
    if edge.parent is not None and edge.parent.active:
        raise LockedError(
            f"Inactive '{node.name}' can't be a {edge.name} child of active '{edge.parent.name}'"
        )
    for flag in (Permission.RESIZE, Permission.WRITE):
        if edge.taken & flag:
            raise LockedError(f"Permission '{NAMES[flag]}' unavailable on inactive node")
