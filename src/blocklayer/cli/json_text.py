"""JSON as the original tools print it: four spaces a level, and brackets on lines of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_INDENT = "    "


def pretty(value: Any, level: int = 0) -> str:
    """``value`` (dicts, lists, plain values) over several lines, without a final newline."""
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(key)}: {pretty(item, level + 1)}" for key, item in value.items()]
        return _block("{", lines, "}", level)
    if isinstance(value, list):
        return _block("[", [pretty(item, level + 1) for item in value], "]", level)
    return json.dumps(value)


def _block(opening: str, lines: list[str], closing: str, level: int) -> str:
    inner = "\n" + _INDENT * (level + 1)
    body = inner + f",{inner}".join(lines) if lines else ""
    return f"{opening}{body}\n{_INDENT * level}{closing}"
