"""`blk img create`: a new, empty image.

1. What is refused is refused before the target is touched, and before "Formatting" is printed.
2. Errors start with the name of the new image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from blocklayer.api.results import Created
from blocklayer.cli import console
from blocklayer.cli.common import Output, Quiet, parse_options, say_result, size_argument
from blocklayer.cli.objects import new_graph
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.create import prepare, write_image
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.filename import protocol_options
from blocklayer.graph.graph import Graph
from blocklayer.graph.options import CreateOptions, Described, describe


class Create(Command):
    """Make a new, empty image"""

    OPERANDS = (
        ("FILENAME", "image file to create; it is overwritten if it exists"),
        ("[SIZE]", "size, with an optional suffix k, M, G, T, P or E; an overlay without one is as "
                   "large as its backing image"),
    )  # fmt: skip
    EXAMPLE = (
        "-f qcow2 -b disk.raw -F raw overlay.qcow2",
        "an overlay: it shows what disk.raw holds, and takes all writes",
    )

    quiet: Quiet = False
    output: Output = "human"
    format: Annotated[str, Option("format of the new image (default raw)", "f", "FMT")] = "raw"
    options: Annotated[
        list[str],
        Option("options of the format, as name=value,… ('help' lists them)", "o", "OPTIONS"),
    ] = msgspec.field(default_factory=list)
    backing: Annotated[
        str | None, Option("make an overlay of this image", "b", "BACKING_FILENAME")
    ] = None
    backing_format: Annotated[
        str | None, Option("format of the backing image", "FB", "BACKING_FMT")
    ] = None
    backing_unsafe: Annotated[
        bool, Option("do not open the backing image: it may be missing", "u")
    ] = False

    async def run(self) -> int:
        if len(self.operands) > 2:
            raise CommandLineError(f"Unexpected argument: {self.operands[2]}")
        filename = self.operands[0] if self.operands else None
        options = parse_options(self.options)
        if options is None:
            console.write(options_help(self.format, filename))
            return 0
        if filename is None:
            raise CommandLineError("Expecting image file name")
        size = size_argument(self.operands[1], "image size") if len(self.operands) > 1 else None
        try:
            await self._create(filename, size, options)
        except BlockError as error:
            raise error.reworded(f"{filename}: {error}") from error
        return 0

    async def _create(self, filename: str, size: int | None, options: Mapping[str, str]) -> None:
        check_creatable(self.format)
        if size is not None and "size" in options:
            raise UsageError("The image size must be specified only once")
        if self.backing == "":
            raise UsageError("Expected backing file name, got empty string")
        graph = new_graph()
        decoded, storage = await prepare(
            graph,
            filename,
            self.format,
            options,
            size,
            self.backing,
            self.backing_format,
            not self.backing_unsafe,
        )
        if not self.quiet and self.output == "human":
            console.say(formatting_line(filename, self.format, decoded, storage))
        await write_image(graph, filename, self.format, decoded, storage)
        if self.output == "json":
            values = _values(decoded, storage)
            say_result(
                Created(
                    filename=filename,
                    format=self.format,
                    virtual_size=values.pop("size", None),
                    options=values,
                )
            )


def check_creatable(format: str) -> type[CreateOptions]:
    """The options for creating images of ``format``. Raises UsageError if there are none."""
    try:
        driver = REGISTRY.load(format)
    except UsageError:
        raise UsageError(f"Unknown file format '{format}'") from None
    if not issubclass(driver, FormatDriver) or driver.CreateOptions is None:
        raise UsageError(f"Format driver '{format}' does not support image creation")
    return driver.CreateOptions


def formatting_line(
    filename: str, format: str, options: CreateOptions, storage: Mapping[str, Any]
) -> str:
    """``Formatting 'x', fmt=qcow2 cluster_size=65536 …``: every option that has a value."""
    shown = [f"{name}={_shown(value)}" for name, value in _values(options, storage).items()]
    return f"Formatting '{filename}', " + " ".join([f"fmt={format}", *shown])


def _values(options: CreateOptions, storage: Mapping[str, Any]) -> dict[str, Any]:
    """Every option that has a value, in the order shown."""
    own = {named: getattr(options, name) for name, named in _in_order(options)}
    return {name: value for name, value in {**own, **storage}.items() if value is not None}


def _in_order(options: CreateOptions) -> list[tuple[str, str]]:
    """(attribute, name in ``-o``) of all options."""
    pairs = list(zip(options.__struct_fields__, options.__struct_encode_fields__, strict=True))
    first = [pair for pair in pairs if pair[1] in options.BEFORE_SIZE]
    taken = [*first, ("size", "size")]
    return [*taken, *(pair for pair in pairs if pair not in taken)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


def options_help(format: str, filename: str | None) -> str:
    """What ``-o help`` shows: the format's options and, given a name, those of its storage."""
    graph = Graph(REGISTRY)
    found = _described(check_creatable(format))
    head, tail = f"Supported {format} options:", ""
    if filename is None:
        tail = (
            "\nThe protocol level may support further options.\n"
            "Specify the target filename to include those options.\n"
        )
    else:
        head = "Supported options:"
        protocol = str(protocol_options(filename, graph.registry)["driver"])
        found = {**_described(REGISTRY.load_protocol(protocol).CreateOptions), **found}
    return "\n".join([head, *_lines(found)]) + "\n" + tail


def option_lines(options: type[msgspec.Struct]) -> list[str]:
    """A line for each option, by name."""
    return _lines(_described(options))


def _lines(found: Mapping[str, Described]) -> list[str]:
    return [
        f"  {f'{name}=<{option.type}>':<22} - {option.text}"
        for name, option in sorted(found.items())
    ]


def _described(options: type[msgspec.Struct] | None) -> dict[str, Described]:
    return {option.name: option for option in describe(options)} if options else {}
