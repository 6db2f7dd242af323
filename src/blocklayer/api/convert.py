"""Copying disks to new images for library users: opened, made, filled, and closed again.

1. What is refused is refused before the target is touched.
2. Stopped by an error or by cancellation, a target that this made is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from blocklayer.api.disk import Disk, Image
from blocklayer.api.info import allocated_size
from blocklayer.api.progress import Meter, Progress
from blocklayer.api.results import Converted
from blocklayer.api.target import Unfinished, check_distinct, create_target
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.root import Root
from blocklayer.jobs import convert as job
from blocklayer.jobs.copying import CopyOptions


async def convert(
    sources: Image | Sequence[Image],
    target: str | os.PathLike[str],
    *,
    format: str = "qcow2",
    source_format: str | None = None,
    snapshot: str | None = None,
    compress: bool = False,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    sparse_size: int = CopyOptions().sparse_size,
    rate: int = 0,
    salvage: Callable[[str], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> Converted:
    """Make ``target``, a new image of ``format``, holding what ``sources``, one after another, do.

    ``options`` go by the names of ``-o``. ``backing`` makes the target an overlay of that image:
    only what the source's own top layer holds is copied. ``rate`` is in bytes per second, 0 for
    as fast as can be. ``salvage`` gets a message for every sector that cannot be read, which then
    holds zeros; without it that is an error. Raises BlockError; cancelled, it removes the target.
    """
    names = [sources] if isinstance(sources, (str, os.PathLike, dict)) else list(sources)
    filename, graph = os.fspath(target), Graph(REGISTRY, policy)
    if not names:
        raise UsageError("There is no source to convert")
    overlay = backing is not None or bool(options.get("backing_file"))
    if overlay and len(names) > 1:
        raise UsageError("An overlay of a backing image can be made of one source only")
    if compress and not job.supports_compression(REGISTRY.load(format)):
        raise UsageError(f"Format '{format}' does not support compression")
    copy = CopyOptions(
        sparse_size=sparse_size, compress=compress, bytes_per_s=rate, salvage=salvage
    )
    async with AsyncExitStack() as opened:
        disks = [
            await opened.enter_async_context(
                await Disk.open(
                    name, format=source_format, snapshot=snapshot, one_pass=True, graph=graph
                )
            )
            for name in names
        ]
        roots = [disk.root for disk in disks]
        check_distinct(roots, filename)
        made = await create_target(
            graph,
            filename,
            format,
            options,
            job.total_size(roots),
            f"converting {format}",
            backing=None if backing is None else os.fspath(backing),
            backing_format=backing_format,
        )
        with Unfinished(filename, created=True):
            async with await Disk.open(filename, format=format, writable=True, graph=graph) as disk:
                mode = str(getattr(made, "preallocation", "off"))
                copy.zeros_known = job.reads_zero_when_new(disk.root.node, mode)
                return await _fill(disk, filename, roots, copy, progress, top_only=overlay)


async def _fill(
    target: Disk,
    filename: str,
    sources: Sequence[Root],
    copy: CopyOptions,
    progress: Callable[[Progress], None] | None,
    *,
    top_only: bool,
) -> Converted:
    size = job.total_size(sources)
    told = reporter(progress, size)
    covered = await job.convert(sources, target.root, copy, top_only=top_only, progress=told)
    await target.flush()
    if told is not None:
        told(size)
    return converted(target, filename, covered)


def converted(target: Disk, filename: str, covered: int) -> Converted:
    """The result for a target that has just been filled."""
    return Converted(
        filename=filename,
        format=target.format,
        virtual_size=target.size,
        bytes_covered=covered,
        actual_size=allocated_size(target.root.node),
    )


def reporter(
    progress: Callable[[Progress], None] | None, total: int
) -> Callable[[int], None] | None:
    """What a job of ``total`` bytes may call with how many are done; None if nobody listens."""
    if progress is None:
        return None
    meter = Meter(progress)
    return lambda done: meter.update(done, total)
