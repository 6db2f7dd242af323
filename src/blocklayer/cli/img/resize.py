"""`blk img resize`: a disk's new size, absolute or by how much it changes."""

from __future__ import annotations

import errno
from typing import Annotated

from blocklayer.api.results import Resized
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Format,
    ImageOpts,
    Output,
    Quiet,
    open_disk,
    say_result,
)
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import UsageError
from blocklayer.units import parse_size

_PREALLOCATION = ("off", "metadata", "falloc", "full")


class Resize(Command):
    """Change the size of a disk"""

    OPERANDS = (
        FILENAME,
        ("[+|-]SIZE", "the new size, or by how much to grow or shrink, with an optional suffix k, "
                      "M, G, T, P or E"),
    )  # fmt: skip
    ENDS_IN_NUMBER = True
    EXAMPLE = ("disk.qcow2 +10G", "the disk is 10 GiB larger; what was added reads as zeros")

    quiet: Quiet = False
    output: Output = "human"
    format: Format = None
    image_opts: ImageOpts = False
    shrink: Annotated[bool, Option("allow the new size to be smaller: the tail is lost")] = False
    preallocation: Annotated[
        str, Option(f"how to allocate the new area ({', '.join(_PREALLOCATION)})", value="PREALLOC")
    ] = "off"

    async def run(self) -> int:
        if len(self.operands) < 2:
            raise CommandLineError("Expecting image file name and size")
        if len(self.operands) > 2:
            raise CommandLineError("Extra argument(s) in command line")
        name, text = self.operands
        change = _parse_change(text)
        if self.preallocation not in _PREALLOCATION:
            raise UsageError(f"Invalid preallocation mode '{self.preallocation}'")
        disk = await open_disk(
            name, format=self.format, image_opts=self.image_opts, writable=True, quiet=self.quiet
        )
        try:
            old = disk.size
            size = change if text[0] not in "+-" else old + change
            if size <= 0:
                raise UsageError("New image size must be positive")
            if size <= old and self.preallocation != "off":
                raise UsageError("Preallocation can only be used for growing images")
            if size < old and not self.shrink:
                console.error("Use the --shrink option to perform a shrink operation.")
                console.warning(
                    "Shrinking an image will delete all data beyond the shrunken image's end. "
                    "Before performing such an operation, make sure there is no important data "
                    "there."
                )
                return 1
            await disk.resize(size, preallocation=self.preallocation, shrink=self.shrink)
            result = Resized(
                filename=name, format=disk.format, old_size=old, virtual_size=disk.size
            )
        finally:
            await disk.close()
        if self.output == "json":
            say_result(result)
        elif not self.quiet:
            console.say("Image resized.")
        return 0

    def left_behind(self) -> str:
        return f"'{self.operands[0]}' is valid, with its old or its new size"


def _parse_change(text: str) -> int:
    """Bytes, negative for ``-SIZE``."""
    number = text[1:] if text[:1] in ("+", "-") else text
    try:
        if not number[:1].isdigit():
            raise UsageError("no number")
        size = parse_size(number)
    except UsageError as error:
        if error.errno == errno.ERANGE:
            raise UsageError(f"Value '{number}' is out of range for parameter 'size'") from None
        raise UsageError(
            "Parameter 'size' expects a non-negative number below 2^64, "
            f"with an optional suffix k, M, G, T, P or E, not '{text}'"
        ) from None
    return -size if text[0] == "-" else size
