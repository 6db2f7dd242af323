"""Layer maps and chains as text: blocks and, where the terminal takes them, colours.

1. Without colours a layer is known by its letter, so that nothing is lost in a file or a pipe.
2. No line is longer than the width given, names being cut first.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import Final

from blocklayer.api.layers import Chain, ChainLayer, Held, LayerMap, LayerUse
from blocklayer.cli.picture.colours import Colour, layer_colours, pale
from blocklayer.cli.picture.words import amounts, percent, role, short_name
from blocklayer.units import format_size

ROWS: Final = 4
"""Lines that the disk takes."""

_LEAST_WIDTH, _MOST_WIDTH = 60, 160
_LABEL_WIDTH = 9
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LEVELS = " ▁▂▃▄▅▆▇█"
_NAME_WIDTH = 22
_AMOUNT_WIDTH = 9


def width() -> int:
    """Columns to draw in: the terminal's, within reason."""
    return max(_LEAST_WIDTH, min(_MOST_WIDTH, shutil.get_terminal_size((100, 24)).columns))


def takes_colours() -> bool:
    """Whether standard output is a terminal whose user does not mind colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def cells(columns: int) -> int:
    """How many cells a map needs to be drawn in ``columns``."""
    return ROWS * (columns - _LABEL_WIDTH - 1)


class _Pen:
    """Writes in colours, or does not."""

    def __init__(self, count: int, coloured: bool) -> None:
        self._colours = layer_colours(count)
        self._coloured = coloured

    def paint(self, text: str, depth: int, *, zero: bool = False) -> str:
        if not self._coloured:
            return text
        colour: Colour = pale(self._colours[depth]) if zero else self._colours[depth]
        return "\x1b[38;2;{};{};{}m{}\x1b[0m".format(*colour, text)

    def letter(self, depth: int, held: Held) -> str:
        """One cell of the disk, which ``depth`` shows most of."""
        if held.zero > held.stored:
            return self.paint("░", depth, zero=True)
        if self._coloured:
            return self.paint("▓" if held.compressed > held.data else "█", depth)
        return letter_of(depth)

    def faint(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._coloured else text


def letter_of(depth: int) -> str:
    """What stands for a layer where there are no colours."""
    return _LETTERS[depth] if depth < len(_LETTERS) else "+"


def draw(found: LayerMap, columns: int, *, coloured: bool) -> str:
    """A layer map made with ``cells(columns)`` cells."""
    pen = _Pen(len(found.layers), coloured)
    lines = [_head(found, columns), ""]
    per_row = -(-len(found.cells) // ROWS)
    for start in range(0, len(found.cells), per_row):
        place = found.offset + start * found.length // len(found.cells)
        row = "".join(_cell(pen, cell) for cell in found.cells[start : start + per_row])
        lines.append(f"{pen.faint(f'{format_size(place):>{_LABEL_WIDTH}}')} {row}")
    lines.append("")
    lines += [_lane(pen, found, layer, columns) for layer in found.layers]
    empty = f"{format_size(found.absent)} ({percent(found.absent, found.length)})"
    lines += ["", pen.faint(f"░ zeroes that a layer has   · in no layer: {empty}"), ""]
    return "\n".join(lines)


def _head(found: LayerMap, columns: int) -> str:
    said = f"  {format_size(found.length)}, {len(found.layers)} layer"
    said += "s" if len(found.layers) != 1 else ""
    return short_name(found.layers[0].filename, columns - len(said)) + said


def _cell(pen: _Pen, cell: dict[int, Held]) -> str:
    if not cell:
        return pen.faint("·")
    # Data are what one looks for: zeros show only where there is nothing else.
    depth = max(cell, key=lambda layer: (cell[layer].stored, cell[layer].zero))
    return pen.letter(depth, cell[depth])


def _lane(pen: _Pen, found: LayerMap, layer: LayerUse, columns: int) -> str:
    mark = pen.paint("■", layer.depth) + " " + letter_of(layer.depth)
    name = f"{short_name(layer.filename, _NAME_WIDTH):<{_NAME_WIDTH}}"
    room = columns - _NAME_WIDTH - 2 * _AMOUNT_WIDTH - 8
    lane = "".join(_level(pen, found, layer.depth, index, room) for index in range(room))
    stored = f"{format_size(layer.shown.stored):>{_AMOUNT_WIDTH}}"
    share = f"{percent(layer.shown.stored, found.length):>{_AMOUNT_WIDTH - 2}}"
    return f"{mark} {name} {lane} {stored} {share}"


def _level(pen: _Pen, found: LayerMap, depth: int, index: int, room: int) -> str:
    count = len(found.cells)
    first, last = index * count // room, max(index * count // room + 1, (index + 1) * count // room)
    stored = zero = 0
    for cell in found.cells[first:last]:
        if depth in cell:
            stored += cell[depth].stored
            zero += cell[depth].zero
    length = last * found.length // count - first * found.length // count
    if stored:
        steps = len(_LEVELS) - 1
        return pen.paint(_LEVELS[max(1, min(steps, round(steps * stored / length)))], depth)
    return pen.paint("░", depth, zero=True) if zero else pen.faint("·")


def draw_chain(found: Chain, columns: int, *, coloured: bool) -> str:
    """The images of a chain, one below the other, and what merging them would move."""
    count = len(found.layers)
    pen = _Pen(count, coloured)
    lines: list[str] = []
    for layer in found.layers:
        last = layer.depth == count - 1
        lines.append(_image_line(pen, layer, count, columns))
        rail = " " if last else pen.paint("│", layer.depth)
        lines += [f"{rail}   {text}" for text in _facts(layer)]
        if not last:
            lines.append(pen.paint("▼", layer.depth))
    if count > 1:
        top = short_name(found.layers[0].filename, _NAME_WIDTH)
        lines += ["", f"To stand alone, {top} would take in {format_size(found.stream_all)}."]
    return "\n".join([*lines, ""])


def _image_line(pen: _Pen, layer: ChainLayer, count: int, columns: int) -> str:
    used = "" if layer.actual_size is None else f", {format_size(layer.actual_size)} on disk"
    said = f"  {layer.format}, {format_size(layer.virtual_size)}{used}"
    flags = [role(layer.depth, count)] if count > 1 else []
    flags += [
        word for word, there in (("dirty", layer.dirty), ("encrypted", layer.encrypted)) if there
    ]
    if layer.snapshots:
        flags.append(f"{layer.snapshots} snapshot{'s' if layer.snapshots > 1 else ''}")
    said += f"  [{', '.join(flags)}]" if flags else ""
    name = short_name(layer.filename, max(8, columns - len(said) - 2))
    return f"{pen.paint('●', layer.depth)} {name}{said}"


def _facts(layer: ChainLayer) -> list[str]:
    hidden = f"; {format_size(layer.hidden)} hidden by layers above" if layer.hidden else ""
    facts = [f"holds {amounts(layer.own)}{hidden}"]
    if layer.commit_into is not None and layer.depth > 1:
        facts.append(f"committing all above into it moves {format_size(layer.commit_into)}")
    if layer.stream_onto:
        facts.append(f"streaming what is between moves {format_size(layer.stream_onto)} up")
    if layer.commit_down is not None:
        facts.append(f"committing it down moves {format_size(layer.commit_down)}")
    return facts
