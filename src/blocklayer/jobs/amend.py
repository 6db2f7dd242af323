"""Amend: an existing image's format changed, as a job; nobody is inside meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocklayer.graph.amend import amend
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.job import Job, to_its_end


class Amend(Job):
    """``values`` are named as in ``-o``."""

    TYPE = "amend"
    is_block_job = False

    def __init__(self, node: Node, values: Mapping[str, Any], **job: Any) -> None:
        super().__init__(node.graph, **job)
        self._root = Root(node, f"job '{self.id}'", Permission.NONE, follows=False)
        self._values = values

    async def run(self) -> None:
        """Change it. Cancelled, it is changed all the same: half is worse than all."""
        self.total = 1
        try:
            if self._values:
                await to_its_end(amend(self._root, self._values, lambda done, total: None))
        finally:
            self.done = 1

    async def clean(self) -> None:
        """Let go of the image."""
        await self._root.close()
