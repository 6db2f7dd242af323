"""`blk shell`: what lines mean, completion, scripts, and a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.cli.shell.completion import Completer
from blocklayer.cli.shell.parsing import parse_message, parse_value, split_words
from blocklayer.errors import UsageError
from blocklayer.graph.events import EVENTS, JobStatusChange
from blocklayer.qmp.commands import COMMANDS
from blocklayer.qmp.schema import schema
from blocklayer.qmp.server import Server
from oracles import HANG_TIMEOUT_S
from qmp.conversation import run, serving

LINES = [
    ("query-version", {"execute": "query-version"}),
    ("a x=1 y=-2 z=1.5", {"execute": "a", "arguments": {"x": 1, "y": -2, "z": 1.5}}),
    ("a x=true y=False z=null", {"execute": "a", "arguments": {"x": True, "y": False, "z": None}}),
    ("a x=64k y=it's z=inf", {"execute": "a", "arguments": {"x": "64k", "y": "it's", "z": "inf"}}),
    ("a f.d=raw f.e.x=1", {"execute": "a", "arguments": {"f": {"d": "raw", "e": {"x": 1}}}}),
    ('a x={"b": [1, true]} y=2', {"execute": "a", "arguments": {"x": {"b": [1, True]}, "y": 2}}),
    ("a x={'b':[1,null,True]}", {"execute": "a", "arguments": {"x": {"b": [1, None, True]}}}),
    ("a x=\"b c\" y='d e'", {"execute": "a", "arguments": {"x": "b c", "y": "d e"}}),
    ("a x=b=c", {"execute": "a", "arguments": {"x": "b=c"}}),
    ("a x=", {"execute": "a", "arguments": {"x": ""}}),
    ('{"execute": "a", "id": 5}', {"execute": "a", "id": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), LINES)
def test_lines(line: str, message: dict[str, Any]) -> None:
    assert parse_message(line) == message


@pytest.mark.parametrize(
    "line",
    ["a b", "a =1", "a x=1 x=2", "a x=1 x.y=2", "a x.y=1 x=2", "a x={", 'a x="b', "a x={b}", "{"],
)
def test_mistakes(line: str) -> None:
    with pytest.raises(UsageError):
        parse_message(line)


@given(st.text(max_size=40))
def test_any_line_is_a_message_or_a_mistake(line: str) -> None:
    if not line.strip():
        return
    try:
        parse_message(line)
    except UsageError:
        pass


@given(st.recursive(st.integers(0, 1 << 60) | st.text(max_size=5), st.lists, max_leaves=5))
def test_values_in_json(value: Any) -> None:
    text = json.dumps(value, separators=(",", ":"))
    assert split_words(f"a x={text}")[1] == f"x={text}"
    assert parse_value(text) == value


COMPLETIONS = [
    ("query-na", ["query-name", "query-named-block-nodes"]),
    ("quer", sorted(command.name for command in COMMANDS if command.name.startswith("query"))),
    ("query-name ", []),
    ("ringbuf-read ", ["device=", "format=", "size="]),
    ("ringbuf-read size=1 f", ["format="]),
    ("ringbuf-read format=", ["format=base64", "format=utf8"]),
    ("chardev-add b", ["backend."]),
    ("chardev-add backend.t", ["backend.type="]),
    ("chardev-add backend.type=so", ["backend.type=socket"]),
    ("chardev-add backend.type=socket backend.data.s", ["backend.data.server="]),
    (
        "chardev-add backend.type=socket backend.data.server=",
        ["backend.data.server=false", "backend.data.server=true"],
    ),
    ("nope x", []),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS)
def test_completion(line: str, expected: list[str]) -> None:
    assert Completer(schema(COMMANDS, EVENTS)).candidates(line) == expected


def shell(*arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blocklayer.cli.main", "shell", *arguments]
    return subprocess.run(command, input=input, capture_output=True, text=True, check=False)


def shell_against(path: Path, *arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    async def check() -> subprocess.CompletedProcess[str]:
        async with serving(path, name="disks"):
            return await asyncio.to_thread(shell, *arguments, str(path), input=input)

    return run(check())


def test_a_script(tmp_path: Path) -> None:
    script = "# a comment\nquery-name\n\nchardev-add id=n backend.type='null' backend.data={}\n"
    done = shell_against(tmp_path / "q", input=script)
    assert done.stdout.splitlines() == ['{"return": {"name": "disks"}}', '{"return": {}}']
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_that_fails(tmp_path: Path) -> None:
    done = shell_against(tmp_path / "q", input="query-name x=1\nquery-name\n")
    assert done.returncode == 1
    assert '"desc": "Parameter \'x\' is unexpected"' in done.stdout
    assert '{"return": {"name": "disks"}}' in done.stdout
    done = shell_against(tmp_path / "q", input="query-name x\n")
    assert done.returncode == 1
    assert done.stderr == "blk shell: 'x' is no argument: write name=value\n"


def test_what_was_sent_is_shown_and_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = shell_against(tmp_path / "q", "-v", "-p", "-l", str(log), input="query-name\n")
    assert done.stdout.startswith('{\n    "execute": "query-name"\n}\n{\n    "return": {')
    assert log.read_text() == '-> {"execute": "query-name"}\n<- {"return": {"name": "disks"}}\n'


def test_transactions(tmp_path: Path) -> None:
    several = "transaction(\na x=1\nb y.z=2\n)\ntransaction( c )\n"
    done = shell_against(tmp_path / "q", "-v", input=several)
    first, _, second, _ = done.stdout.splitlines()
    actions = [{"type": "a", "data": {"x": 1}}, {"type": "b", "data": {"y": {"z": 2}}}]
    assert json.loads(first)["arguments"]["actions"] == actions
    assert json.loads(second)["arguments"]["actions"] == [{"type": "c", "data": {}}]
    done = shell_against(tmp_path / "q", input="transaction(\na x=1\n")
    assert done.returncode == 1
    assert "not ended" in done.stderr


def test_the_human_monitor(tmp_path: Path) -> None:
    done = shell_against(tmp_path / "q", "-H", input="info name\ninfo version\n")
    assert done.stdout.splitlines()[0] == "disks"
    assert done.returncode == 0


def test_no_daemon(tmp_path: Path) -> None:
    done = shell(str(tmp_path / "q"), input="")
    assert done.returncode == 1
    assert "Failed to connect to" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_that_ends(tmp_path: Path) -> None:
    async def check() -> subprocess.CompletedProcess[str]:
        async with serving(tmp_path / "q") as server:
            running = asyncio.create_task(
                asyncio.to_thread(shell, str(tmp_path / "q"), input="quit\nquery-name\n")
            )
            await server.stopping.wait()
            await server.close()
            return await running

    done = run(check())
    assert '{"return": {}}' in done.stdout
    assert "Traceback" not in done.stderr


class Terminal:
    """The shell on a pseudo terminal."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self.unread = ""
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.environ.update(XDG_STATE_HOME=str(state), TERM="dumb")
            module = ["-m", "blocklayer.cli.main", "shell", *arguments]
            os.execv(sys.executable, [sys.executable, *module])

    def until(self, text: str) -> str:
        """What comes up to `text`; what comes after it stays for the next time."""
        while text not in self.unread:
            ready = select.select([self.descriptor], [], [], HANG_TIMEOUT_S / 4)[0]
            assert ready, f"no {text!r} in {self.unread!r}"
            self.unread += os.read(self.descriptor, 4096).decode()
        found, _, self.unread = self.unread.partition(text)
        return found + text

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C; the kernel drops what is on its way then, so the next prompt is asked for."""
        self.type("\x03")
        while not select.select([self.descriptor], [], [], 0.2)[0]:
            self.type("\n")

    def ended(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self.descriptor, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def at_a_terminal(path: Path, use: Callable[[Terminal, Server], None]) -> None:
    async def check() -> None:
        async with serving(path, name="disks") as server:
            terminal = Terminal(str(path), state=path.parent)
            try:
                await asyncio.to_thread(use, terminal, server)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(terminal.process, signal.SIGKILL)
                os.close(terminal.descriptor)

    run(check())


def test_a_terminal(tmp_path: Path) -> None:
    def use(terminal: Terminal, server: Server) -> None:
        assert "Connected to blocklayer" in terminal.until("(qmp) ")
        terminal.type("query-na\t\n")
        assert '"name": "disks"' in terminal.until("}}")
        terminal.until("(qmp) ")
        loop = server.events._clock
        event = JobStatusChange(id="job0", status="ready")
        loop.call_soon_threadsafe(server.events.emit, event)  # type: ignore[attr-defined]
        assert "job0" in terminal.until("(qmp) ")
        terminal.type("half a li")
        terminal.until("half a li")
        terminal.interrupt()
        terminal.type("query-version\n")
        assert "package" in terminal.until('"}')
        terminal.until("(qmp) ")
        terminal.type("\x04")
        assert terminal.ended() == 0

    at_a_terminal(tmp_path / "q", use)
    assert "query-name" in (tmp_path / "blocklayer" / "qmp_history").read_text()
