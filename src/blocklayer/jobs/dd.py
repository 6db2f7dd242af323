"""dd: a range of one image becomes a new image."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from blocklayer.graph.root import Root
from blocklayer.jobs.copying import Copier, CopyOptions
from blocklayer.jobs.plan import Piece, piece_of, source_runs


async def copy_range(
    source: Root,
    offset: int,
    length: int,
    target: Root,
    options: CopyOptions,
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Copy ``[offset, offset + length)`` of ``source`` to the start of ``target``.

    The answer is how many bytes of the target are done: written, or zeros.
    """
    copier = Copier(target, options, progress)
    await copier.copy(_pieces(source, offset, length))
    return copier.done


async def _pieces(source: Root, offset: int, length: int) -> AsyncIterator[Piece]:
    async for run, generation in source_runs(source, offset, length):
        yield piece_of(run, generation, source, -offset)
