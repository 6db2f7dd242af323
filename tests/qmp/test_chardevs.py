"""Character devices: how they are named, and that monitors speak over each kind."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blocklayer.errors import BlockError, UsageError
from blocklayer.qmp.chardev_options import (
    ChardevOptions,
    SocketBackend,
    parse_chardev,
    parse_device,
    parse_monitor,
)
from blocklayer.qmp.chardevs import PtyChardev, SocketChardev
from blocklayer.qmp.server import Server
from qmp.conversation import NEGOTIATE, Peer, as_bytes, run, serving


def described(options: ChardevOptions | str) -> str:
    """The essence of a parsed device in a line."""
    if isinstance(options, str):
        return options
    data = options.backend.data
    if not isinstance(options.backend, SocketBackend):
        return f"{options.id}: {type(options.backend).__name__} {data}"
    sock = options.backend.data
    words = f"{'server' if sock.server else 'client'} wait={sock.wait is True}"
    return f"{options.id}: {type(sock.addr).__name__} {sock.addr.data} {words}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("socket,id=m,path=q", "m: UnixSocketLegacy q client wait=False"),
        ("socket,id=m,path=q,server=on", "m: UnixSocketLegacy q server wait=True"),
        ("socket,id=m,path=q,server=on,wait=off", "m: UnixSocketLegacy q server wait=False"),
        ("socket,id=m,path=q,server,nowait", "m: UnixSocketLegacy q server wait=False"),
        ("socket,id=m,path=a,,b,abstract=on", "m: UnixSocketLegacy @a,b client wait=False"),
        ("socket,id=m,host=::1,port=5", "m: InetSocketLegacy [::1]:5 client wait=False"),
        ("socket,id=m,port=5,server=on", "m: InetSocketLegacy :5 server wait=True"),
        ("socket,id=m,fd=7,server=on,wait=off", "m: FdSocketLegacy 7 server wait=False"),
    ],
)
def test_sockets_on_the_command_line(text: str, expected: str) -> None:
    assert described(parse_chardev(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:q.sock,server=on,wait=off", "d: UnixSocketLegacy q.sock server wait=False"),
        ("unix:q.sock,server,nowait", "d: UnixSocketLegacy q.sock server wait=False"),
        ("unix:q.sock", "d: UnixSocketLegacy q.sock client wait=False"),
        ("tcp:localhost:4444,server=on", "d: InetSocketLegacy localhost:4444 server wait=True"),
        ("tcp::4444,server", "d: InetSocketLegacy :4444 server wait=True"),
        ("chardev:m", "m"),
    ],
)
def test_short_forms(text: str, expected: str) -> None:
    assert described(parse_device(text, "d")) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("null", "no id"),
        ("nope,id=m", "'nope' is not a valid char driver name"),
        ("socket,id=m", "give one of path="),
        ("socket,id=m,path=a,port=1", "give one of path="),
        ("socket,id=m,path=a,x=1", "Parameter 'x' is unexpected"),
        ("socket,id=m,path=a,server=maybe", "expects 'on' or 'off'"),
        ("ringbuf,id=m,size=x", "'size'"),
    ],
)
def test_mistakes_in_devices(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_chardev(text)


@pytest.mark.parametrize("text", ["unix:", "tcp:x", "nope", "serial:x"])
def test_mistakes_in_short_forms(text: str) -> None:
    with pytest.raises(UsageError):
        parse_device(text, "d")


def test_monitors_on_the_command_line() -> None:
    plain = parse_monitor("m")
    assert (plain.chardev, plain.mode, plain.pretty) == ("m", "control", False)
    assert parse_monitor("chardev=m,mode=readline,id=x").mode == "readline"
    assert parse_monitor("m,pretty=on").pretty
    with pytest.raises(UsageError, match="does not accept value 'foo'"):
        parse_monitor("m,mode=foo")
    with pytest.raises(UsageError, match="'x' is unexpected"):
        parse_monitor("m,x=1")


async def add(server: Server, text: str, monitor: str | None = None) -> None:
    options = parse_chardev(text)
    await server.add_chardev(options.id, options.backend)
    if monitor is not None:
        server.add_monitor(parse_monitor(monitor))


def test_tcp_with_a_range_of_ports(tmp_path: Path) -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = Server()
            try:
                text = f"socket,id=t,host=127.0.0.1,port={port},to={port + 99},server=on,wait=off"
                await add(server, text, "t,pretty=on")
                device = server.chardevs["t"]
                where = device.filename
                assert where.startswith("disconnected:tcp:127.0.0.1:")
                found = int(where.rpartition(":")[2].partition(",")[0])
                assert port < found <= port + 99
                reader, writer = await asyncio.open_connection("127.0.0.1", found)
                assert await reader.readuntil(b"}\r\n")
                writer.write(as_bytes(NEGOTIATE))
                # Pretty: one member a line.
                assert await reader.readuntil(b"\r\n") == b'{\n    "return": {}\n}\r\n'
                assert not device.filename.startswith("disconnected")
                writer.close()
                await writer.wait_closed()
            finally:
                await server.close()

    run(check())


def test_a_listener_that_was_inherited(tmp_path: Path) -> None:
    async def check() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "q"))
            listener.listen()
            server = Server()
            try:
                await add(server, f"socket,id=f,fd={listener.fileno()},server=on,wait=off", "f")
                peer = await (await Peer.connect(tmp_path / "q")).greeted()
                await peer.close()
            finally:
                await server.close()

    run(check())


def test_waiting_for_the_first_client(tmp_path: Path) -> None:
    async def check() -> None:
        server = Server()
        try:
            adding = asyncio.create_task(
                add(server, f"socket,id=w,path={tmp_path}/q,server=on", "w")
            )
            while not (tmp_path / "q").exists():
                await asyncio.sleep(0)
            assert not adding.done()
            peer = await Peer.connect(tmp_path / "q")
            await adding
            await peer.greeted()
            await peer.close()
        finally:
            await server.close()

    run(check())


def test_a_client_that_connects_again(tmp_path: Path) -> None:
    """The monitor connects to us: at first nobody is there, then we come and go."""

    async def check() -> None:
        arrivals: asyncio.Queue[Peer] = asyncio.Queue()

        def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            arrivals.put_nowait(Peer(reader, writer))

        server = Server()
        try:
            await add(server, f"socket,id=r,path={tmp_path}/q,reconnect-ms=1", "r")
            listener = await asyncio.start_unix_server(arrived, tmp_path / "q")
            for _ in range(3):
                peer = await (await arrivals.get()).greeted()
                await peer.close()
        finally:
            await server.close()
            listener.close()
            await listener.wait_closed()

    run(check())


def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")

    async def check() -> None:
        server = Server()
        with pytest.raises(BlockError, match="Failed to bind socket"):
            await add(server, f"socket,id=s,path={tmp_path}/precious,server=on,wait=off")
        assert server.chardevs == {}
        await server.close()

    run(check())
    assert (tmp_path / "precious").read_text() == "data"


def test_a_left_over_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "q"))

    async def check() -> None:
        async with serving(tmp_path / "q"):
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            await peer.close()

    run(check())


def test_files_and_logs(tmp_path: Path) -> None:
    """A script read from a file, its replies written to another; and a copy of them."""
    (tmp_path / "in").write_bytes(as_bytes(NEGOTIATE) + as_bytes({"execute": "query-name"}))

    async def check() -> None:
        server = Server(name="me")
        text = f"file,id=f,path={tmp_path}/out,input-path={tmp_path}/in,logfile={tmp_path}/log"
        await add(server, text, "f")
        await asyncio.gather(*server._tasks)
        await server.close()

    run(check())
    replies = (tmp_path / "out").read_bytes()
    assert json.loads(replies.splitlines()[-1]) == {"return": {"name": "me"}}
    assert (tmp_path / "log").read_bytes() == replies


def test_a_pseudo_terminal(tmp_path: Path) -> None:
    async def check() -> None:
        server = Server()
        try:
            await add(server, f"pty,id=p,path={tmp_path}/tty", "p,mode=readline")
            device = server.chardevs["p"]
            assert isinstance(device, PtyChardev)
            with open(tmp_path / "tty", "r+b", buffering=0) as terminal:
                await asyncio.to_thread(read_until, terminal.fileno(), b"(qemu) ")
                terminal.write(b"info version\n")
                text = await asyncio.to_thread(read_until, terminal.fileno(), b"(qemu) ")
                assert text.startswith(b"10.0.2 (blocklayer")
        finally:
            await server.close()
        assert not (tmp_path / "tty").is_symlink()

    run(check())


def read_until(descriptor: int, end: bytes) -> bytes:
    found = b""
    while not found.endswith(end):
        found += os.read(descriptor, 1000)
    return found


STDIO_SERVER = """
import asyncio
from blocklayer.qmp.chardev_options import parse_chardev, parse_monitor
from blocklayer.qmp.server import Server

async def main():
    server = Server()
    options = parse_chardev("stdio,id=s")
    await server.add_chardev(options.id, options.backend)
    server.add_monitor(parse_monitor("s"))
    print("Formatting something, which must not get between the replies")
    await server.stopping.wait()
    await server.close()
    print("and now it may")

asyncio.run(main())
"""


def test_standard_input_and_output() -> None:
    """As a script: all of it is answered, in order, and nothing else is there."""
    asked = [NEGOTIATE, *({"execute": "query-version", "id": n} for n in range(50))]
    done = subprocess.run(
        [sys.executable, "-c", STDIO_SERVER],
        input=b"".join(map(as_bytes, [*asked, {"execute": "quit"}])),
        capture_output=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    messages = [json.loads(line) for line in lines]
    assert "QMP" in messages[0]
    assert [message.get("id") for message in messages[2:-1]] == list(range(50))
    assert messages[-1] == {"return": {}}
    assert last == b"and now it may"
    assert b"Formatting" in done.stderr


def test_two_cannot_share_a_device(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path / "q") as server:
            with pytest.raises(UsageError, match="chardev 'm' is already in use"):
                server.add_monitor(parse_monitor("m"))
            with pytest.raises(UsageError, match='chardev "zz" not found'):
                server.add_monitor(parse_monitor("zz"))
            assert isinstance(server.chardevs["m"], SocketChardev)

    run(check())
