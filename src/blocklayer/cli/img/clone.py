"""`blk img clone`: many overlays of one image, at once.

1. A clone is there complete or not at all; what exists is refused unless ``--force`` is given.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from blocklayer.api import disk as aio
from blocklayer.api.clone import OPTIONS
from blocklayer.cli import console
from blocklayer.cli.common import Output, Quiet, count_argument, parse_options, size_argument
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.drivers.qcow2.create import Qcow2CreateOptions
from blocklayer.errors import UsageError

_MAX_COUNT: Final = 1_000_000
_NUMBER = re.compile(r"\{(?::0?(\d{1,2}))?\}")


class Clone(Command):
    """Make qcow2 overlays of an image, as many as wanted

    The clones are named one by one, or counted: with --count 3 --pattern
    'vm-{:03}.qcow2' they are vm-000.qcow2, vm-001.qcow2 and vm-002.qcow2.
    """

    OPERANDS = (
        ("BASE", "the image that the clones show where they hold nothing themselves"),
        ("[NAME…]", "names of the clones"),
    )
    EXAMPLE = ("base.qcow2 --count 3 --pattern 'vm-{:03}.qcow2'", "three overlays of base.qcow2")

    quiet: Quiet = False
    format: Annotated[
        str | None, Option("format of the base, else it is guessed, once", "fF", "FMT")
    ] = None
    options: Annotated[
        list[str],
        Option(f"options of the clones, as name=value,…: {', '.join(OPTIONS)}", "o", "OPTIONS"),
    ] = msgspec.field(default_factory=list)
    size: Annotated[str | None, Option("size, if it is not the base's", value="SIZE")] = None
    count: Annotated[str | None, Option("how many clones", "n", "COUNT")] = None
    pattern: Annotated[
        str | None,
        Option("name of counted clones: {} is the number, {:04} the same in four digits",
               value="PATTERN"),
    ] = None  # fmt: skip
    first: Annotated[str, Option("the first number (default 0)", value="NUMBER")] = "0"
    relative: Annotated[
        bool, Option("name the base as it is seen from the clone, not by its absolute path")
    ] = False
    sync: Annotated[bool, Option("bring each clone to stable storage before it has its name")] = (
        False
    )
    force: Annotated[bool, Option("replace what exists")] = False
    output: Output = "human"

    async def run(self) -> int:
        options = parse_options(self.options)
        if options is None:
            from blocklayer.cli.img.create import option_lines

            lines = [line for line in option_lines(Qcow2CreateOptions) if _is_taken(line)]
            console.write("\n".join(["Supported options:", *lines]) + "\n")
            return 0
        if "size" in options:
            raise UsageError("The size of clones is given with --size")
        if not self.operands:
            raise CommandLineError("Expecting the base image's file name")
        size = None if self.size is None else size_argument(self.size, "image size")
        base, names = self.operands[0], self._names(self.operands[1:])
        made = await aio.clone(
            base,
            *names,
            format=self.format,
            size=size,
            relative=self.relative,
            force=self.force,
            sync=self.sync,
            **options,
        )
        if self.output == "json":
            from blocklayer.cli.json_text import pretty

            console.say(pretty([{"filename": name} for name in made]))
        elif not self.quiet:
            console.say(f"Made {len(made)} clone{'s' if len(made) != 1 else ''} of '{base}'.")
        return 0

    def _names(self, named: list[str]) -> list[str]:
        if self.count is None and self.pattern is None:
            if not named:
                raise CommandLineError("Expecting names for the clones, or --count and --pattern")
            return named
        if self.count is None or self.pattern is None:
            raise CommandLineError("--count and --pattern go together")
        if named:
            raise CommandLineError("Either name the clones, or count them")
        count = count_argument(self.count, "count", 1, _MAX_COUNT)
        first = count_argument(self.first, "first number", 0, 1 << 62)
        found = _NUMBER.findall(self.pattern)
        if len(found) != 1 or self.pattern.count("{") != 1 or self.pattern.count("}") != 1:
            raise UsageError(f"Invalid pattern '{self.pattern}': it needs one {{}} for the number")
        head, tail = _NUMBER.split(self.pattern)[::2]
        digits = int(found[0] or 0)
        return [f"{head}{number:0{digits}}{tail}" for number in range(first, first + count)]


def _is_taken(line: str) -> bool:
    return line.strip().partition("=")[0] in OPTIONS
