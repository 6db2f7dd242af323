"""What all exports have in common: an id, a hold on a node, and an end.

1. An export holds its node by a root that follows the graph: through snapshots, commits and pivots
   its clients stay where they are.
2. Other users are kept from nothing: several exports of a node, jobs and a resize go side by side.
3. ``close`` ends in two steps: first nobody is served any more, then the node is given back. Until
   it has returned, the id is in use.
"""

from __future__ import annotations

from typing import ClassVar

from blocklayer.errors import UsageError
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root


class Export:
    """A node served to somebody; a class of it is one way to serve."""

    TYPE: ClassVar[str]

    def __init__(
        self, identifier: str, node: Node, *, writable: bool = False, writethrough: bool = False
    ) -> None:
        """Raises UsageError or LockedError if the node cannot be used so."""
        if writable and node.read_only:
            raise UsageError("Cannot export read-only node as writable")
        taken = Permission.CONSISTENT_READ | (Permission.WRITE if writable else 0)
        self.id = identifier
        self.writable = writable
        self.shutting_down = False
        self.root = Root(node, f"export '{identifier}'", int(taken), write_through=writethrough)

    @property
    def node(self) -> Node:
        """What is served now."""
        return self.root.node

    @property
    def clients(self) -> int:
        """How many use it now."""
        raise AssertionError(type(self).__name__)

    async def close(self) -> None:
        """Serve nobody any more, and give the node back. Raises what storing its rest met."""
        self.shutting_down = True
        await self.root.close()
