"""What subcommands share: their common options, and opening images the way every one of them does.

1. An image is named by a plain name (``-f`` names its format) or, with ``--image-opts``, by a list
   of dotted options; errors of opening read ``Could not open 'x': …``, the name as it was given.
2. A raw image that was only guessed to be raw is opened for writing with a warning.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from blocklayer.api.disk import CACHE_MODES, Disk
from blocklayer.cli import console
from blocklayer.cli.objects import new_graph
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import BlockError, FormatError, UnsupportedError, UsageError
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import parse_pairs, unflatten
from blocklayer.units import MAX_SIZE, parse_size

OPENING = "Opening images"
"""The headline in help texts for options about how images are opened."""

Format = Annotated[
    str | None, Option("format of the image, else it is guessed", "f", "FMT", group=OPENING)
]
ImageOpts = Annotated[
    bool,
    Option(
        "FILENAME is a list of options, driver=…,file.filename=… (incompatible with --format)",
        group=OPENING,
    ),
]
ForceShare = Annotated[
    bool,
    Option("open the image although others write to it; what is read may be stale", "U",
           group=OPENING),
]  # fmt: skip
Quiet = Annotated[bool, Option("print errors only", "q", group="Output")]
Output = Annotated[
    str,
    Option(
        "print the result for people or as JSON (default human)",
        value="human|json",
        choices=("human", "json"),
        group="Output",
    ),
]
ProgressStyle = Annotated[
    str | None,
    Option(
        "show progress; with =json one object a line on standard error",
        "p",
        "json",
        implied="bar",
        group="Output",
    ),
]


def cache_option(letter: str, default: str = "writeback", what: str = "") -> Option:
    """``-t`` or ``-T``; ``what`` says of which images, where that must be said."""
    text = f"cache mode{what}: {', '.join(CACHE_MODES)} (default {default})"
    return Option(text, letter, "MODE", group=OPENING)


Cache = Annotated[str, cache_option("t")]
ReadCache = Annotated[str, cache_option("T")]
Rate = Annotated[str | None, Option("move so many bytes a second at most", "r", "RATE",
                                    also=("rate-limit",))]  # fmt: skip


class Copying(Command, kw_only=True):
    """What the commands have in common that write into an existing image of a chain."""

    quiet: Quiet = False
    output: Output = "human"
    progress: ProgressStyle = None
    format: Format = None
    image_opts: ImageOpts = False
    cache: Cache = "writeback"

    @property
    def progress_style(self) -> str | None:
        """``--progress``, which ``--quiet`` silences."""
        return None if self.quiet else self.progress


def say_result(result: Any) -> None:
    """A typed result, or several, as JSON on standard output."""
    from blocklayer.cli.json_text import pretty

    console.say(pretty(msgspec.to_builtins(result)))


FILENAME = ("FILENAME", "image file name (or specification with --image-opts)")


def one_filename(operands: list[str]) -> str:
    """The single operand of commands that take just an image. Raises CommandLineError."""
    if len(operands) != 1:
        raise CommandLineError("Expecting one image file name")
    return operands[0]


def check_cache(mode: str, what: str = "cache") -> str:
    """``mode`` if it is a cache mode. Raises UsageError."""
    if mode not in CACHE_MODES:
        raise UsageError(f"Invalid {what} option: {mode}")
    return mode


def size_argument(text: str, what: str, least: int = 0, most: int = MAX_SIZE) -> int:
    """Bytes named by an operand or option; ``what`` names it in errors ("image size")."""
    number = text.strip()
    negative = number.startswith("-")
    try:
        size = parse_size(number.lstrip("+-"), what=what)
    except UsageError as error:
        if error.errno != errno.ERANGE:
            raise UsageError(f"Invalid {what} specified: '{text}'.") from None
        size = most + 1
    return _within(-size if negative else size, what, least, most)


def count_argument(text: str, what: str, least: int, most: int) -> int:
    """A plain number named by an option, within limits; ``what`` names it in errors."""
    try:
        number = int(text, 0)
    except ValueError:
        raise UsageError(f"Invalid {what} specified: '{text}'.") from None
    return _within(number, what, least, most)


def _within(number: int, what: str, least: int, most: int) -> int:
    if not least <= number <= most:
        raise UsageError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return number


def parse_options(texts: list[str]) -> dict[str, str] | None:
    """The ``name=value`` pairs of all uses of ``-o``; None if one of them asks for help."""
    options: dict[str, str] = {}
    for text in texts:
        if not text:
            raise UsageError("Invalid option list: ")
        options.update(parse_pairs(text))
    return None if "help" in options or "?" in options else options


async def open_disk(
    name: str,
    *,
    format: str | None = None,
    image_opts: bool = False,
    writable: bool = False,
    force_share: bool = False,
    cache: str = "writeback",
    backing: bool = True,
    quiet: bool = False,
    graph: Graph | None = None,
    image: Mapping[str, Any] | None = None,
    **more: Any,
) -> Disk:
    """Open the image that the user calls ``name``; ``more`` goes to ``Disk.open``.

    ``image`` are the options to open it with, where they are not those that ``name`` stands for.
    """
    if image_opts and format is not None:
        raise UsageError("--image-opts and --format are mutually exclusive")
    try:
        disk = await Disk.open(
            image_argument(name, image_opts) if image is None else image,
            format=format,
            writable=writable,
            force_share=force_share,
            cache=cache,
            backing=backing,
            graph=graph or new_graph(),
            **more,
        )
    except BlockError as error:
        raise _not_opened(name, error) from error
    for layer in disk.root.node.chain():
        for warning in layer.driver.warnings():
            console.warning(warning)
    if writable and not quiet:
        warn_if_guessed(disk.root.node, name)
    return disk


def image_argument(name: str, image_opts: bool) -> str | Mapping[str, Any]:
    """What the operand ``name`` stands for: itself or, with ``--image-opts``, options."""
    return unflatten(_image_options(name)) if image_opts else name


def warn_if_guessed(node: Node, name: str) -> None:
    """Tell the user that the image ``name``, open for writing, was only guessed to be raw."""
    if node.probed and node.driver.NAME == "raw":
        console.complain(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        )


def _not_opened(name: str, error: BlockError) -> BlockError:
    prefix = f"Could not open '{name}': "
    if isinstance(error, (FormatError, UnsupportedError)) and str(error).startswith(prefix):
        # Formats name the image themselves. (The tools say it twice of a missing file: so do we.)
        return error
    return error.reworded(f"{prefix}{error}")


def _image_options(text: str) -> dict[str, str]:
    try:
        return parse_pairs(text, implied="file")
    except UsageError as error:
        raise UsageError(f"Could not open '{text}': {error}") from None
