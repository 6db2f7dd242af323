"""`blk img rebase`: an overlay on another backing file, reading as before."""

from __future__ import annotations

from typing import Annotated

from blocklayer.api.rebase import NewBacking, rebase_disk
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Copying,
    ForceShare,
    cache_option,
    check_cache,
    one_filename,
    open_disk,
    say_result,
)
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError


class Rebase(Copying):
    """Put an overlay on another backing file

    What the new backing file does not show as the old one did is copied into FILENAME, so
    that it reads as before; with -u nothing is copied. The header changes last:
    interrupted, FILENAME still has its old backing file and reads as before.
    """

    OPERANDS = (FILENAME,)
    EXAMPLE = ("-b new.qcow2 -F qcow2 top.qcow2", "top.qcow2 stands on new.qcow2 from now on")

    backing: Annotated[
        str | None, Option('the new backing file; "" for none', "b", "BACKING_FILENAME")
    ] = None
    backing_format: Annotated[
        str | None, Option("format of the new backing file", "FB", "BACKING_FMT")
    ] = None
    backing_unsafe: Annotated[
        bool, Option("only change the header: no backing file is opened", "u")
    ] = False
    compress: Annotated[bool, Option("compress what is written to the image", "c")] = False
    backing_cache: Annotated[str, cache_option("T", what=" of the new backing file")] = "writeback"
    force_share: ForceShare = False

    async def run(self) -> int:
        name = one_filename(self.operands)
        if self.backing is None and not self.backing_unsafe:
            raise CommandLineError("Must specify backing file (-b) or use unsafe mode (-u)")
        check_cache(self.cache)
        check_cache(self.backing_cache, "source cache")
        if self.backing_format is not None and self.backing_format not in REGISTRY.table:
            raise UsageError(f"Invalid format name: '{self.backing_format}'")
        new = NewBacking(
            filename=self.backing,
            format=self.backing_format,
            unsafe=self.backing_unsafe,
            compress=self.compress,
            cache=self.backing_cache,
            force_share=self.force_share,
        )
        async with await open_disk(
            name,
            format=self.format,
            image_opts=self.image_opts,
            writable=True,
            backing=not self.backing_unsafe,
            cache=self.cache,
            quiet=self.quiet,
        ) as overlay:
            total = overlay.size
            with console.Progress(self.progress_style) as progress:
                result = await rebase_disk(overlay, new, lambda done: progress.update(done, total))
        if self.output == "json":
            say_result(result)
        return 0

    def left_behind(self) -> str:
        return "the image still has its old backing file and reads as before"
