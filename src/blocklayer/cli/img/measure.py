"""`blk img measure`: how large the file of a new image would be.

1. What is wrong with the options is said before the source is opened.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from blocklayer.api.measure import Measurement, decode_options, measure
from blocklayer.cli import console
from blocklayer.cli.common import (
    OPENING,
    ForceShare,
    Output,
    open_disk,
    parse_options,
    say_result,
    size_argument,
)
from blocklayer.cli.img.create import options_help
from blocklayer.cli.img.snapshot import load_snapshot
from blocklayer.cli.options import Command, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.options import CreateOptions


class Measure(Command):
    """Tell how much storage a new image would take"""

    OPERANDS = (("[FILENAME]", "the image to convert from; else --size says how large a disk"),)
    EXAMPLE = ("-O qcow2 disk.raw", "what converting disk.raw to qcow2 would take")

    target_format: Annotated[str, Option("format of the new image (default raw)", "O", "FMT")] = (
        "raw"
    )
    options: Annotated[
        list[str],
        Option(
            "options of the new image's format, as name=value,… ('help' lists them)",
            "o",
            "OPTIONS",
            also=("target-format-options",),
        ),
    ] = msgspec.field(default_factory=list)
    snapshot: Annotated[
        str | None,
        Option("measure this internal snapshot of FILENAME: its id or its name", "l", "SNAPSHOT"),
    ] = None
    size: Annotated[str | None, Option("size of a new, empty image", "s", "SIZE")] = None
    format: Annotated[
        str | None,
        Option(
            "format of FILENAME, else it is guessed",
            "f",
            "FMT",
            also=("source-format",),
            group=OPENING,
        ),
    ] = None
    image_opts: Annotated[
        bool,
        Option(
            "FILENAME is a list of options, driver=…,file.filename=… (incompatible with --format)",
            also=("source-image-opts",),
            group=OPENING,
        ),
    ] = False
    output: Output = "human"
    force_share: ForceShare = False

    @property
    def writes(self) -> bool:
        return False

    async def run(self) -> int:
        values = parse_options(self.options)
        if values is None:
            console.write(options_help(self.target_format, None))
            return 0
        size = None if self.size is None else size_argument(self.size, "image size")
        self._check_combinations(size)
        options = self._decoded(values)
        if size is not None:
            self._show(await measure(self.target_format, options, size=size))
            return 0
        source = await open_disk(
            self.operands[0],
            format=self.format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            one_pass=True,
        )
        try:
            if self.snapshot is not None:
                await load_snapshot([source.root.node], self.snapshot)
            self._show(await measure(self.target_format, options, source=source))
        finally:
            await source.close()
        return 0

    def _check_combinations(self, size: int | None) -> None:
        if len(self.operands) > 1:
            raise UsageError("At most one filename argument is allowed.")
        needs_file = self.image_opts or self.format is not None or self.snapshot is not None
        if not self.operands and needs_file:
            raise UsageError("--image-opts, -f, and -l require a filename argument.")
        if size is None and not self.operands:
            raise UsageError("Either --size N or one filename must be specified.")
        if size is not None and self.operands:
            raise UsageError("--size N cannot be used together with a filename.")

    def _decoded(self, values: dict[str, str]) -> CreateOptions:
        if self.target_format not in REGISTRY.table:
            raise UsageError(f"Unknown file format '{self.target_format}'")
        try:
            return decode_options(self.target_format, values)
        except UsageError as error:
            console.error(str(error))
            raise UsageError(f"Invalid options for file format '{self.target_format}'") from error

    def _show(self, found: Measurement) -> None:
        if self.output == "json":
            say_result(found)
            return
        console.say(f"required size: {found.required}")
        console.say(f"fully allocated size: {found.fully_allocated}")
        if found.bitmaps is not None:
            console.say(f"bitmaps size: {found.bitmaps}")
