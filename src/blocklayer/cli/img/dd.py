"""`blk img dd`: a range of one image as a new image, in the words of ``dd``.

``count`` counts from ``skip`` on, as with ``dd`` itself. (qemu-img 10 counts from the start of the
input, so that ``skip=3 count=3`` gives it nothing.)
"""

from __future__ import annotations

from typing import Annotated, Final

from blocklayer.api.convert import converted
from blocklayer.api.target import Unfinished, check_distinct, create_target
from blocklayer.cli import console
from blocklayer.cli.common import (
    ForceShare,
    Format,
    ImageOpts,
    Output,
    ProgressStyle,
    open_disk,
    say_result,
    size_argument,
)
from blocklayer.cli.objects import new_graph
from blocklayer.cli.options import Command, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.jobs.convert import reads_zero_when_new
from blocklayer.jobs.copying import CopyOptions
from blocklayer.jobs.dd import copy_range
from blocklayer.units import SECTOR, align_up

_BLOCK_SIZE_MAX: Final = (1 << 31) - 1


class Dd(Command):
    """Copy a range of one image to a new one"""

    OPERANDS = (
        ("[bs=BLOCK_SIZE]", "size of a block (default 512)"),
        ("[count=BLOCKS]", "number of blocks to copy (default all)"),
        ("[skip=BLOCKS]", "number of blocks of INPUT to leave out at its start"),
        ("if=INPUT", "input file name (or image specification with --image-opts)"),
        ("of=OUTPUT", "output file name to create"),
    )

    EXAMPLE = ("bs=1M skip=1 count=2 if=disk.raw of=part.raw", "the second and third MiB")

    output: Output = "human"
    progress: ProgressStyle = None
    format: Format = None
    image_opts: ImageOpts = False
    output_format: Annotated[str, Option("format of OUTPUT (default raw)", "O", "OUTPUT_FMT")] = (
        "raw"
    )
    force_share: ForceShare = False
    unfinished: Unfinished | None = None

    async def run(self) -> int:
        given = self._operands()
        if "if" not in given or "of" not in given:
            raise UsageError("Must specify both input and output files")
        if self.output_format not in REGISTRY.table:
            raise UsageError(f"Unknown file format '{self.output_format}'")
        block = size_argument(given.get("bs", "512"), "bs")
        if not 1 <= block <= _BLOCK_SIZE_MAX:
            raise UsageError(f"Invalid bs specified. Must be between 1 and {_BLOCK_SIZE_MAX}.")
        skip = size_argument(given.get("skip", "0"), "skip") * block
        count = size_argument(given["count"], "count") * block if "count" in given else None
        graph = new_graph()
        async with await open_disk(
            given["if"],
            format=self.format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            graph=graph,
        ) as source:
            if skip > source.size:
                console.error(f"{given['if']}: cannot skip to specified offset")
            rest = max(0, source.size - skip)
            length = rest if count is None else min(rest, count)
            check_distinct([source.root], given["of"])
            made = await create_target(
                graph,
                given["of"],
                self.output_format,
                {},
                align_up(length, SECTOR),
                "creating output image",
            )
            self.unfinished = Unfinished(given["of"], created=True, tell=console.warning)
            with self.unfinished:
                async with await open_disk(
                    given["of"],
                    format=self.output_format,
                    writable=True,
                    cache="unsafe",
                    graph=graph,
                ) as target:
                    mode = str(getattr(made, "preallocation", "off"))
                    known = reads_zero_when_new(target.root.node, mode)
                    options = CopyOptions(zeros_known=known)
                    with console.Progress(self.progress) as progress:
                        covered = await copy_range(
                            source.root,
                            skip,
                            length,
                            target.root,
                            options,
                            progress=lambda done: progress.update(done, length),
                        )
                        progress.update(length, length)
                    result = converted(target, given["of"], covered)
        if self.output == "json":
            say_result(result)
        return 0

    def left_behind(self) -> str:
        return self.unfinished.left if self.unfinished else ""

    def _operands(self) -> dict[str, str]:
        given: dict[str, str] = {}
        for operand in self.operands:
            name, equals, value = operand.partition("=")
            if not equals or name not in ("bs", "count", "skip", "if", "of"):
                raise UsageError(f"unrecognized operand {name}")
            given[name] = value
        return given
