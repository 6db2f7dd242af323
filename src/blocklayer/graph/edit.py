"""Graph changes at run time: where edges lead, changed for several of them at once.

1. A change happens with nobody inside (``changing``), one at a time, and without any ``await``:
   nobody ever sees half of it.
2. All edges of a change move, or none: permissions decide, and a refusal leaves the graph as it
   was (R7). A frozen edge does not move.
3. A change can be undone as long as no later one was made: transactions need that.
4. Nodes that lost their last user are not closed here: ``Graph.release`` them when it is final.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from blocklayer.errors import LockedError, UsageError
from blocklayer.graph import permission
from blocklayer.graph.child import Child, Role
from blocklayer.graph.root import drained

if TYPE_CHECKING:
    from types import TracebackType

    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node


@asynccontextmanager
async def changing(graph: Graph, *nodes: Node) -> AsyncIterator[None]:
    """Nobody else changes the graph, and no request is in flight through ``nodes`` (or any)."""
    async with graph.changes, drained(graph, *nodes):
        yield


class Change:
    """Edges changed together: ``with Change() as change: change.move(…)``.

    Leaving the block makes it true, or raises LockedError with the graph as it was before.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._touched: dict[Node, None] = {}

    def __enter__(self) -> Change:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._take_back()
            return
        try:
            permission.refresh(*self._touched)
        except BaseException:
            self._take_back()
            raise
        self._announce()

    def undo(self) -> None:
        """Take the change back. The old users had their permissions before, so they fit."""
        self._take_back()
        permission.refresh(*self._touched)
        self._announce()

    def move(self, edge: Child, node: Node) -> None:
        """Let ``edge`` lead to ``node``."""
        old = edge.node
        if node is old:
            return
        _check_thawed(edge)
        if edge.parent is not None and reaches(node, edge.parent):
            raise _cycle(node, edge.name, edge.parent)
        place = old.parents.index(edge)
        del old.parents[place]
        node.parents.append(edge)
        edge.node = node

        def back() -> None:
            node.parents.remove(edge)
            old.parents.insert(place, edge)
            edge.node = old

        self._note(back, edge, old, node)

    def attach(self, parent: Node, name: str, node: Node, role: Role) -> Child:
        """Make ``node`` the child ``name`` of ``parent``, which has none of that name."""
        assert name not in parent.children
        if reaches(node, parent):
            raise _cycle(node, name, parent)
        edge = Child(name, parent, node, role)
        node.parents.append(edge)
        parent.children[name] = edge

        def back() -> None:
            node.parents.remove(edge)
            del parent.children[name]

        self._note(back, edge, node)
        return edge

    def detach(self, edge: Child) -> None:
        """Remove ``edge``, which has a parent."""
        _check_thawed(edge)
        parent, node = edge.parent, edge.node
        assert parent is not None
        place = node.parents.index(edge)
        del node.parents[place]
        del parent.children[edge.name]

        def back() -> None:
            node.parents.insert(place, edge)
            parent.children[edge.name] = edge

        self._note(back, edge, node)

    def permit(self, root: Child, taken: int, shared: int) -> None:
        """Let ``root``, which has no parent node, take and share something else from now on."""
        assert root.parent is None
        before = root.taken, root.shared
        root.taken, root.shared = taken, shared

        def back() -> None:
            root.taken, root.shared = before

        self._note(back, root, root.node)

    def _note(self, back: Callable[[], None], edge: Child, *nodes: Node) -> None:
        self._undo.append(back)
        self._touched.update(dict.fromkeys(nodes))
        if edge.parent is not None:
            self._touched[edge.parent] = None

    def _take_back(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _announce(self) -> None:
        for node in self._touched:
            node.mapping_changed()


def _cycle(node: Node, name: str, parent: Node) -> UsageError:
    return UsageError(
        f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle"
    )


def _check_thawed(edge: Child) -> None:
    if edge.frozen:
        user = f" from '{edge.parent.name}'" if edge.parent is not None else ""
        raise LockedError(f"Cannot change frozen '{edge.name}' link{user} to '{edge.node.name}'")


def reaches(node: Node, wanted: Node) -> bool:
    """Whether ``wanted`` is ``node`` or lies anywhere below it."""
    seen, pending = {node}, [node]
    while pending:
        at = pending.pop()
        if at is wanted:
            return True
        below = {edge.node for edge in at.children.values()} - seen
        seen |= below
        pending += below
    return False


def replace(change: Change, old: Node, new: Node) -> None:
    """Let all who use ``old``, and follow, use ``new``; not those that ``new`` itself needs."""
    for edge in list(old.parents):
        if edge.follows and not (edge.parent is not None and reaches(new, edge.parent)):
            change.move(edge, new)


def append(base: Node, overlay: Node) -> Change:
    """Put ``overlay`` above ``base``: its backing node from now on. Call it drained."""
    if overlay.backing is not None:
        raise UsageError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise UsageError("The overlay does not support backing images")
    if any(edge.follows for edge in overlay.parents):
        raise UsageError("The overlay is already in use")
    with Change() as change:
        change.attach(overlay, "backing", base, Role.BACKING)
        replace(change, base, overlay)
    return change


def insert_above(node: Node, filter_node: Node) -> Change:
    """Let all users of ``node`` use ``filter_node``, whose child it is already."""
    with Change() as change:
        replace(change, node, filter_node)
    return change


def drop_filter(filter_node: Node) -> Change:
    """Let all users of ``filter_node`` use what it shows. The filter is left without users."""
    with Change() as change:
        replace(change, filter_node, filter_node.children["file"].node)
    filter_node.given_up = True
    return change


def set_backing(overlay: Node, below: Node | None) -> Change:
    """Let ``below`` show through ``overlay`` from now on; only the graph is changed."""
    with Change() as change:
        set_child(change, overlay, "backing", below)
    return change


def set_child(change: Change, parent: Node, name: str, node: Node | None) -> None:
    """Let the child ``name`` of ``parent`` be ``node``, or let there be none."""
    edge = parent.children.get(name)
    if node is None:
        if edge is not None:
            change.detach(edge)
    elif edge is not None:
        change.move(edge, node)
    else:
        change.attach(parent, name, node, Role.BACKING if name == "backing" else Role.STORAGE)


def freeze(edges: Iterable[Child]) -> Callable[[], None]:
    """Keep ``edges`` where they are; the answer thaws them."""
    held = list(edges)
    for edge in held:
        edge.frozen += 1

    def thaw() -> None:
        while held:
            held.pop().frozen -= 1

    return thaw
