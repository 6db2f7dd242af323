"""Stream: what the layers below a node hold is copied into it, until it needs them no more.

1. A ``copy-on-read`` filter above the node keeps the copying and a guest's writes apart. What the
   node shows never changes, so the job can end at any moment, and begin again.
2. In the end, with nobody inside: what was copied is on stable storage, the header names the new
   backing file, the graph follows. Before the header is written the old chain is complete, and
   afterwards the new one is.
3. Layers that were given up are released; nothing is written to them, ever.
"""

from __future__ import annotations

from typing import Any

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph import edit, io, reopen
from blocklayer.graph.extent import Kind, Run
from blocklayer.graph.node import Node
from blocklayer.graph.root import Root
from blocklayer.jobs.headers import BackingName, change_header, stored_reference
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.layers import LayerCopier, Sweep


class StreamOptions(msgspec.Struct, kw_only=True):
    """How to stream."""

    lowest: Node
    """The lowest layer that is to be given up; the node itself: none is."""
    name: BackingName = BackingName()
    on_error: OnError = "report"


class Stream(Job):
    """The job. ``jobs.starting_layers`` puts its filter in place and makes its root."""

    TYPE = "stream"

    def __init__(
        self,
        top: Root,
        filter_node: Node,
        options: StreamOptions,
        was_read_only: bool,
        **job: Any,
    ) -> None:
        super().__init__(top.graph, **job)
        self.top = top
        self.filter_node = filter_node
        self.options = options
        self._was_read_only = was_read_only
        chain = top.node.chain()
        self._depth = chain.index(options.lowest)
        self._layers = chain[: self._depth + 1]
        for layer in (filter_node, *self._layers):
            layer.busy = f"block device is in use by block job: {self.TYPE}"
        self._thaw = edit.freeze(layer.children["backing"] for layer in self._layers[:-1])
        nothing_below = self._base is None
        self._copier = LayerCopier(
            top, top, self._is_wanted, zeros_known=nothing_below, look_for_zeros=False
        )
        # The filter's own: they keep the guest's requests out of what is being copied.
        self._copier.claims = filter_node.claims
        self._moved: edit.Change | None = None
        self._header = stored_reference(top.node)
        self._given_up: Node | None = None

    @property
    def _base(self) -> Node | None:
        """What the node will show where nothing was copied."""
        return self.options.lowest.backing

    def _is_wanted(self, run: Run) -> bool:
        base = self._base
        if run.depth > self._depth:
            return False
        if not run.present:
            # A layer that ends before this hides the base; then nothing else may show it.
            return base is not None and run.offset < base.size
        return run.depth > 0 and (run.kind is not Kind.ZERO or base is not None)

    async def run(self) -> None:
        """Copy everything."""
        if self._depth:
            sweep = Sweep(self, self._copier, self.options.on_error, tries_again=False)
            await sweep.run()

    async def prepare(self) -> None:
        """Let the node use the base from now on."""
        node = self.top.node
        below = node.backing
        if below is None:
            return
        async with edit.changing(self.graph):
            await io.flush(node)
            base = self._base
            self._thaw()
            self._moved = edit.set_backing(node, base)
            try:
                await change_header(node, self.options.name.reference(node, base))
            except BaseException:
                self._moved.undo()
                self._moved = None
                raise
            if base is not below:
                self._given_up = below

    async def abort(self) -> None:
        """Another job of the group failed, or this one: the chain is what it was."""
        if self._moved is None:
            return
        async with edit.changing(self.graph):
            self._moved.undo()
            self._moved = self._given_up = None
            await change_header(self.top.node, self._header)

    async def clean(self) -> None:
        """Take the filter out, and let go of the layers."""
        node = self.top.node
        self._thaw()
        for layer in (self.filter_node, *self._layers):
            layer.busy = None
        failure: BlockError | None = None
        async with edit.changing(self.graph):
            edit.drop_filter(self.filter_node)
            if self._was_read_only:
                try:
                    await reopen.set_read_only(node, True)
                except BlockError as error:
                    failure = error
        self._copier.close()
        await self.graph.release(self.filter_node)
        if self._given_up is not None:
            await self.graph.release(self._given_up)
        await self.top.close()
        if failure is not None:
            raise failure
