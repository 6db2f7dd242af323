"""Commit of the active layer: a mirror whose target is a node of the source's own chain.

1. What the layers above the base hold is copied into it, and so is what is written meanwhile. The
   base is read by those layers only where they hold nothing, and is not changed there.
2. In the end users move to the base, and the layers above are given up; or, ended without that,
   everybody stays, and the base is read-only again if it was before.
"""

from __future__ import annotations

from typing import Any

from blocklayer.graph import edit, reopen
from blocklayer.graph.node import Node
from blocklayer.graph.root import Root
from blocklayer.jobs.mirror import Mirror, MirrorOptions


class ActiveCommit(Mirror):
    """The job. ``jobs.starting`` puts its filter in place and makes its roots."""

    TYPE = "commit"

    def __init__(
        self,
        source: Root,
        target: Root,
        filter_node: Node,
        options: MirrorOptions,
        was_read_only: bool,
        **job: Any,
    ) -> None:
        super().__init__(source, target, filter_node, options, **job)
        self._was_read_only = was_read_only
        layers = source.node.chain()
        self._layers = layers[: layers.index(target.node) + 1]
        for layer in self._layers:
            layer.busy = f"block device is in use by block job: {self.TYPE}"
        self._thaw = edit.freeze(layer.children["backing"] for layer in self._layers[:-1])

    async def run(self) -> None:
        """Make the base large enough, and go on as a mirror does."""
        if self.target.node.size < self.source.node.size:
            await self.target.truncate(self.source.node.size)
        await super().run()

    async def clean(self) -> None:
        """Let go of the chain."""
        self._thaw()
        for layer in self._layers:
            layer.busy = None
        for layer in self._layers[:-1]:
            layer.given_up = self._pivoted is not None
        base = self.target.node
        await super().clean()
        if self._pivoted is None and base.graph.nodes.get(base.name) is base:
            async with edit.changing(base.graph):
                await reopen.set_read_only(base, self._was_read_only)
