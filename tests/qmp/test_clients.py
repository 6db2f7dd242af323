"""Clients of other people, and ours, against our server and the real one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blocklayer.errors import BlockError
from blocklayer.graph.events import JobStatusChange
from blocklayer.qmp.client import Client, CommandFailed, ConnectionLost
from oracles import HANG_TIMEOUT_S
from qmp.conversation import Peer, real_daemon, run, serving

qemu_qmp = pytest.importorskip("qemu.qmp")


def test_the_qmp_library(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path / "q", name="disks") as server:
            client = qemu_qmp.QMPClient("test")
            await client.connect(str(tmp_path / "q"))
            try:
                assert (await client.execute("query-version"))["qemu"]["major"] == 10
                assert await client.execute("query-name") == {"name": "disks"}
                with pytest.raises(qemu_qmp.ExecuteError, match="has not been found"):
                    await client.execute("nope")
                with client.listener(["JOB_STATUS_CHANGE"]) as listener:
                    server.events.emit(JobStatusChange(id="j", status="ready"))
                    event = await listener.get()
                    assert event["data"] == {"id": "j", "status": "ready"}
                schema = await client.execute("query-qmp-schema")
                assert {"quit", "JOB_STATUS_CHANGE"} <= {entry["name"] for entry in schema}
                assert await client.execute("quit") == {}
                assert server.stopping.is_set()
            finally:
                await client.disconnect()

    run(check())


def test_the_other_shell(tmp_path: Path) -> None:
    """qmp-shell of the qemu.qmp package, fed by a pipe."""
    script = "query-name\nchardev-add id=n backend={'type':'null','data':{}}\nquery-chardev\n"

    def shell() -> subprocess.CompletedProcess[str]:
        module = [sys.executable, "-m", "qemu.qmp.qmp_shell", "-p", str(tmp_path / "q")]
        return subprocess.run(module, input=script, capture_output=True, text=True, check=False)

    async def check() -> subprocess.CompletedProcess[str]:
        async with serving(tmp_path / "q", name="disks"):
            return await asyncio.to_thread(shell)

    done = run(check())
    assert '"name": "disks"' in done.stdout
    assert '"label": "n"' in done.stdout


async def use(client: Client) -> list[Any]:
    """A conversation that every server must understand."""
    answers: list[Any] = [await client.execute("query-commands", timeout_s=HANG_TIMEOUT_S) != []]
    added = {"id": "n", "backend": {"type": "null", "data": {}}}
    answers.append(await client.execute("chardev-add", added))
    together = [client.execute("query-chardev") for _ in range(5)]
    listings = await asyncio.gather(*together)
    answers += [sorted(device["label"] for device in listed) for listed in listings]
    for command, arguments in (("chardev-add", added), ("nope", None)):
        with pytest.raises(CommandFailed) as raised:
            await client.execute(command, arguments)
        answers.append((raised.value.error_class, str(raised.value)))
    return answers


@pytest.mark.oracle("qemu-storage-daemon")
def test_our_client_with_both_servers(tmp_path: Path) -> None:
    async def theirs() -> list[Any]:
        async with await Client.connect(str(tmp_path / "theirs"), oob=True) as client:
            return await use(client)

    async def ours() -> list[Any]:
        async with (
            serving(tmp_path / "ours"),
            await Client.connect(str(tmp_path / "ours"), oob=True) as client,
        ):
            return await use(client)

    with real_daemon(tmp_path / "theirs"):
        expected = run(theirs())
    assert run(ours()) == expected


def test_events_and_the_end(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path / "q") as server:
            client = await Client.connect(str(tmp_path / "q"))
            for n in range(3):
                server.events.emit(JobStatusChange(id=f"{n}", status="ready"))
        # The server is closed now.
        assert [event["data"]["id"] async for event in client.events()] == ["0", "1", "2"]
        with pytest.raises(ConnectionLost, match="closed the connection"):
            await client.execute("query-version")
        await client.close()

    run(check())


def test_a_server_that_serves_another(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path / "q"):
            first = await (await Peer.connect(tmp_path / "q")).greeted()
            with pytest.raises(ConnectionLost, match="another client may be connected"):
                await Client.connect(str(tmp_path / "q"), timeout_s=0.01)
            await first.close()

    run(check())


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0\r\n", b"5 ", b"\xff\xff"])
def test_what_is_no_server(tmp_path: Path, greeting: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async def check() -> None:
        server = await asyncio.start_unix_server(serve, tmp_path / "q")
        with pytest.raises(ConnectionLost):
            await Client.connect(str(tmp_path / "q"))
        server.close()
        await server.wait_closed()
        with pytest.raises(BlockError, match="Failed to connect to"):
            await Client.connect(str(tmp_path / "nobody"))

    run(check())
