"""Committing: what an overlay holds, written into an image below it.

1. The base is found before anything is opened for writing.
2. Stopped at any moment, the top reads as before: doing it again finishes it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from blocklayer.api.convert import reporter
from blocklayer.api.disk import Disk, Image
from blocklayer.api.progress import Progress
from blocklayer.api.results import Committed
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.filename import image_options
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.commit import commit as commit_roots
from blocklayer.jobs.commit import empty
from blocklayer.jobs.copying import CopyOptions

Opener = Callable[[Mapping[str, Any] | None, bool], Awaitable[Disk]]
"""Opens the image: as it is named, or with these options; and for writing or not."""


async def commit(
    image: Image,
    *,
    format: str | None = None,
    base: str | None = None,
    keep: bool = False,
    rate: int = 0,
    progress: Callable[[Progress], None] | None = None,
    policy: Policy | None = None,
) -> Committed:
    """Write what ``image`` and the layers down to ``base`` hold into ``base``; then empty it.

    Without ``base`` that is the backing image. With a ``base``, or ``keep``, the image is not
    emptied. ``rate`` is in bytes per second, 0 for as fast as can be. Raises BlockError.
    """

    async def opened(options: Mapping[str, Any] | None, writable: bool) -> Disk:
        return await Disk.open(
            image if options is None else options,
            format=format if options is None else None,
            writable=writable,
            graph=Graph(REGISTRY, policy),
        )

    source = image if isinstance(image, (str, Mapping)) else os.fspath(image)
    return await commit_image(
        source,
        format,
        opened,
        base=base,
        keep=keep,
        rate=rate,
        progress=lambda total: reporter(progress, total),
    )


async def commit_image(
    image: str | Mapping[str, Any],
    format: str | None,
    open_image: Opener,
    *,
    base: str | None,
    keep: bool,
    rate: int,
    progress: Callable[[int], Callable[[int], None] | None],
) -> Committed:
    """The same with the caller's way of opening; ``progress(total)`` makes what is told of it."""
    name = image if isinstance(image, str) else "the image"
    async with await open_image(None, False) as top:
        name = top.root.node.filename if name == "the image" else name
        distance = find_base(top, base, name)
    options = image_options(image, REGISTRY, format) if isinstance(image, str) else image
    async with await open_image(with_writable_base(options, distance, name), True) as top:
        node = top.root.node.chain()[distance]
        taken = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        held = Root(node, "commit", taken, write_through=top.root.write_through)
        try:
            copy = CopyOptions(bytes_per_s=rate)
            told = progress(top.size)
            done = await commit_roots(top.root, held, copy, progress=told)
            if told is not None:
                told(top.size)
            if emptied := base is None and not keep:
                await empty(top.root)
            return Committed(
                filename=name,
                base=node.filename,
                virtual_size=node.size,
                bytes_committed=done,
                emptied=emptied,
            )
        finally:
            await held.close()


def find_base(top: Disk, base: str | None, name: str) -> int:
    """How many layers below the top ``base`` is. Raises UsageError."""
    layers = top.root.node.chain()
    if len(layers) == 1:
        raise UsageError("Image does not have a backing file")
    if base is None:
        return 1
    for distance, layer in enumerate(layers[1:], 1):
        if _is_called(layer, layers[distance - 1], base):
            return distance
    raise UsageError(f"Did not find '{base}' in the backing chain of '{name}'")


def with_writable_base(options: Mapping[str, Any], distance: int, name: str) -> dict[str, Any]:
    """The image's options, which also say that the layer ``distance`` below is writable."""
    changed = place = {**options}
    for _ in range(distance):
        below = place.get("backing")
        if isinstance(below, str):
            raise UsageError(f"'{name}' names its backing node '{below}': give its options")
        place["backing"] = {**below} if isinstance(below, Mapping) else {}
        place = place["backing"]
    place["read-only"] = False
    return changed


def _is_called(layer: Node, overlay: Node, name: str) -> bool:
    """Whether ``name``, as the user or as the overlay's image has it, is ``layer``."""
    reference = getattr(overlay.driver, "backing_reference", None)
    if layer.filename == name or (reference is not None and reference.filename == name):
        return True
    try:
        return os.path.samefile(layer.filename, name)
    except (OSError, ValueError):
        return False
