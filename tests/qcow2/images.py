"""Opening qcow2 images in tests: a graph with one root on it, as every outside user has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from blocklayer.drivers import REGISTRY
from blocklayer.drivers.qcow2.driver import Qcow2Driver
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root

T = TypeVar("T")


@asynccontextmanager
async def opened(
    image: Path | dict[str, Any], *, read_only: bool = False, **options: Any
) -> AsyncIterator[Root]:
    """A root on ``image`` with options of the qcow2 node (``l2_cache_size=…``)."""
    source = {name.replace("_", "-"): value for name, value in options.items()}
    if isinstance(image, Path):
        source |= {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    else:
        source |= image
    flags = Flags(read_only=read_only, discard_unmap=True)
    node = await open_image(Graph(REGISTRY), source, flags=flags)
    taken = Permission.CONSISTENT_READ
    if not read_only:
        taken |= Permission.WRITE | Permission.RESIZE
    root = Root(node, "test", taken=taken)
    try:
        yield root
    finally:
        await root.close()


def driver_of(root: Root) -> Qcow2Driver:
    """The qcow2 driver under ``root``."""
    driver = root.node.driver
    assert isinstance(driver, Qcow2Driver)
    return driver


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine on a loop of its own."""
    return asyncio.run(coroutine)
