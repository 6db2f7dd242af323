"""Commit of layers that no guest writes to: what they hold goes into the base, and the overlays
above them use the base from then on.

1. The base changes only where a layer above it holds something, or where all of them end before
   it: nobody who reads through those layers sees a difference, at any moment.
2. In the end, with nobody inside: the base is on stable storage, the header of each overlay names
   it, the graph follows. Each overlay's chain is complete before and after its header is written.
3. Nobody else may read the base or the layers meanwhile: alone, they show nothing of use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph import edit, io, reopen
from blocklayer.graph.child import Role
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.permission import Permission
from blocklayer.jobs.headers import BackingName, change_header, stored_reference
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.layers import LayerCopier, Sweep
from blocklayer.units import MIB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blocklayer.graph.driver import BackingReference
    from blocklayer.graph.extent import Run
    from blocklayer.graph.node import Node
    from blocklayer.graph.root import Root

_ZERO_STEP: Final = 16 * MIB


class LayerCommitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to commit."""

    name: BackingName = BackingName()
    on_error: OnError = "report"


class LayerCommit(Job):
    """The job. ``jobs.starting_layers`` puts its filter in place and makes its roots."""

    TYPE = "commit"

    def __init__(
        self,
        source: Root,
        base: Root,
        layers: Sequence[Root],
        filter_node: Node,
        options: LayerCommitOptions,
        was_read_only: bool,
        **job: Any,
    ) -> None:
        super().__init__(source.graph, **job)
        self.source = source
        self.base = base
        self.filter_node = filter_node
        self.options = options
        self._holds = layers
        self._was_read_only = was_read_only
        chain = source.node.chain()
        self._distance = chain.index(base.node)
        self._busy = [filter_node, *overlays_of(filter_node), *chain[: self._distance + 1]]
        for node in self._busy:
            node.busy = f"block device is in use by block job: {self.TYPE}"
        self._thaw = edit.freeze(layer.children["backing"] for layer in chain[: self._distance])
        self._copier = LayerCopier(source, base, self._is_wanted)
        self._moved: edit.Change | None = None
        self._headers: list[tuple[Node, BackingReference | None]] = []
        """The overlays whose headers were written, and what they said before."""

    def _is_wanted(self, run: Run) -> bool:
        # Nothing present, and yet the base was not asked: a layer between ends before this run.
        return run.depth < self._distance

    async def run(self) -> None:
        """Copy everything."""
        base, source = self.base.node, self.source.node
        size = base.size
        if size < source.size:
            await self.base.truncate(source.size)
        await Sweep(self, self._copier, self.options.on_error, tries_again=True).run()
        longest = max((node.size for node in overlays_of(self.filter_node)), default=0)
        at, end = source.size, min(size, longest)
        while at < end:
            # Overlays saw zeros past the end of the layers: not what the base holds there.
            async with self.step(), self.base.request():
                length = min(end - at, _ZERO_STEP)
                await io.write_zeroes(base, at, length, unmap=True)
                at += length

    async def prepare(self) -> None:
        """Let the overlays use the base from now on."""
        base = self.base.node
        async with edit.changing(self.graph):
            await io.flush(base)
            overlays = list(overlays_of(self.filter_node))
            self._thaw()
            with edit.Change() as change:
                change.permit(self.base, Permission.NONE, Permission.ALL)
                edit.replace(change, self.filter_node, base)
            self._moved = change
            try:
                for node in overlays:
                    before = stored_reference(node)
                    async with writable(node):
                        self._headers.append((node, before))
                        await change_header(node, self.options.name.reference(node, base))
            except BlockError as error:
                try:
                    await self._take_back()
                except BlockError as second:
                    raise error.reworded(f"{error} (and taking it back: {second})") from second
                raise

    async def _take_back(self) -> None:
        if self._moved is None:
            return
        self._moved.undo()
        self._moved = None
        failure: BlockError | None = None
        while self._headers:
            node, before = self._headers.pop()
            try:
                async with writable(node):
                    await change_header(node, before)
            except BlockError as error:
                # Its header names the base, or the layers: the disk reads the same with both.
                failure = failure or error
        if failure is not None:
            raise failure

    async def abort(self) -> None:
        """Another job of the group failed, or this one: the chains are what they were."""
        async with edit.changing(self.graph):
            await self._take_back()

    async def clean(self) -> None:
        """Take the filter out, and let go of the layers."""
        base = self.base.node
        self._thaw()
        for node in self._busy:
            node.busy = None
        self._copier.close()
        for layer in self.source.node.chain()[: self._distance]:
            layer.given_up = self._moved is not None
        if self._moved is None:
            async with edit.changing(self.graph):
                with edit.Change() as change:
                    for root in (*self._holds, self.base):
                        change.permit(root, Permission.NONE, Permission.ALL)
                    edit.replace(change, self.filter_node, self.source.node)
        held, base.held = base.held, True
        try:
            for root in (*self._holds, self.source, self.base):
                await root.close()
            await self.graph.release(self.filter_node)
            async with edit.changing(self.graph):
                await reopen.set_read_only(base, self._was_read_only)
        finally:
            base.held = held
            await self.graph.release(base)


def overlays_of(node: Node) -> Iterator[Node]:
    """The images that ``node`` shows through, directly or by way of filters above it."""
    pending = [node]
    while pending:
        for edge in pending.pop().parents:
            if edge.role is Role.BACKING and edge.parent is not None:
                yield edge.parent
            elif edge.parent is not None and isinstance(edge.parent.driver, FilterDriver):
                pending.append(edge.parent)


@asynccontextmanager
async def writable(node: Node) -> AsyncIterator[None]:
    """For the time of the block ``node`` takes writes; drained."""
    was_read_only = node.flags.read_only
    await reopen.set_read_only(node, False)
    try:
        yield
    finally:
        try:
            await reopen.set_read_only(node, was_read_only)
        except BlockError as error:
            # What was to be done is done; that it could be written to by mistake must not hinder.
            node.poison(f"it could not be made read-only again ({error})")
