"""Progress: which style is chosen, and what each shows."""

from __future__ import annotations

import io

import msgspec
import pytest

from blocklayer.api.progress import Progress
from blocklayer.cli import console


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def shown(style: str | None, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    with console.Progress(style) as progress:
        for done in range(0, 1001):
            progress.update(done, 1000)
    return stream.getvalue()


def test_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(None, Terminal(), monkeypatch) == ""


def test_percent_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown("bar", io.StringIO(), monkeypatch)
    assert text.startswith("    (0.00/100%)\r    (1.00/100%)\r")
    assert text.endswith("    (100.00/100%)\r\n")


def test_percent_for_the_original_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "program", "qemu-img")
    assert "(100.00/100%)" in shown("bar", Terminal(), monkeypatch)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "program", "blk img")
    text = shown("bar", Terminal(), monkeypatch)
    assert text.endswith("█ 100.00 %\n")
    assert text.count("100.00 %") == 1


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("json") as progress:
        for done in range(0, 1001):
            progress.update(done, 1000)
    told = capsys.readouterr()
    assert told.out == ""
    steps = msgspec.json.Decoder(Progress).decode_lines(told.err)
    assert (steps[-1].done, steps[-1].total, steps[-1].percent) == (1000, 1000, 100.0)
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert steps[-1].rate > 0
    assert steps[-1].eta == 0.0
