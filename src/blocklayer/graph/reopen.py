"""Reopening: other options for nodes that stay where they are in the graph.

A node keeps its name, its users and its children; its driver is closed, which writes everything
back, and opened anew. So whatever a driver does on opening and closing (bitmaps, dirty bits, logs)
is right for reopening too.

1. Call it with nobody inside (``graph.edit.changing``).
2. Parents close before their children change, and open after them. Storage is opened anew before
   the old file is given up, and its locks pass over without a gap.
3. On an error every node is again what it was, and the error says which one refused. One that
   cannot even be that takes no more writes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from blocklayer.errors import BlockError, LockedError
from blocklayer.graph import edit, permission
from blocklayer.graph.child import Role
from blocklayer.graph.driver import ProtocolDriver

if TYPE_CHECKING:
    from blocklayer.graph.node import Flags, Node
    from blocklayer.graph.options import NodeOptions


class Reopen(msgspec.Struct):
    """What one node is to be from now on."""

    node: Node
    flags: Flags
    options: NodeOptions
    children: dict[str, Node | None] = {}
    """Where edges lead from now on, by name; None: there is none. Others stay as they are."""


async def reopen(wanted: Sequence[Reopen], *, settled: Collection[Node] = ()) -> None:
    """Carry all of ``wanted`` out, or none. Nodes are named once, in any order.

    The drivers of nodes in ``settled`` need not be closed and opened for that (``Driver.retire``).
    """
    before = [_as_it_is(each) for each in wanted]
    storage = {each.node for each in wanted if isinstance(each.node.driver, ProtocolDriver)}
    formats = {each.node for each in wanted} - storage
    is_open, old_storage = set(formats), set(storage)
    try:
        await _carry_out(wanted, is_open, old_storage, settled)
    except BaseException:
        try:
            await _carry_out(before, is_open, storage - old_storage)
        except BlockError as error:
            for each in before:
                each.node.poison(f"it could not be reopened as it was ({error})")
        raise
    for each in before:
        for child in each.children.values():
            if child is not None:
                await child.graph.release(child)


def _as_it_is(wanted: Reopen) -> Reopen:
    node = wanted.node
    now = {name: edge.node for name, edge in node.children.items()}
    return Reopen(
        node, node.wanted, node.options, {name: now.get(name) for name in wanted.children}
    )


async def set_read_only(node: Node, read_only: bool) -> None:
    """Let ``node`` and the storage below it refuse writes, or take them again."""
    await reopen(list(_with_storage(node, read_only)))


async def retire(node: Node) -> None:
    """Let ``node``, which nobody writes to any more, and its storage refuse writes; what is in its
    caches stays there, if its driver can do so. Raises LockedError if somebody does write.
    """
    if node.taken & (permission.Permission.WRITE | permission.Permission.RESIZE):
        raise LockedError(f"Node '{node.name}' is written to: it cannot be read-only")
    wanted = list(_with_storage(node, True))
    settled = [each.node for each in wanted if await each.node.driver.retire()]
    await reopen(wanted, settled=settled)


def _with_storage(node: Node, read_only: bool) -> Iterator[Reopen]:
    """``node`` and what inherits from it. Its storage stays read-only if it was opened so."""
    if node.wanted.read_only == read_only:
        return
    yield Reopen(node, msgspec.structs.replace(node.wanted, read_only=read_only), node.options)
    for edge in node.children.values():
        given = edge.node.options.read_only
        follows = given is msgspec.UNSET or edge.node.flags.auto_read_only
        # Storage that somebody else writes as well keeps taking writes.
        shared = read_only and any(
            other.parent is not node and other.taken & permission.Permission.WRITE
            for other in edge.node.parents
        )
        if edge.role is not Role.BACKING and follows and not shared:
            yield from _with_storage(edge.node, read_only)


async def _carry_out(
    wanted: Sequence[Reopen],
    is_open: set[Node],
    to_replace: set[Node],
    settled: Collection[Node] = (),
) -> None:
    """``is_open`` says which of the formats' drivers are, ``to_replace`` which storage is to be
    opened anew; both are kept up to date.
    """
    ordered = _parents_first(wanted)
    for each in ordered:
        if each.node in is_open and each.node not in settled:
            await each.node.driver.close()
            is_open.discard(each.node)
    for each in ordered:
        each.node.set_flags(each.flags)
        each.node.options = each.options
    for each in reversed(ordered):
        if each.node in to_replace:
            await _replace_storage(each.node)
            to_replace.discard(each.node)
    with edit.Change() as change:
        for each in ordered:
            for name, child in each.children.items():
                edit.set_child(change, each.node, name, child)
    permission.refresh(*(each.node for each in ordered))
    for each in reversed(ordered):
        if not isinstance(each.node.driver, ProtocolDriver) and each.node not in is_open:
            await _open_again(each.node)
            is_open.add(each.node)
        each.node.mapping_changed()


async def _open_again(node: Node) -> None:
    """A new driver for ``node``; its children are attached still, and opening finds them there."""
    children, old, overrides = set(node.children), node.driver, node.overrides
    node.overrides = {}
    node.driver = type(old)(node)
    try:
        await node.driver.open()
    except BaseException:
        # Closed as it is, it can still be read, and closed once more.
        node.driver, node.overrides = old, overrides
        for name in node.children.keys() - children:
            await node.graph.detach(node.children[name])
        raise


async def _replace_storage(node: Node) -> None:
    old = node.driver
    assert isinstance(old, ProtocolDriver)
    new = type(old)(node)
    await new.open()
    try:
        new.take_over(old)
    except BaseException:
        await new.close()
        raise
    node.driver = new
    await old.close()


def _parents_first(wanted: Sequence[Reopen]) -> list[Reopen]:
    by_node = {each.node: each for each in wanted}
    ordered: list[Reopen] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        seen.add(node)
        for edge in node.parents:
            if edge.parent in by_node and edge.parent not in seen:
                visit(edge.parent)
        ordered.append(by_node[node])

    for node in by_node:
        if node not in seen:
            visit(node)
    return ordered
