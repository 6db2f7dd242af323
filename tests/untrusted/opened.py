"""Which files a piece of code opens: everything that Python opens, by any means, is noted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_watching: list[set[str]] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        for seen in _watching:
            seen.add(path)


sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[set[str]]:
    """The real paths of all files that are opened inside, those of Python's own modules left out.

    Looking at a file's size or kind is not opening it.
    """
    seen: set[str] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
        home = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))
        ours = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..", "src"))
        library = {path for path in seen if path.startswith((*home, ours))}
        seen -= library
