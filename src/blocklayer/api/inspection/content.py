"""What a disk begins with: read through the drivers, with everything that could reach out shut.

1. No other file is opened, nothing is guessed, and metadata is read within narrow limits.
"""

from __future__ import annotations

from blocklayer.codec.signatures import HEAD_SIZE
from blocklayer.drivers import REGISTRY
from blocklayer.graph import io
from blocklayer.graph.filename import protocol_options
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.units import MIB

_POLICY = Policy(references=False, probing=False, max_depth=1, max_memory=64 * MIB, max_time_s=10.0)


async def read_head(path: str, format: str) -> bytes:
    """The first bytes of the disk in the image ``path``. Raises BlockError.

    What is in a backing file reads as zeros; PolicyError where the disk needs another file.
    """
    graph = Graph(REGISTRY, _POLICY)
    image = {"driver": format, "file": protocol_options(f"file:{path}", REGISTRY)}
    node = await open_image(graph, image, flags=Flags(force_share=True), backing=False)
    try:
        return await io.read(node, 0, min(HEAD_SIZE, node.size))
    finally:
        await graph.release(node)
