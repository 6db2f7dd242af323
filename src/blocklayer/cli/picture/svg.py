"""A layer map as SVG: one bar for the disk, and a lane for each layer.

1. In the bar, each column is filled from below by its layers in proportion, the base at the bottom
   and the active layer on top; in a layer's lane, by what it shows there.
2. What is there at all is seen: its height is never less than a pixel or two.
3. The file needs nothing else: no font, no script, no style from elsewhere.
"""

from __future__ import annotations

from html import escape

from blocklayer.api.layers import Held, LayerMap, LayerUse
from blocklayer.cli.picture.colours import EMPTY, css, layer_colours, pale
from blocklayer.cli.picture.words import amounts, percent, role, short_name
from blocklayer.units import format_size

CELLS = 596
"""Columns of the bar, two pixels each; lanes take two columns together."""

_WIDTH = 1240
_MARGIN = 24
_BAR_TOP, _BAR_HEIGHT = 84, 72
_LANES_TOP, _LANE_STEP, _LANE_HEIGHT = 212, 30, 20
_LANE_LEFT, _LANE_WIDTH = 330, 596
_TICKS = 4
_NAME_WIDTH = 22
_KINDS = ("data", "compressed", "zero")

Rectangle = tuple[float, float, float, float]


def draw(found: LayerMap) -> str:
    """The whole file."""
    height = _LANES_TOP + _LANE_STEP * len(found.layers) + 64
    colours = [css(colour) for colour in layer_colours(len(found.layers))]
    pales = [css(pale(colour)) for colour in layer_colours(len(found.layers))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="13" '
        'fill="#212529">',
        '<defs><pattern id="packed" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="2.5" height="6" fill="#fff" '
        'fill-opacity="0.55"/></pattern></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        *_title(found),
        *_bar(found, colours, pales),
        *_axis(found),
    ]
    for layer in found.layers:
        parts += _lane(found, layer, colours[layer.depth], pales[layer.depth])
    parts += _legend(found, height - 24, colours[0], pales[0])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more}>{escape(text)}</text>'


def _title(found: LayerMap) -> list[str]:
    shown = sum(layer.shown.stored for layer in found.layers)
    count = len(found.layers)
    part = f" from {format_size(found.offset)}" if found.offset else ""
    said = (
        f"{format_size(found.length)}{part} · {count} layer{'s' if count > 1 else ''} · "
        f"{format_size(shown)} of data ({percent(shown, found.length)})"
    )
    name = short_name(found.layers[0].filename, 80)
    return [
        _text(_MARGIN, 40, name, ' font-size="20" font-weight="600"'),
        _text(_MARGIN, 62, said, ' fill="#6c757d"'),
    ]


def _rectangle(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def _path(rectangles: list[Rectangle], fill: str) -> list[str]:
    """All rectangles of one colour as one element; neighbours of equal height become one."""
    if not rectangles:
        return []
    merged: list[Rectangle] = []
    for x, y, width, height in rectangles:
        if merged and merged[-1][1::2] == (y, height) and merged[-1][0] + merged[-1][2] == x:
            left = merged[-1]
            merged[-1] = (left[0], y, left[2] + width, height)
        else:
            merged.append((x, y, width, height))
    steps = "".join(f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z" for x, y, w, h in merged)
    return [f'<path d="{steps}" fill="{fill}" shape-rendering="crispEdges"/>']


def _bar(found: LayerMap, colours: list[str], pales: list[str]) -> list[str]:
    width = _WIDTH - 2 * _MARGIN
    boxes: dict[tuple[int, str], list[Rectangle]] = {}
    for index, cell in enumerate(found.cells):
        left, right = (_MARGIN + width * at / len(found.cells) for at in (index, index + 1))
        top = float(_BAR_TOP + _BAR_HEIGHT)
        for depth, kind, height in _heights(cell, _cell_length(found, index), _BAR_HEIGHT):
            top = round(top - height, 2)
            boxes.setdefault((depth, kind), []).append((left, top, right - left, height))
    parts = [_rectangle(_MARGIN, _BAR_TOP, width, _BAR_HEIGHT, css(EMPTY))]
    for (depth, kind), rectangles in sorted(boxes.items()):
        parts += _path(rectangles, pales[depth] if kind == "zero" else colours[depth])
        if kind == "compressed":
            parts += _path(rectangles, "url(#packed)")
    return parts


def _cell_length(found: LayerMap, index: int) -> int:
    count = len(found.cells)
    return (index + 1) * found.length // count - index * found.length // count


def _heights(cell: dict[int, Held], length: int, full: float) -> list[tuple[int, str, float]]:
    """(depth, kind, height) of what is in a cell, from the base up."""
    found = [
        (depth, kind, getattr(held, kind))
        for depth, held in sorted(cell.items(), reverse=True)
        for kind in _KINDS
        if getattr(held, kind)
    ]
    heights = [max(1.5, full * amount / max(1, length)) for _, _, amount in found]
    # What was made visible must not push others out.
    scale = min(1.0, full / sum(heights)) if heights else 1.0
    return [
        (depth, kind, round(height * scale, 2))
        for (depth, kind, _), height in zip(found, heights, strict=True)
    ]


def _axis(found: LayerMap) -> list[str]:
    parts, width, y = [], _WIDTH - 2 * _MARGIN, _BAR_TOP + _BAR_HEIGHT
    for tick in range(_TICKS + 1):
        x = _MARGIN + width * tick / _TICKS
        anchor = ("start", "middle", "end")[(tick > 0) + (tick == _TICKS)]
        place = found.offset + found.length * tick // _TICKS
        parts.append(_rectangle(x - 0.5, y, 1, 5, "#adb5bd"))
        parts.append(
            _text(x, y + 20, format_size(place), f' text-anchor="{anchor}" fill="#6c757d"')
        )
    return parts


def _lane(found: LayerMap, layer: LayerUse, colour: str, pale_colour: str) -> list[str]:
    top = _LANES_TOP + _LANE_STEP * layer.depth
    baseline = top + 15
    name = short_name(layer.filename, _NAME_WIDTH)
    parts = [
        _rectangle(_MARGIN, top + 3, 14, 14, colour, ' rx="3"'),
        _text(_MARGIN + 24, baseline, name),
        _text(
            _LANE_LEFT - 12,
            baseline,
            f"{role(layer.depth, len(found.layers))} · {layer.format}",
            ' text-anchor="end" fill="#6c757d" font-size="11"',
        ),
        _rectangle(_LANE_LEFT, top, _LANE_WIDTH, _LANE_HEIGHT, "#f1f3f5"),
    ]
    boxes: dict[str, list[Rectangle]] = {}
    step = _LANE_WIDTH / len(found.cells) * 2
    for index in range(0, len(found.cells), 2):
        pair = found.cells[index : index + 2]
        length = sum(_cell_length(found, index + at) for at in range(len(pair)))
        held = Held()
        for cell in pair:
            own = cell.get(layer.depth, Held())
            held.data += own.data
            held.compressed += own.compressed
            held.zero += own.zero
        bottom = float(top + _LANE_HEIGHT)
        width = step * len(pair) / 2
        for _, kind, height in _heights({layer.depth: held}, length, _LANE_HEIGHT):
            bottom = round(bottom - height, 2)
            box = (_LANE_LEFT + step * index / 2, bottom, width, height)
            boxes.setdefault(kind, []).append(box)
    for kind, rectangles in boxes.items():
        parts += _path(rectangles, pale_colour if kind == "zero" else colour)
        if kind == "compressed":
            parts += _path(rectangles, "url(#packed)")
    said = f"{percent(layer.shown.total, found.length)} · {amounts(layer.shown)}"
    right = _LANE_LEFT + _LANE_WIDTH + 12
    said = said if layer.shown.total else "shows nothing"
    return [*parts, _text(right, baseline, said, ' font-size="11"')]


def _legend(found: LayerMap, y: float, colour: str, pale_colour: str) -> list[str]:
    parts: list[str] = []
    x = float(_MARGIN)
    empty = f"in no layer ({format_size(found.absent)}, {percent(found.absent, found.length)})"
    for fill, packed, word in (
        (colour, False, "data"),
        (colour, True, "compressed"),
        (pale_colour, False, "zeroes that a layer has"),
        (css(EMPTY), False, empty),
    ):
        parts.append(_rectangle(x, y - 11, 14, 14, fill, ' rx="3"'))
        if packed:
            parts.append(_rectangle(x, y - 11, 14, 14, "url(#packed)", ' rx="3"'))
        parts.append(_text(x + 22, y, word, ' fill="#6c757d"'))
        x += 44 + 7.2 * len(word)
    return parts
