"""Edges of the graph: a parent's named use of a child node.

1. An edge is in ``node.parents`` of its child exactly while it is attached.
2. ``parent is None`` marks a root: a user from outside the graph (see ``root``).
3. A frozen edge leads where it leads until whoever froze it is done: no graph change moves it.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from blocklayer.graph.permission import Permission

if TYPE_CHECKING:
    from blocklayer.graph.node import Node


class Role(enum.Enum):
    """What a parent uses a child for; decides the options it inherits and its permissions."""

    STORAGE = "storage"
    """Holds the parent's metadata and data (``file`` of a format)."""
    DATA = "data"
    """Holds guest data only (``data-file``)."""
    BACKING = "backing"
    """Shows through where the parent has nothing."""
    FILTERED = "filtered"
    """The parent shows this child, filtered."""


class Child:
    """One edge: ``parent`` uses ``node`` as its child ``name``."""

    __slots__ = ("follows", "frozen", "name", "node", "parent", "role", "shared", "taken")

    def __init__(self, name: str, parent: Node | None, node: Node, role: Role) -> None:
        self.name = name
        self.parent = parent
        self.node = node
        self.role = role
        self.taken: int = Permission.NONE
        self.shared: int = Permission.ALL
        self.follows = True
        """Where another node takes the child's place (an overlay, a filter), it is used instead."""
        self.frozen = 0
        """How many jobs rely on the edge to stay."""

    @property
    def user(self) -> str:
        """Who uses the node, for messages."""
        return f"node '{self.parent.name}'" if self.parent else "a block device"
