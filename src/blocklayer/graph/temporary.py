"""Temporary overlays: what is written is thrown away with them.

1. The file's name is gone before anybody uses it, so nothing of it stays behind however the program
   ends.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from blocklayer.graph.create import create_image
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph


async def temporary_storage(graph: Graph, size: int) -> Node:
    """The storage of a new empty qcow2 image for ``size`` bytes of disk; nobody uses it yet."""
    file, path = tempfile.mkstemp(prefix="blk-", suffix=".qcow2")
    os.close(file)
    try:
        await create_image(graph, path, "qcow2", {}, size=size)
        return await open_options(
            graph,
            {"driver": "file", "filename": path},
            Flags(read_only=False, no_flush=True, discard_unmap=True),
        )
    finally:
        os.unlink(path)
