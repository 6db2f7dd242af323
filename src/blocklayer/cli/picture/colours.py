"""Colours of layers: one each, warm for the active layer, cool for the base.

1. Neighbours differ in hue or, where there are many, in lightness as well.
2. Text on them is never needed: names stand beside.
"""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]

_FIRST_HUE = 22 / 360
_LAST_HUE = -150 / 360
"""From orange by red, violet and blue to teal."""
_MANY = 8
_WHITE: Colour = (255, 255, 255)

EMPTY: Colour = (233, 236, 239)


def layer_colours(count: int) -> list[Colour]:
    """``count`` colours, from the active layer down."""
    found = []
    for index in range(count):
        part = index / max(1, count - 1) if count > 1 else 0.0
        hue = (_FIRST_HUE + (_LAST_HUE - _FIRST_HUE) * part) % 1.0
        lightness = 0.52 if count <= _MANY else (0.46, 0.62)[index % 2]
        red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.66)
        found.append((round(red * 255), round(green * 255), round(blue * 255)))
    return found


def pale(colour: Colour) -> Colour:
    """What stands for zeros of a layer with ``colour``."""
    mixed = [round(part * 0.35 + white * 0.65) for part, white in zip(colour, _WHITE, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def css(colour: Colour) -> str:
    """As ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
