"""What commands say: results to standard output, errors and warnings to standard error, progress.

1. Every line on standard error starts with the name the program was called by.
2. Progress is a bar on a terminal; elsewhere, and for a program called by an original tool's name,
   it is that tool's own ``(12.34/100%)``. As ``json`` it is one object a line, on standard error,
   so that standard output has the result only.
3. Whoever asks by a signal gets one line at once, on standard error, whatever the style.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec

from blocklayer.api.progress import Meter
from blocklayer.api.progress import Progress as ProgressReport
from blocklayer.errors import StorageError

program = "blk"
"""The name the program was called by; set once, by ``main``."""

_BAR_WIDTH = 40
_REDRAW_INTERVAL_S = 0.1
_LEAST_STEP = 0.01


class OutputError(StorageError):
    """Standard output takes no more (its disk is full)."""


_captured: ContextVar[list[str] | None] = ContextVar("captured", default=None)


@contextmanager
def captured() -> Iterator[list[str]]:
    """What this task, and those it starts, say meanwhile; none of it is put out."""
    said: list[str] = []
    token = _captured.set(said)
    try:
        yield said
    finally:
        _captured.reset(token)


def write(text: str) -> None:
    """Put ``text`` on standard output as it is. Raises OutputError, or BrokenPipeError."""
    kept = _captured.get()
    if kept is not None:
        kept.append(text)
        return
    if sys.stdout is None:
        raise OutputError("standard output is closed", errno.EBADF)
    try:
        sys.stdout.write(text)
    except OSError as error:
        raise _failure(error) from error


def say(line: str) -> None:
    """One line of result."""
    write(line + "\n")


def flush() -> None:
    """Hand over what is buffered. Raises OutputError, or BrokenPipeError."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _failure(error) from error


def _failure(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return error
    return OutputError.from_os(error, "cannot write to standard output")


def error(message: str, by: str | None = None) -> None:
    """Why it did not work."""
    complain(f"{by or program}: {message}")


def warning(message: str) -> None:
    """What the user should know although it works."""
    complain(f"{program}: warning: {message}")


def complain(line: str) -> None:
    """A line on standard error, after all results so far."""
    flush()
    kept = _captured.get()
    if kept is not None:
        kept.append(line + "\n")
    elif sys.stderr is not None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Progress:
    """How far a long command is. Use with ``with``; ``style`` None shows nothing.

    ``style`` is what ``-p`` or ``--progress[=json]`` gave: "bar" or "json". ``aside`` shows it on
    standard error, where standard output has other uses.
    """

    def __init__(self, style: str | None, *, aside: bool = False) -> None:
        self._style = style
        self._aside = aside
        output = sys.stderr if aside else sys.stdout
        on_terminal = output is not None and output.isatty()
        if style == "bar" and (program.startswith("qemu-") or not on_terminal):
            self._style = "percent"
        self._meter = Meter(_say_json) if style == "json" else None
        self._shown = -1.0
        self._drawn_s = 0.0
        self.fraction = 0.0
        """What part is finished, 0 to 1."""

    def __enter__(self) -> Progress:
        _running.append(self)
        if self._meter is None:
            self.update(0, 1)
        return self

    def __exit__(self, *failure: object) -> None:
        _running.remove(self)
        if self._style in ("bar", "percent"):
            self._show("\n")

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes (or other units) are finished."""
        self.fraction = fraction = min(1.0, done / total) if total else 1.0
        if self._meter is not None:
            self._meter.update(done, total)
        if self._style not in ("bar", "percent"):
            return
        now_s = time.monotonic()
        complete = fraction == 1.0 and self._shown != 1.0
        if self._style == "bar":
            due = now_s - self._drawn_s >= _REDRAW_INTERVAL_S
        else:
            due = fraction - self._shown >= _LEAST_STEP
        if not (due or complete or self._shown < 0):
            return
        self._shown, self._drawn_s = fraction, now_s
        self._show(self._line(fraction))

    def _show(self, text: str) -> None:
        if self._aside:
            if sys.stderr is not None:
                sys.stderr.write(text)
                sys.stderr.flush()
            return
        write(text)
        flush()

    def _line(self, fraction: float) -> str:
        percent = fraction * 100
        if self._style == "percent":
            return f"    ({percent:3.2f}/100%)\r"
        filled = int(fraction * _BAR_WIDTH)
        return f"\r{'█' * filled}{'░' * (_BAR_WIDTH - filled)} {percent:6.2f} %"


_running: list[Progress] = []


def _say_json(report: ProgressReport) -> None:
    complain(msgspec.json.encode(report).decode())


def answer_signal(*received: object) -> None:
    """Say how far the running command is: a signal handler."""
    if _running:
        # Past sys.stderr's buffer, which the signal may have interrupted in the middle of a line.
        os.write(2, f"    ({_running[-1].fraction * 100:3.2f}/100%)\n".encode())
