"""`blk img bitmap`: the persistent dirty bitmaps of an image, changed step by step.

1. Steps are done in the order given; what comes before one that fails stays done.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

import msgspec

from blocklayer.api.disk import Disk
from blocklayer.cli.common import (
    Format,
    ImageOpts,
    Output,
    open_disk,
    say_result,
    size_argument,
)
from blocklayer.cli.options import Command, Option
from blocklayer.errors import BlockError, UsageError

_STEPS = ("add", "remove", "clear", "enable", "disable", "merge")


class Bitmap(Command):
    """Change a persistent dirty bitmap of an image

    Steps are done in the order given; JSON output tells of all bitmaps afterwards.
    """

    OPERANDS = (
        ("FILENAME", "image file name (or specification with --image-opts)"),
        ("BITMAP", "the bitmap's name"),
    )
    EXAMPLE = ("--add disk.qcow2 monday", "records from now on what is written to disk.qcow2")

    output: Output = "human"
    format: Format = None
    image_opts: ImageOpts = False
    add: Annotated[bool, Option("create BITMAP, which records what is written from then on")] = (
        False
    )
    granularity: Annotated[
        str | None,
        Option("bytes that a bit of the new bitmap stands for, a power of two", "g", "SIZE"),
    ] = None
    remove: Annotated[bool, Option("remove BITMAP; the only step for one that is inconsistent")] = (
        False
    )
    clear: Annotated[bool, Option("nothing counts as changed so far")] = False
    enable: Annotated[bool, Option("record what is written from now on")] = False
    disable: Annotated[bool, Option("record no more")] = False
    merge: Annotated[
        list[str], Option("what SOURCE, a bitmap, calls changed is so in BITMAP", value="SOURCE")
    ] = msgspec.field(default_factory=list)
    source_file: Annotated[
        str | None, Option("the image that SOURCE is in, if it is another one", "b", "FILENAME")
    ] = None
    source_format: Annotated[str | None, Option("format of that image", "F", "FMT")] = None

    async def run(self) -> int:
        steps = [use for use in self.uses if use[0] in _STEPS]
        name, granularity = self._check(steps)
        async with AsyncExitStack() as opened:
            disk = await opened.enter_async_context(
                await open_disk(
                    self.operands[0],
                    format=self.format,
                    image_opts=self.image_opts,
                    writable=True,
                    cache="writethrough",
                )
            )
            source = disk
            if self.source_file is not None:
                source = await opened.enter_async_context(
                    await open_disk(self.source_file, format=self.source_format, backing=False)
                )
            for step, value in steps:
                try:
                    await _take(step, disk, name, granularity, source, value)
                except BlockError as error:
                    raise error.reworded(
                        f"Operation {step} on bitmap {name} failed: {error}"
                    ) from error
            if self.output == "json":
                say_result(await disk.bitmaps.query())
        return 0

    def _check(self, steps: list[tuple[str, object]]) -> tuple[str, int]:
        """The bitmap's name, and the granularity for a new one (0: the default)."""
        granularity = 0
        if self.granularity is not None:
            granularity = size_argument(self.granularity, "granularity")
        if not steps:
            names = ", ".join(f"--{step}" for step in _STEPS[:-1])
            raise UsageError(f"Need at least one of {names}, or --{_STEPS[-1]}")
        if self.granularity is not None and not self.add:
            raise UsageError("granularity only supported with --add")
        if self.source_format is not None and self.source_file is None:
            raise UsageError("-F only supported with -b")
        if self.source_file is not None and not self.merge:
            raise UsageError("Merge bitmap source file only supported with --merge")
        if len(self.operands) != 2:
            raise UsageError("Expecting filename and bitmap name")
        return self.operands[1], granularity

    def left_behind(self) -> str:
        return f"'{self.operands[0]}' is valid, and has the bitmap as some of the steps left it"


async def _take(
    step: str, disk: Disk, name: str, granularity: int, source: Disk, value: object
) -> None:
    bitmaps = disk.bitmaps
    if step == "add":
        bitmaps.add(name, granularity=granularity or None)
    elif step == "remove":
        await bitmaps.remove(name)
    elif step == "clear":
        bitmaps.clear(name)
    elif step == "enable":
        bitmaps.enable(name)
    elif step == "disable":
        bitmaps.disable(name)
    else:
        await bitmaps.merge(name, str(value), of=source)
