"""`blk img compare`: whether two images hold the same disk.

Exit codes: 0 they do, 1 they differ (or the command line is wrong), 2 one cannot be opened, 3 what
is allocated cannot be told, 4 data cannot be read.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import Annotated, Final

from blocklayer.api.compare import compare_disks
from blocklayer.api.disk import Disk
from blocklayer.api.results import Compared
from blocklayer.cli import console
from blocklayer.cli.common import (
    OPENING,
    ForceShare,
    ImageOpts,
    Output,
    ProgressStyle,
    Quiet,
    ReadCache,
    check_cache,
    open_disk,
    say_result,
)
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import BlockError
from blocklayer.jobs.compare import UnreadableError

EXIT_DIFFER: Final = 1
EXIT_CANNOT_OPEN: Final = 2
EXIT_CANNOT_MAP: Final = 3
EXIT_CANNOT_READ: Final = 4


class Compare(Command):
    """Say whether two images hold the same disk"""

    OPERANDS = (
        ("FILENAME1", "an image"),
        ("FILENAME2", "another; the shorter one reads as if zeros followed"),
    )
    EXIT_CODES = (
        (0, "they hold the same"),
        (EXIT_DIFFER, "they differ, or the command line is wrong"),
        (EXIT_CANNOT_OPEN, "one of them cannot be opened"),
        (EXIT_CANNOT_MAP, "what is allocated cannot be told"),
        (EXIT_CANNOT_READ, "data cannot be read"),
    )
    EXAMPLE = ("disk.raw disk.qcow2", 'prints "Images are identical." or where they differ')

    quiet: Quiet = False
    progress: ProgressStyle = None
    output: Output = "human"
    a_format: Annotated[
        str | None, Option("format of FILENAME1, else it is guessed", "f", "FMT", group=OPENING)
    ] = None
    b_format: Annotated[
        str | None, Option("format of FILENAME2, else it is guessed", "F", "FMT", group=OPENING)
    ] = None
    image_opts: ImageOpts = False
    strict: Annotated[bool, Option("also compare sizes and what is allocated", "s")] = False
    cache: ReadCache = "writeback"
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
            found = await compare_disks(
                one,
                other,
                strict=self.strict,
                progress=lambda done: progress.update(done, total),
            )
        if self.output == "json":
            say_result(found)
        elif not self.quiet:
            for line in _lines(found, min(one.size, other.size)):
                console.say(line)
        return 0 if found.identical else EXIT_DIFFER

    def _explain(self, error: UnreadableError) -> int:
        name = self.operands[error.side]
        if not error.reading:
            console.error(f"Sector allocation test failed for {name}: {error}")
            return EXIT_CANNOT_MAP
        reason = os.strerror(error.errno)
        console.error(f"Error while reading offset {error.offset} of {name}: {reason}")
        return EXIT_CANNOT_READ


def _lines(found: Compared, common_size: int) -> list[str]:
    if found.difference == "size":
        return ["Strict mode: Image size mismatch!"]
    if found.difference == "status":
        return [f"Strict mode: Offset {found.offset} block status mismatch!"]
    lines = []
    if found.sizes_differ and (found.offset is None or found.offset >= common_size):
        lines.append("Warning: Image size mismatch!")
    if found.identical:
        lines.append("Images are identical.")
    else:
        lines.append(f"Content mismatch at offset {found.offset}!")
    return lines
