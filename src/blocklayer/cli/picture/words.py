"""Words for pictures: short names, sizes and shares."""

from __future__ import annotations

import os

from blocklayer.api.layers import Held
from blocklayer.units import format_size


def short_name(filename: str, width: int) -> str:
    """The last part of a name, its middle left out where it is too long, all of it printable."""
    plain = filename if filename.startswith("json:") else os.path.basename(filename) or filename
    plain = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in plain
    )
    if len(plain) <= width:
        return plain
    tail = (width - 1) // 2
    return f"{plain[: width - 1 - tail]}…{plain[-tail:]}"


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole``: "12 %", "<0.1 %"."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "<0.1 %"
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"


def amounts(held: Held) -> str:
    """What a layer has, in words."""
    parts = [
        f"{format_size(length)}{word}"
        for length, word in (
            (held.data, ""),
            (held.compressed, " compressed"),
            (held.zero, " zeroes"),
        )
        if length
    ]
    return ", ".join(parts) or "nothing"


def role(depth: int, count: int) -> str:
    """What a layer is in its chain."""
    if depth == 0:
        return "active"
    return "base" if depth == count - 1 else f"layer {depth}"
