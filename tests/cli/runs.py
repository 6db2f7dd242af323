"""Running our program in this process and the real one beside it, on the same arguments."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from blocklayer.cli.main import main
from oracles import Oracle


class Outcome(NamedTuple):
    """What a run printed and how it ended."""

    code: int
    out: str
    err: str


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working directory is ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def ours(line: str | list[str], folder: Path, called: str = "qemu-img") -> Outcome:
    """Run our program, by the name ``called``, in this process."""
    arguments = shlex.split(line) if isinstance(line, str) else line
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with inside(folder), redirect_stdout(out), redirect_stderr(err):
        code = main(arguments, called)
    return Outcome(code, _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("utf-8", "surrogateescape")


def theirs(tool: Oracle, line: str | list[str], folder: Path) -> Outcome:
    """Run the real tool."""
    arguments = shlex.split(line) if isinstance(line, str) else line
    done = tool(*arguments, check=False, cwd=folder)
    return Outcome(done.returncode, done.stdout, done.stderr.replace(tool.path, tool.tool))


def first_line(text: str) -> str:
    """``text`` up to its first line end."""
    return text.partition("\n")[0]
