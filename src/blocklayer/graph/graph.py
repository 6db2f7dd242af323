"""The graph: all nodes of one block layer, by name, and the edges between them.

1. Node names are unique; unnamed nodes get ``#blockN``.
2. Attaching checks permissions first: an edge that does not fit is never there (R7).
3. A node closes when its last parent goes and the graph does not hold it; its children follow.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import permission
from blocklayer.graph.child import Child, Role
from blocklayer.graph.gate import Budget, Policy, default_policy
from blocklayer.graph.objects import Objects
from blocklayer.graph.request import Epochs

if TYPE_CHECKING:
    from collections.abc import Callable

    from blocklayer.graph.events import Event
    from blocklayer.graph.node import Node
    from blocklayer.graph.registry import Registry
    from blocklayer.graph.root import Drain, Root

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9.\-_]{0,30}\Z")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9.\-_]*\Z")


def is_well_formed_id(text: str) -> bool:
    """Whether a job, an export or another object may have this id."""
    return _ID.match(text) is not None


class Graph:
    """Nodes and edges, and what they share: drivers, the policy, user objects, epochs."""

    def __init__(
        self, registry: Registry, policy: Policy | None = None, objects: Objects | None = None
    ) -> None:
        self.registry = registry
        self.policy = policy or default_policy()
        self.budget: Budget | None = None
        """What opening may still spend; set by ``graph.open`` while it opens."""
        self.objects = Objects() if objects is None else objects
        self.nodes: dict[str, Node] = {}
        self.roots: list[Root] = []
        self.epochs = Epochs()
        self.changes = asyncio.Lock()
        """Held by who changes edges at run time (``graph.edit``)."""
        self.drains: list[Drain] = []
        """Drained sections under way; owned by ``graph.root``."""
        self.listeners: list[Callable[[Event], None]] = []
        self._unnamed = 0

    def notify(self, event: Event) -> None:
        """Tell everybody who listens."""
        for listener in list(self.listeners):
            listener(event)

    def new_name(self, wanted: str | None) -> str:
        """``wanted`` if a node may have it, or a fresh name. Raises UsageError."""
        if wanted is None:
            self._unnamed += 1
            return f"#block{self._unnamed:03}"
        if not _NAME.match(wanted):
            raise UsageError(
                f"Invalid node-name: '{wanted}' (a letter, then letters, digits, '-', '.' or '_', "
                "31 at most)"
            )
        if wanted in self.nodes:
            raise UsageError(f"Duplicate nodes with node-name='{wanted}'")
        return wanted

    def find(self, name: str) -> Node:
        """The node ``name``. Raises UsageError if there is none."""
        node = self.nodes.get(name)
        if node is None:
            raise UsageError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def attach(self, parent: Node, name: str, node: Node, role: Role) -> Child:
        """Make ``node`` the child ``name`` of ``parent``. Raises LockedError if they do not fit."""
        edge = Child(name, parent, node, role)
        edge.taken, edge.shared = parent.driver.child_permissions(
            edge, *permission.cumulative(parent)
        )
        self.add_edge(edge)
        parent.children[name] = edge
        parent.mapping_changed()
        return edge

    def add_edge(self, edge: Child) -> None:
        """Enter ``edge`` at its child; it has its permissions already. Undone on error."""
        edge.node.parents.append(edge)
        try:
            permission.refresh(edge.node)
        except BaseException:
            edge.node.parents.remove(edge)
            raise

    async def detach(self, edge: Child) -> None:
        """Remove ``edge``; nodes that nobody uses any more are closed. Raises the first error
        met.
        """
        if edge.parent is not None:
            del edge.parent.children[edge.name]
            edge.parent.mapping_changed()
        edge.node.parents.remove(edge)
        await self.release(edge.node)

    async def release(self, node: Node) -> None:
        """Close ``node`` if nobody uses it, and what it alone used. Raises the first error met."""
        failure: BlockError | None = None
        pending = [node]
        while pending:
            unused = pending.pop()
            if self.nodes.get(unused.name) is not unused:
                continue
            if unused.parents or unused.held:
                permission.refresh(unused)
                continue
            try:
                await unused.driver.close()
            except BlockError as error:
                # The rest must be closed all the same: its locks and descriptors are real.
                failure = failure or error
            unused.runs.clear()
            for edge in list(unused.children.values()):
                del unused.children[edge.name]
                edge.node.parents.remove(edge)
                pending.append(edge.node)
            self.nodes.pop(unused.name, None)
        if failure is not None:
            raise failure
