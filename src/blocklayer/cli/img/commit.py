"""`blk img commit`: what an overlay holds, written into an image below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from blocklayer.api.commit import commit_image
from blocklayer.api.disk import Disk
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Copying,
    Rate,
    check_cache,
    image_argument,
    one_filename,
    open_disk,
    say_result,
    size_argument,
    warn_if_guessed,
)
from blocklayer.cli.options import Option


class Commit(Copying):
    """Write what an overlay holds into the image below it

    Everything is checked before a byte changes. Interrupted, the overlay reads as before.
    """

    OPERANDS = (FILENAME,)
    EXAMPLE = ("-d top.qcow2", "the backing image of top.qcow2 now holds what top.qcow2 shows")

    drop: Annotated[bool, Option("do not empty FILENAME afterwards", "d")] = False
    base: Annotated[
        str | None,
        Option("commit to this image of the chain, not to the next (implies -d)", "b", "BASE_IMG"),
    ] = None
    rate: Rate = None

    async def run(self) -> int:
        name = one_filename(self.operands)
        check_cache(self.cache)

        async def opened(image: Mapping[str, Any] | None, writable: bool) -> Disk:
            disk = await open_disk(
                name,
                image=image,
                format=None if image else self.format,
                image_opts=self.image_opts and not image,
                cache=self.cache,
                writable=writable,
                quiet=True,
            )
            if not writable:
                warn_if_guessed(disk.root.node, name)
            return disk

        with console.Progress(self.progress_style) as progress:

            def told(total: int) -> Callable[[int], None]:
                return lambda done: progress.update(done, total)

            result = await commit_image(
                image_argument(name, self.image_opts),
                self.format,
                opened,
                base=self.base,
                keep=self.drop,
                rate=0 if self.rate is None else size_argument(self.rate, "rate limit"),
                progress=told,
            )
        if self.output == "json":
            say_result(result)
        elif not self.quiet:
            console.say("Image committed.")
        return 0

    def left_behind(self) -> str:
        return "the overlay reads as before; run the command again to finish"
