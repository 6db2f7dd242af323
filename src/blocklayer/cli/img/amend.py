"""`blk img amend`: change what an existing image is."""

from __future__ import annotations

from typing import Annotated

import msgspec

from blocklayer.api.results import Amended
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Copying,
    check_cache,
    open_disk,
    parse_options,
    say_result,
)
from blocklayer.cli.img.create import option_lines
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.amend import amend_options
from blocklayer.graph.driver import Driver


class Amend(Copying):
    """Change what an existing image is: its version, its refcounts, …"""

    OPERANDS = (FILENAME,)
    EXAMPLE = ("-o lazy_refcounts=on disk.qcow2", "refcounts are updated late from now on")

    options: Annotated[
        list[str],
        Option("what to change, as name=value,… ('help' lists what can be)", "o", "OPTIONS"),
    ] = msgspec.field(default_factory=list)
    force: Annotated[
        bool, Option("allow what may lose data: to erase the last key of an encrypted image")
    ] = False

    async def run(self) -> int:
        if not self.options:
            raise CommandLineError("Must specify options (-o)")
        values = parse_options(self.options)
        if values is None and self.format is not None:
            console.write(_help(REGISTRY.load(self.format)))
            return 0
        if len(self.operands) != 1:
            raise UsageError("Expecting one image file name")
        check_cache(self.cache)
        disk = await open_disk(
            self.operands[0],
            format=self.format,
            image_opts=self.image_opts,
            writable=True,
            cache=self.cache,
            quiet=self.quiet,
        )
        try:
            if values is None:
                console.write(_help(type(disk.root.node.driver)))
                return 0
            amend_options(type(disk.root.node.driver))
            if "backing_file" in values or "backing_fmt" in values:
                raise UsageError(
                    "Cannot amend the backing file\n"
                    f"You can use '{console.program} rebase' instead."
                )
            with console.Progress(self.progress_style) as progress:
                await disk.amend(progress=progress.update, force=self.force, **values)
                progress.update(1, 1)
            result = Amended(filename=self.operands[0], format=disk.format, options=values)
        finally:
            await disk.close()
        if self.output == "json":
            say_result(result)
        return 0

    def left_behind(self) -> str:
        return f"'{self.operands[0]}' is valid, changed in part or not at all"


def _help(driver: type[Driver]) -> str:
    lines = option_lines(amend_options(driver))
    return "\n".join([f"Amend options for '{driver.NAME}':", *lines]) + "\n"
