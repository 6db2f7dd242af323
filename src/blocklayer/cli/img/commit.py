"""`blk img commit`: what an overlay holds, written into an image below it.

1. The base is found before anything is opened for writing.
2. Interrupted at any moment, the overlay reads as before: run the command again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from blocklayer.api.disk import Disk
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Format,
    ImageOpts,
    ProgressStyle,
    Quiet,
    check_cache,
    image_argument,
    one_filename,
    open_disk,
    size_argument,
    warn_if_guessed,
)
from blocklayer.cli.options import Command, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.filename import image_options
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.commit import commit, empty
from blocklayer.jobs.copying import CopyOptions


class Commit(Command):
    """Commit image to its backing file"""

    OPERANDS = (FILENAME,)

    quiet: Quiet = False
    progress: ProgressStyle = None
    format: Format = None
    image_opts: ImageOpts = False
    cache: Annotated[
        str, Option("cache mode to open with (default writeback)", "t", "CACHE_MODE")
    ] = "writeback"
    drop: Annotated[bool, Option("do not empty FILENAME afterwards", "d")] = False
    base: Annotated[
        str | None,
        Option("commit to this image of the chain, not to the next (implies -d)", "b", "BASE_IMG"),
    ] = None
    rate: Annotated[
        str | None, Option("bytes per second at most", "r", "RATE", also=("rate-limit",))
    ] = None

    async def run(self) -> int:
        name = one_filename(self.operands)
        check_cache(self.cache)
        rate = 0 if self.rate is None else size_argument(self.rate, "rate limit")
        distance = await self._find_base(name)
        image = self._with_writable_base(name, distance)
        async with await self._open(name, image, writable=True, quiet=True) as top:
            base = Root(
                top.root.node.chain()[distance],
                "commit",
                Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
            )
            try:
                await self._commit(top, base, rate)
            finally:
                await base.close()
        if not self.quiet:
            console.say("Image committed.")
        return 0

    def left_behind(self) -> str:
        return "the overlay reads as before; run the command again to finish"

    async def _open(self, name: str, image: Mapping[str, Any] | None, **more: Any) -> Disk:
        return await open_disk(
            name,
            image=image,
            format=None if image else self.format,
            image_opts=self.image_opts and not image,
            cache=self.cache,
            **more,
        )

    async def _find_base(self, name: str) -> int:
        """How many layers below the top the base is."""
        async with await self._open(name, None) as top:
            warn_if_guessed(top.root.node, name)
            layers = top.root.node.chain()
            if len(layers) == 1:
                raise UsageError("Image does not have a backing file")
            if self.base is None:
                return 1
            for distance, layer in enumerate(layers[1:], 1):
                if _is_called(layer, layers[distance - 1], self.base):
                    return distance
            raise UsageError(f"Did not find '{self.base}' in the backing chain of '{name}'")

    def _image(self, name: str) -> dict[str, Any]:
        image = image_argument(name, self.image_opts)
        if isinstance(image, str):
            return image_options(image, REGISTRY, self.format)
        return {**image}

    def _with_writable_base(self, name: str, distance: int) -> dict[str, Any]:
        """The image's options, which also say that the layer ``distance`` below is writable."""
        options = place = self._image(name)
        for _ in range(distance):
            below = place.get("backing")
            if isinstance(below, str):
                raise UsageError(f"'{name}' names its backing node '{below}': give its options")
            place["backing"] = {**below} if isinstance(below, Mapping) else {}
            place = place["backing"]
        place["read-only"] = False
        return options

    async def _commit(self, top: Disk, base: Root, rate: int) -> None:
        total = top.size
        with console.Progress(None if self.quiet else self.progress) as progress:
            await commit(
                top.root,
                base,
                CopyOptions(bytes_per_s=rate),
                progress=lambda done: progress.update(done, total),
            )
            progress.update(total, total)
        if not self.drop and self.base is None:
            await empty(top.root)


def _is_called(layer: Node, overlay: Node, name: str) -> bool:
    """Whether ``name``, as the user or as the overlay's image has it, is ``layer``."""
    reference = getattr(overlay.driver, "backing_reference", None)
    if layer.filename == name or (reference is not None and reference.filename == name):
        return True
    try:
        return os.path.samefile(layer.filename, name)
    except (OSError, ValueError):
        return False
