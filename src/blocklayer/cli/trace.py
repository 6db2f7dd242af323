"""`-T`, `--trace`: what a command opens, reads and writes, told line by line while it does.

    -T [enable=]PATTERN[,events=FILE][,file=FILE]

1. Events named as one of QEMU's mean what QEMU's do; those called ``file_…`` are what reaches
   files, from bulk copies too. ``-T help`` lists them. Where QEMU shows addresses, names stand.
2. Tracing is put into the methods it looks at when it is asked for: without it nothing is slower.
3. Lines go to standard error, or to ``file``, in the order in which the requests begin.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple, TextIO

from blocklayer.cli import console
from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.options import parse_pairs

_MEMBERS = ("enable", "events", "file")


_Undo = list[tuple[Any, str, Any]]
"""Owner, attribute, and what it was before."""


class _Event(NamedTuple):
    """An event: what is looked at, and its line, made of what that was called with."""

    place: str
    """``module:Class.method`` or ``module:function``."""
    line: Callable[..., str]


def _asked(root: Any, offset: int, data: Any, **flags: Any) -> str:
    length = data if isinstance(data, int) else len(data)
    return f"node {root.node.name} offset {offset} bytes {length}" + _flags(flags)


def _flags(flags: dict[str, Any]) -> str:
    shown = [name for name, value in flags.items() if value is True]
    return f" flags {'+'.join(shown)}" if shown else ""


def _opened(node: Any) -> str:
    path = getattr(node.driver, "filename", None)
    name = f' filename "{path}"' if path else ""
    return f'node {node.name}{name} format_name "{node.driver.NAME}"'


def _zeroes(node: Any, offset: int, length: int, **flags: Any) -> str:
    return f"node {node.name} offset {offset} count {length}" + _flags(flags)


def _stored(driver: Any, offset: int, data: Any, **flags: Any) -> str:
    length = data if isinstance(data, int) else _length(data)
    return f'filename "{driver.node.filename}" offset {offset} bytes {length}' + _flags(flags)


def _length(data: Any) -> int:
    return sum(map(len, data)) if isinstance(data, (list, tuple)) else len(data)


def _file(driver: Any, *more: Any, **named: Any) -> str:
    return f'filename "{driver.node.filename}"' + (f" size {more[0]}" if more else "")


_ROOT = "blocklayer.graph.root:Root"
_FILE = "blocklayer.drivers.file:FileDriver"
_BULK = f"{_FILE}.thread_safe_io"

EVENTS = {
    "bdrv_open_common": [_Event("blocklayer.graph.open:_open_driver", _opened)],
    "blk_co_preadv": [
        _Event(f"{_ROOT}.read", _asked),
        _Event(f"{_ROOT}.read_into", _asked),
    ],
    "blk_co_pwritev": [_Event(f"{_ROOT}.write", _asked)],
    "bdrv_co_pwrite_zeroes": [_Event("blocklayer.graph.io:write_zeroes", _zeroes)],
    "file_read": [_Event(f"{_FILE}.read", _stored), _Event(f"{_BULK}.read_into", _stored)],
    "file_write": [_Event(f"{_FILE}.write", _stored), _Event(f"{_BULK}.write", _stored)],
    "file_zero": [_Event(f"{_FILE}.zero", _stored)],
    "file_discard": [_Event(f"{_FILE}.discard", _stored)],
    "file_flush": [_Event(f"{_FILE}.flush", _file)],
    "file_truncate": [_Event(f"{_FILE}.truncate", _file)],
}
"""Name: the places where it happens."""


def parse_trace(texts: list[str]) -> tuple[set[str], str | None]:
    """The events that all uses of ``-T`` together enable, and the file they go to.

    Raises UsageError or StorageError. Names of no event give a warning.
    """
    enabled: set[str] = set()
    file = None
    for text in texts:
        members = parse_pairs(text, implied="enable")
        for name in members:
            if name not in _MEMBERS:
                raise UsageError(f"Invalid parameter '{name}'")
        patterns = [members["enable"]] if "enable" in members else []
        for pattern in patterns + _listed(members.get("events")):
            _apply(pattern, enabled)
        file = members.get("file", file)
    return enabled, file


def _listed(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            return [line.strip() for line in lines if line.strip() and line[0] != "#"]
    except OSError as error:
        raise StorageError.from_os(error, path, path) from None


def _apply(pattern: str, enabled: set[str]) -> None:
    """Enable what ``pattern`` names, or with a dash before it disable that."""
    wanted = pattern.removeprefix("-")
    found = {name for name in EVENTS if fnmatchcase(name, wanted)}
    if not found and not any(letter in wanted for letter in "*?["):
        console.warning(f"trace event '{wanted}' does not exist")
    if pattern.startswith("-"):
        enabled -= found
    else:
        enabled |= found


@contextmanager
def tracing(texts: list[str]) -> Iterator[None]:
    """While inside, events are told of as all uses of ``-T`` say."""
    enabled, file = parse_trace(texts)
    undo: _Undo = []
    out: TextIO | None = None
    try:
        if file is not None:
            try:
                out = open(file, "w", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            except OSError as error:
                raise StorageError.from_os(error, file, file) from None
        for name in sorted(enabled):
            for event in EVENTS[name]:
                _look_at(name, event, out, undo)
        yield
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)
        if out is not None:
            out.close()


def _look_at(name: str, event: _Event, out: TextIO | None, undo: _Undo) -> None:
    def say(line: str) -> None:
        stream = out or sys.stderr
        stream.write(f"{name} {line}\n")

    if event.place.startswith(f"{_BULK}."):
        _look_at_bulk(event, say, undo)
        return
    module, _, path = event.place.partition(":")
    owner: Any = import_module(module)
    *classes, attribute = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def told(*values: Any, **named: Any) -> Any:
        say(event.line(*values, **named))
        return original(*values, **named)

    undo.append((owner, attribute, original))
    setattr(owner, attribute, told)


def _look_at_bulk(event: _Event, say: Callable[[str], None], undo: _Undo) -> None:
    """The methods of what ``thread_safe_io`` answers."""
    from blocklayer.drivers.file import FileDriver

    original = FileDriver.thread_safe_io
    attribute = event.place.rpartition(".")[2]

    @functools.wraps(original)
    def told(driver: Any) -> Any:
        found = original(driver)
        return None if found is None else _Told(found, attribute, driver, event, say)

    undo.append((FileDriver, "thread_safe_io", original))
    setattr(FileDriver, "thread_safe_io", told)  # noqa: B010 - mypy knows what a method is


class _Told:
    """Bulk access of which one method is told of."""

    def __init__(
        self, access: Any, attribute: str, driver: Any, event: _Event, say: Callable[[str], None]
    ) -> None:
        self._access = access
        self._attribute = attribute
        self._driver = driver
        self._event = event
        self._say = say

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._access, name)
        if name != self._attribute:
            return method

        def told(offset: int, data: Any) -> Any:
            self._say(self._event.line(self._driver, offset, data))
            return method(offset, data)

        return told


def is_help(texts: list[str]) -> bool:
    """Whether a list of the events is asked for."""
    return any(text in ("help", "?") for text in texts)


def events_text() -> str:
    """The names of all events, line by line."""
    return "".join(f"{name}\n" for name in EVENTS)
