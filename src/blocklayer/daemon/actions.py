"""Actions: changes of the graph and its bitmaps that take effect at one instant, all or none.

A transaction is a list of them; a command on its own is a list of one. An action goes through

    prepare   while everything goes on: check, make and open files. May fail, may take its time.
    change    no request is in flight through any node of any action: take effect. May fail.
    commit    all have changed: what cannot fail, and does not wait.
    clean     users are in again: give back what was held, and what may come later.

1. Users see what was before all the changes, or what is after all of them.
2. When one fails, those that changed ``undo``, the last first, before anybody is let in again; then
   all ``abort``. Files, bitmaps and the graph are as before. ``clean`` follows in every case.
3. What an action works on is pinned in ``prepare``: nobody closes it meanwhile. What others may
   have changed since then is checked once more in ``change``.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph import edit
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.group import Group

if TYPE_CHECKING:
    from blocklayer.daemon.daemon import Daemon


class Options(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Base of what actions, and the commands of the same names, take."""


class Action(ABC):
    """One action with its options; subclasses do what they need to in each part."""

    NAME: ClassVar[str]
    Options: ClassVar[type[Options]]
    joins_group: ClassVar[bool] = False
    """Starts a job, which can share the fate of those of other actions (``group``)."""

    def __init__(self, daemon: Daemon, options: Any, group: Group | None = None) -> None:
        self.daemon = daemon
        self.options = options
        self.group = group
        """The group of all the transaction's jobs; None: each job is on its own."""
        self.nodes: list[Node] = []
        """What nobody may be inside of during ``change``."""
        self._pins: list[Root] = []

    def pin(self, node: Node) -> Node:
        """Keep ``node`` open until the end."""
        self._pins.append(
            Root(node, f"action '{self.NAME}'", Permission.NONE, Permission.ALL, follows=False)
        )
        return node

    async def prepare(self) -> None:
        """Check and make ready."""

    async def change(self) -> None:
        """Take effect; what was begun when it fails, ``undo`` takes back."""

    def commit(self) -> None:
        """All have taken effect."""

    async def undo(self) -> None:
        """Take back what ``change`` did, drained still."""

    async def abort(self) -> None:
        """Take back what ``prepare`` did."""

    async def clean(self) -> None:
        """The end, whatever came; called after all is decided, with users at work again."""

    async def unpin(self) -> None:
        """Let go of the nodes."""
        while self._pins:
            await self._pins.pop().close()


async def carry_out(daemon: Daemon, actions: Sequence[Action]) -> None:
    """All of ``actions``, or none of them. Raises what the first that failed raised."""
    begun: list[Action] = []
    try:
        await _take_effect(daemon, actions, begun)
    except BaseException as error:
        _add(error, await _each(action.abort for action in reversed(begun)))
        _add(error, await _finish(begun))
        raise
    failures = await _finish(begun)
    if failures:
        raise failures[0]


async def _take_effect(daemon: Daemon, actions: Sequence[Action], begun: list[Action]) -> None:
    """``begun`` is told of every action that was begun, also of the one that fails."""
    for action in actions:
        begun.append(action)
        await action.prepare()
    nodes = [node for action in actions for node in action.nodes]
    async with _alone(daemon, nodes):
        await _change(actions)


async def _finish(begun: Sequence[Action]) -> list[BlockError]:
    failures = await _each(action.clean for action in begun)
    return failures + await _each(action.unpin for action in begun)


@asynccontextmanager
async def _alone(daemon: Daemon, nodes: list[Node]) -> AsyncIterator[None]:
    if not nodes:
        # Drained of nothing would mean: of everything.
        async with daemon.graph.changes:
            yield
        return
    async with edit.changing(daemon.graph, *nodes):
        yield


async def _change(actions: Sequence[Action]) -> None:
    changed: list[Action] = []
    try:
        for action in actions:
            changed.append(action)
            await action.change()
    except BaseException as error:
        _add(error, await _each(action.undo for action in reversed(changed)))
        raise
    for action in actions:
        action.commit()


async def _each(parts: Iterable[Callable[[], Awaitable[None]]]) -> list[BlockError]:
    """Run all of them, whatever fails; the answer is what did."""
    failures = []
    for part in parts:
        try:
            await part()
        except BlockError as error:
            failures.append(error)
    return failures


def _add(error: BaseException, more: list[BlockError]) -> None:
    """Let ``error`` say what else went wrong while its effects were taken back."""
    if more:
        rest = "; ".join(map(str, more))
        error.args = (f"{error} (and not all could be taken back: {rest})",)
