"""Comparing two disks: whether they hold the same, and where they first differ."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from blocklayer.api.convert import reporter
from blocklayer.api.disk import Disk, Image
from blocklayer.api.progress import Progress
from blocklayer.api.results import Compared
from blocklayer.drivers import REGISTRY
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.jobs.compare import Difference
from blocklayer.jobs.compare import compare as compare_roots


async def compare(
    one: Image,
    other: Image,
    *,
    strict: bool = False,
    format: str | None = None,
    other_format: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    policy: Policy | None = None,
) -> Compared:
    """Whether ``one`` and ``other`` read the same; a shorter one as if zeros followed.

    ``strict`` also compares sizes and what is allocated. Raises BlockError.
    """
    async with AsyncExitStack() as opened:
        graph = Graph(REGISTRY, policy)
        disks = [
            await opened.enter_async_context(
                await Disk.open(image, format=kind, one_pass=True, graph=graph)
            )
            for image, kind in ((one, format), (other, other_format))
        ]
        return await compare_disks(
            *disks,
            strict=strict,
            progress=reporter(progress, max(disk.size for disk in disks)),
        )


async def compare_disks(
    one: Disk,
    other: Disk,
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Compared:
    """The same for open disks; ``progress`` gets the bytes done."""
    verdict = await compare_roots(one.root, other.root, strict=strict, progress=progress)
    if progress is not None:
        progress(max(one.size, other.size))
    found = verdict.difference
    return Compared(
        identical=found is None,
        difference=None if found is None else found.value,
        offset=None if found in (None, Difference.SIZE) else verdict.offset,
        sizes_differ=verdict.sizes_differ,
    )
