"""`blk img map`: where an image's data is, for people (data only) or as JSON (everything).

1. Output is written in large pieces; an image of a hundred thousand extents is ordinary.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from blocklayer.api.layers import layer_map
from blocklayer.api.map import MapEntry, map_entries
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    one_filename,
    open_disk,
    size_argument,
)
from blocklayer.cli.options import Command, Option
from blocklayer.errors import StorageError, UnsupportedError
from blocklayer.graph.node import Node

_BATCH = 8192


class Map(Command):
    """Show which ranges of a disk hold data, and where that is stored"""

    OPERANDS = (FILENAME,)
    EXAMPLE = ("--output=json disk.qcow2", "all of the disk, run by run, for programs")

    format: Format = None
    image_opts: ImageOpts = False
    start_offset: Annotated[str, Option("where to start", "s", "OFFSET")] = "0"
    max_length: Annotated[str | None, Option("how far to go", "l", "LENGTH")] = None
    output: Output = "human"
    picture: Annotated[
        str | None,
        Option("draw which layer holds what: an SVG file, or - for the terminal", value="FILE"),
    ] = None
    force_share: ForceShare = False

    @property
    def writes(self) -> bool:
        return False

    async def run(self) -> int:
        start = size_argument(self.start_offset, "start offset")
        wanted = None if self.max_length is None else size_argument(self.max_length, "max length")
        disk = await open_disk(
            one_filename(self.operands),
            format=self.format,
            image_opts=self.image_opts,
            force_share=self.force_share,
            one_pass=True,
        )
        try:
            length = max(0, disk.size - start)
            if wanted is not None:
                length = min(length, wanted)
            if self.picture is not None:
                await _draw(disk.root.node, start, length, self.picture)
                return 0
            entries = map_entries(disk.root.node, start, length)
            if self.output == "json":
                await _write_json(entries, start)
            else:
                await _write_table(entries)
        finally:
            await disk.close()
        return 0


async def _draw(node: Node, start: int, length: int, target: str) -> None:
    if target == "-":
        from blocklayer.cli.picture import terminal

        width = terminal.width()
        cells = terminal.cells(width)
        found = await layer_map(node, cells=cells, offset=start, length=length)
        console.write(terminal.draw(found, width, coloured=terminal.takes_colours()))
        return
    from blocklayer.cli.picture import svg

    found = await layer_map(node, cells=svg.CELLS, offset=start, length=length)
    try:
        with open(target, "w", encoding="utf-8", errors="replace") as file:
            file.write(svg.draw(found))
    except OSError as error:
        raise StorageError.from_os(error, f"Could not write '{target}'", target) from error


async def _write_json(entries: AsyncIterator[MapEntry], start: int) -> None:
    lines: list[str] = []
    written = False
    async for entry in entries:
        lines.append(_json_line(entry))
        if len(lines) == _BATCH:
            console.write((",\n" if written else "[") + ",\n".join(lines))
            lines.clear()
            written = True
    if not written and not lines:
        lines.append(_json_line(MapEntry(start, 0, 0, False, False, False, False)))
    separator = ",\n" if written and lines else "" if written else "["
    console.write(separator + ",\n".join(lines) + "]\n")


_WORD = {False: "false", True: "true"}


def _json_line(entry: MapEntry) -> str:
    tail = "" if entry.offset is None else f', "offset": {entry.offset}'
    return (
        f'{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}, '
        f'"present": {_WORD[entry.present]}, "zero": {_WORD[entry.zero]}, '
        f'"data": {_WORD[entry.data]}, "compressed": {_WORD[entry.compressed]}{tail}}}'
    )


async def _write_table(entries: AsyncIterator[MapEntry]) -> None:
    console.say(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    lines: list[str] = []
    try:
        async for entry in entries:
            if not entry.data or entry.zero:
                continue
            if entry.offset is None:
                raise UnsupportedError("File contains external, encrypted or compressed clusters.")
            lines.append(
                f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(entry.offset):<16}"
                f"{entry.filename}\n"
            )
            if len(lines) == _BATCH:
                console.write("".join(lines))
                lines.clear()
    finally:
        console.write("".join(lines))


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"
