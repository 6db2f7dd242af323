"""`blk img compare`: whether two images hold the same disk.

Exit codes: 0 they do, 1 they differ (or the command line is wrong), 2 one cannot be opened, 3 what
is allocated cannot be told, 4 data cannot be read.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import Annotated, Final

from blocklayer.api.disk import Disk
from blocklayer.cli import console
from blocklayer.cli.common import (
    ForceShare,
    ImageOpts,
    ProgressStyle,
    Quiet,
    check_cache,
    open_disk,
)
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import BlockError
from blocklayer.jobs.compare import Difference, UnreadableError, Verdict, compare

EXIT_DIFFER: Final = 1
EXIT_CANNOT_OPEN: Final = 2
EXIT_CANNOT_MAP: Final = 3
EXIT_CANNOT_READ: Final = 4


class Compare(Command):
    """Check if two images have the same contents"""

    OPERANDS = (
        ("FILENAME1", "image file (or specification)"),
        ("FILENAME2", "image file to compare with"),
    )

    quiet: Quiet = False
    progress: ProgressStyle = None
    a_format: Annotated[
        str | None, Option("format of FILENAME1, else it is guessed", "f", "FMT")
    ] = None
    b_format: Annotated[
        str | None, Option("format of FILENAME2, else it is guessed", "F", "FMT")
    ] = None
    image_opts: ImageOpts = False
    strict: Annotated[bool, Option("also compare sizes and what is allocated", "s")] = False
    cache: Annotated[
        str, Option("cache mode to open with (default writeback)", "T", "CACHE_MODE")
    ] = "writeback"
    force_share: ForceShare = False

    async def run(self) -> int:
        if len(self.operands) != 2:
            raise CommandLineError("Expecting two image file names")
        async with AsyncExitStack() as opened:
            try:
                check_cache(self.cache, "source cache")
                one, other = [
                    await opened.enter_async_context(await self._open(name, format))
                    for name, format in zip(
                        self.operands, (self.a_format, self.b_format), strict=True
                    )
                ]
            except BlockError as error:
                console.error(str(error))
                return EXIT_CANNOT_OPEN
            try:
                return await self._compare(one, other)
            except UnreadableError as error:
                return self._explain(error)

    async def _open(self, name: str, format: str | None) -> Disk:
        return await open_disk(
            name,
            format=format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            cache=self.cache,
            one_pass=True,
        )

    async def _compare(self, one: Disk, other: Disk) -> int:
        total = max(one.size, other.size)
        with console.Progress(None if self.quiet else self.progress) as progress:
            verdict = await compare(
                one.root,
                other.root,
                strict=self.strict,
                progress=lambda done: progress.update(done, total),
            )
            progress.update(total, total)
        if not self.quiet:
            for line in _lines(verdict, min(one.size, other.size)):
                console.say(line)
        return EXIT_DIFFER if verdict.difference else 0

    def _explain(self, error: UnreadableError) -> int:
        name = self.operands[error.side]
        if not error.reading:
            console.error(f"Sector allocation test failed for {name}: {error}")
            return EXIT_CANNOT_MAP
        reason = os.strerror(error.errno)
        console.error(f"Error while reading offset {error.offset} of {name}: {reason}")
        return EXIT_CANNOT_READ


def _lines(verdict: Verdict, common_size: int) -> list[str]:
    if verdict.difference is Difference.SIZE:
        return ["Strict mode: Image size mismatch!"]
    if verdict.difference is Difference.STATUS:
        return [f"Strict mode: Offset {verdict.offset} block status mismatch!"]
    lines = []
    if verdict.sizes_differ and (not verdict.difference or verdict.offset >= common_size):
        lines.append("Warning: Image size mismatch!")
    if verdict.difference:
        lines.append(f"Content mismatch at offset {verdict.offset}!")
    else:
        lines.append("Images are identical.")
    return lines
