"""Making the data file of a new image.

Public:
    created_data_file(graph, target, options, size)   a context: the image is written inside

1. It is complete, and on stable storage, before the image is written.
2. One that did not exist before is removed again when it, or the image, cannot be finished.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.filename import path_options
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.create import Qcow2CreateOptions
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node


@asynccontextmanager
async def created_data_file(
    graph: Graph, target: Node, options: Qcow2CreateOptions, size: int
) -> AsyncIterator[None]:
    """Make the data file that ``options`` name, ``size`` bytes long, for the image ``target``."""
    assert options.data_file is not None
    path = options.data_file
    existed = os.path.lexists(path)
    if existed and os.path.exists(target.filename) and os.path.samefile(path, target.filename):
        raise UsageError(f"'{path}' cannot be both the image and its data file")
    try:
        await _create(graph, path, options, size)
        yield
    except BaseException:
        if not existed and os.path.lexists(path):
            os.unlink(path)
        raise


async def _create(graph: Graph, path: str, options: Qcow2CreateOptions, size: int) -> None:
    storage = path_options(path)
    protocol = graph.registry.load_protocol(storage["driver"])
    assert protocol.CreateOptions is not None
    await protocol.create(graph, path, protocol.CreateOptions(size=0))
    node = await open_options(graph, storage, Flags(read_only=False, discard_unmap=True))
    taken = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    try:
        root = Root(node, "image creation", taken, Permission.CONSISTENT_READ)
    except BaseException:
        await graph.release(node)
        raise
    try:
        await _fill(node, options, size)
        await io.flush(node)
    finally:
        await root.close()


async def _fill(node: Node, options: Qcow2CreateOptions, size: int) -> None:
    """Let the file be ``size`` bytes long, and read as zeros where the image will show it."""
    allocated = options.preallocation in ("falloc", "full")
    if node.size == 0:
        preallocation = str(options.preallocation) if allocated else "off"
        await io.truncate(node, size, preallocation=preallocation)
        return
    if node.size < size:
        raise UsageError(f"'{node.filename}' has {node.size} bytes, the disk needs {size}")
    if options.mapped:
        await io.write_zeroes(node, 0, size, unmap=not allocated)
