"""What the tests of the storage drivers share: nodes with a user, and what may be asked of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from blocklayer.drivers import REGISTRY
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root

READ = Permission.CONSISTENT_READ
WRITE = READ | Permission.WRITE
RESIZE = WRITE | Permission.RESIZE


async def take(
    image: str | Path | Mapping[str, Any],
    *,
    format: str | None = None,
    taken: int = RESIZE,
    shared: int = Permission.ALL,
    **flags: Any,
) -> Root:
    """A user of ``image``, opened on a graph of its own; writable if it takes more than reads."""
    graph = Graph(REGISTRY)
    named = str(image) if isinstance(image, Path) else image
    wanted = Flags(**{"read_only": taken == READ, "discard_unmap": True, **flags})
    node = await open_image(graph, named, format=format, flags=wanted)
    try:
        return Root(node, "a test", taken, shared)
    except BaseException:
        await graph.release(node)
        raise


@asynccontextmanager
async def using(image: str | Path | Mapping[str, Any], **arguments: Any) -> AsyncIterator[Root]:
    """Like ``take``, for the length of a block."""
    root = await take(image, **arguments)
    try:
        yield root
    finally:
        await root.close()


def file(path: Path, **options: Any) -> dict[str, Any]:
    """Options of a ``file`` node, by itself."""
    return {"driver": "file", "filename": str(path), **options}
