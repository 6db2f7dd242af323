"""Commit: what the layers above a base hold, written into the base.

1. Only what those layers hold is copied, zeros as zeros; the rest of the base stays as it is.
2. The layers above are emptied, if at all, only after the base is on stable storage: interrupted at
   any moment, the top reads as before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.node import Node
from blocklayer.graph.root import Root, drained
from blocklayer.jobs.copying import Copier, CopyOptions
from blocklayer.jobs.plan import Piece, piece_of, source_runs


async def commit(
    top: Root,
    base: Root,
    options: CopyOptions,
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write what the layers from ``top`` down to above ``base`` hold into ``base``.

    ``base`` grows to the size of ``top`` if it is smaller. Then it is flushed. The answer is how
    many bytes those layers held.
    """
    if base.node.size < top.node.size:
        await base.truncate(top.node.size)
    copier = Copier(base, options, progress)
    await copier.copy(_held_above(top, base.node))
    await base.flush()
    return copier.done


async def _held_above(top: Root, base: Node) -> AsyncIterator[Piece]:
    distance = top.node.chain().index(base)
    async for run, generation in source_runs(top, 0, top.node.size):
        # Nothing present, and yet the base was not asked: a layer between ends before this run.
        if run.depth < distance:
            yield piece_of(run, generation, top)


async def empty(top: Root) -> None:
    """Drop what the layer of ``top`` itself holds; what is below must read the same."""
    driver = top.node.driver
    assert isinstance(driver, FormatDriver)
    async with drained(top.graph, top.node):
        await driver.make_empty()
    await top.flush()
