"""Clients good and bad: order, out-of-band, and nobody else held up."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from blocklayer.graph.events import Event
from blocklayer.qmp import session
from blocklayer.qmp.commands.protocol import qmp_capabilities, query_version
from blocklayer.qmp.monitor import MAX_REQUESTS, Monitor
from blocklayer.qmp.registry import Arguments, CommandTable
from qmp.conversation import Peer, as_bytes, run, serving

TABLE = CommandTable()
TABLE.command("qmp_capabilities")(qmp_capabilities)
TABLE.command("query-version", allow_oob=True)(query_version)


class Gates:
    """What the test commands wait for, and what they have done."""

    open: asyncio.Event
    begun: list[int]


class Wait(Arguments):
    number: int


class Fail(Arguments):
    how: Literal["bug", "os", "deep"]


class Happened(Event):
    NAME: ClassVar[str] = "HAPPENED"
    text: str


@TABLE.command("wait")
async def wait(monitor: Monitor, arguments: Wait) -> int:
    """Wait until the test says so."""
    Gates.begun.append(arguments.number)
    await Gates.open.wait()
    return arguments.number


@TABLE.command("fail")
async def fail(monitor: Monitor, arguments: Fail) -> None:
    """Go wrong."""
    if arguments.how == "os":
        os.stat("/nowhere")
    raise RuntimeError("not thought of")


@TABLE.command("long")
async def long(monitor: Monitor) -> str:
    """A long reply."""
    return "x" * 100_000


@TABLE.command("emit")
async def emit(monitor: Monitor) -> None:
    """Make an event."""
    monitor.server.events.emit(Happened(text="x" * 1000))


def serve(path: Path) -> Any:
    Gates.open = asyncio.Event()
    Gates.begun = []
    return serving(path, commands=TABLE, event_types=(Happened,))


def ask(number: int) -> bytes:
    return as_bytes({"execute": "wait", "arguments": {"number": number}, "id": number})


async def until(condition: Any) -> None:
    """Let others run until `condition` holds."""
    while not condition():
        await asyncio.sleep(0)


def test_in_order_and_out_of_band(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q"):
            peer = await Peer.connect(tmp_path / "q")
            await peer.read()
            await peer.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
            peer.writer.write(ask(1) + ask(2) + b"nonsense " + ask(3))
            overtaking = await peer.ask({"exec-oob": "query-version", "id": "now"})
            assert overtaking["id"] == "now"
            assert Gates.begun == [1]
            refused = await peer.ask({"exec-oob": "wait", "id": 5})
            assert refused["error"]["desc"] == "The command wait does not support OOB"
            Gates.open.set()
            replies = [await peer.read() for _ in range(4)]
            assert [reply.get("id") for reply in replies] == [1, 2, None, 3]
            assert Gates.begun == [1, 2, 3]
            await peer.close()

    run(check())


def test_requests_that_wait_are_bounded(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q") as server:
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            peer.writer.write(b"".join(ask(n) for n in range(500)))
            await until(lambda: Gates.begun)
            (monitor,) = server.sessions
            await until(monitor._requests.full)
            assert monitor._requests.qsize() == MAX_REQUESTS
            Gates.open.set()
            assert [(await peer.read())["return"] for _ in range(500)] == list(range(500))
            await peer.close()

    run(check())


def test_failures_leave_the_monitor_alive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q"):
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            os_error = await peer.ask({"execute": "fail", "arguments": {"how": "os"}})
            assert os_error["error"]["desc"] == "No such file or directory"
            bug = await peer.ask({"execute": "fail", "arguments": {"how": "bug"}, "id": 3})
            assert bug["id"] == 3
            assert "internal error: RuntimeError: not thought of" in bug["error"]["desc"]
            assert (await peer.ask({"execute": "query-version"}))["return"]
            await peer.close()

    run(check())
    printed = capsys.readouterr()
    assert "not thought of" in printed.err
    assert printed.out == ""


def test_a_client_that_leaves_in_the_middle(tmp_path: Path) -> None:
    """Its command goes on to its end; the next client is served."""

    async def check() -> None:
        async with serve(tmp_path / "q"):
            first = await (await Peer.connect(tmp_path / "q")).greeted()
            first.writer.write(ask(1))
            await first.writer.drain()
            await until(lambda: Gates.begun)
            await first.close()
            waiting = asyncio.create_task(Peer.connect(tmp_path / "q"))
            Gates.open.set()
            second = await (await waiting).greeted()
            assert (await second.ask({"execute": "query-version"}))["return"]
            second.writer.write(b'{"execute": "query-ver')
            await second.close()
            third = await (await Peer.connect(tmp_path / "q")).greeted()
            assert (await third.ask({"execute": "query-version"}))["return"]
            await third.close()

    run(check())


def test_input_that_ends_is_still_answered(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q"):
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            peer.writer.write(b"".join(ask(n) for n in range(20)))
            peer.writer.write_eof()
            Gates.open.set()
            assert [(await peer.read())["return"] for _ in range(20)] == list(range(20))
            assert await peer.reader.read() == b""
            await peer.close()

    run(check())


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little room for what a client does not read."""
    monkeypatch.setattr(session, "MAX_QUEUED", 300_000)


def test_a_client_that_never_reads(
    tmp_path: Path, narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q") as server:
            server_2 = tmp_path / "q2"
            from blocklayer.qmp.chardev_options import parse_chardev, parse_monitor

            device = parse_chardev(f"socket,id=m2,path={server_2},server=on,wait=off")
            await server.add_chardev(device.id, device.backend)
            server.add_monitor(parse_monitor("m2"))
            deaf = await (await Peer.connect(tmp_path / "q")).greeted()
            (deaf_monitor,) = server.sessions
            # Replies: it is not given the next one, and its input is not read, but for 8 requests.
            deaf.writer.transport.pause_reading()
            deaf.writer.write(as_bytes({"execute": "long"}) * 50)
            await until(deaf_monitor._requests.full)
            good = await (await Peer.connect(server_2)).greeted()
            for _ in range(1000):
                # Events: it misses those that have no room, and only those.
                good.writer.write(as_bytes({"execute": "emit"}))
                kinds = [await good.read(), await good.read()]
                assert {"event", "return"} <= {key for message in kinds for key in message}
            assert deaf_monitor._queued <= 300_000 + 200_000
            assert deaf_monitor.dropped_events > 0
            deaf.writer.transport.resume_reading()
            messages = [await deaf.read() for _ in range(50)]
            events = sum("event" in message for message in messages)
            await good.close()
            await deaf.close()
            assert events > 0

    run(check())
    assert capsys.readouterr().err.count("events for it are dropped") == 1


def test_events_begin_with_negotiation(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q") as server:
            peer = await Peer.connect(tmp_path / "q")
            await peer.read()
            server.events.emit(Happened(text="too early"))
            await peer.ask({"execute": "qmp_capabilities"})
            server.events.emit(Happened(text="now"))
            event = await peer.read()
            assert event["event"] == "HAPPENED"
            assert event["data"] == {"text": "now"}
            assert set(event["timestamp"]) == {"seconds", "microseconds"}
            await peer.close()

    run(check())


def test_closing_the_server_ends_every_conversation(tmp_path: Path) -> None:
    async def check() -> None:
        async with serve(tmp_path / "q"):
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            silent = await Peer.connect(tmp_path / "q")
        assert await peer.reader.read() == b""
        assert not (tmp_path / "q").exists()
        await peer.close()
        await silent.close()

    run(check())


def send_with_descriptor(path: Path, messages: list[tuple[bytes, list[int]]]) -> list[bytes]:
    """Replies to messages, each sent with its descriptors."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        file = sock.makefile("rb")
        file.readline()
        replies = []
        for message, descriptors in messages:
            socket.send_fds(sock, [message], descriptors)
            replies.append(file.readline())
        return replies


def test_descriptors_come_with_their_command(tmp_path: Path) -> None:
    def get(name: str) -> bytes:
        return as_bytes({"execute": "getfd", "arguments": {"fdname": name}})

    readers = []

    def pipe() -> int:
        reader, writer = os.pipe()
        readers.append(reader)
        return writer

    script = [
        (as_bytes({"execute": "qmp_capabilities"}), []),
        (get("a"), []),
        (get("a"), [pipe()]),
        (get("1a"), [pipe()]),
        (as_bytes({"execute": "query-name"}), [pipe(), pipe()]),
        (get("b"), []),
        (as_bytes({"execute": "closefd", "arguments": {"fdname": "a"}}), []),
        (as_bytes({"execute": "closefd", "arguments": {"fdname": "a"}}), []),
        (as_bytes({"execute": "add-fd", "arguments": {"fdset-id": 3, "opaque": "o"}}), [pipe()]),
        (as_bytes({"execute": "add-fd"}), [pipe()]),
        (as_bytes({"execute": "add-fd", "arguments": {"fdset-id": -1}}), [pipe()]),
        (as_bytes({"execute": "query-fdsets"}), []),
        (as_bytes({"execute": "remove-fd", "arguments": {"fdset-id": 3, "fd": 1}}), []),
        (as_bytes({"execute": "remove-fd", "arguments": {"fdset-id": 3}}), []),
        (as_bytes({"execute": "remove-fd", "arguments": {"fdset-id": 3}}), []),
        (get("kept"), [pipe()]),
    ]

    async def check() -> list[bytes]:
        async with serving(tmp_path / "q"):
            return await asyncio.to_thread(send_with_descriptor, tmp_path / "q", script)

    replies = run(check())
    for _, descriptors in script:
        for descriptor in descriptors:
            os.close(descriptor)
    said = [reply.decode() for reply in replies]
    none_came = '"No file descriptor supplied via SCM_RIGHTS"'
    assert [none_came in reply for reply in said] == [n in (1, 5) for n in range(len(said))]
    assert "expects a name not starting with a digit" in said[3]
    assert "File descriptor named 'a' not found" in said[7]
    assert '"fdset-id": 3' in said[8]
    assert '"fdset-id": 0' in said[9]
    assert "expects a non-negative value" in said[10]
    assert '"opaque": "o"' in said[11]
    assert "named 'fdset-id:3, fd:1' not found" in said[12]
    assert '"return": {}' in said[13]
    assert "named 'fdset-id:3' not found" in said[14]
    # Nothing of what was sent is open any more: every pipe's other end sees its end.
    for reader in readers:
        assert os.read(reader, 1) == b""
        os.close(reader)
