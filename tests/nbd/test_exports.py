"""Exports and servers of a daemon: every reply compared with the real storage daemon's."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from blocklayer.codec.addresses import UnixSocketAddress
from blocklayer.daemon import exports, nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.graph.events import BlockExportDeleted, Event
from nbd.serving import Client, run
from qmp.conversation import Peer, real_daemon, serving

SIZE = 1 << 20


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}


def add(identifier: str, node: str = "n0", **arguments: Any) -> dict[str, Any]:
    return command("block-export-add", type="nbd", id=identifier, node_name=node, **arguments)


def start(path: str, **arguments: Any) -> dict[str, Any]:
    address = {"type": "unix", "data": {"path": path}}
    return command("nbd-server-start", addr=address, **arguments)


def script(folder: Path) -> list[dict[str, Any]]:
    path = str(folder / "nbd.sock")
    remove = "nbd-server-remove"
    return [
        add("e0"),
        command("nbd-server-stop"),
        command("nbd-server-add", device="n0"),
        command(remove, name="n0"),
        command("query-block-exports"),
        start("/nonexistent/x.sock"),
        start(path, tls_creds="nope"),
        start(path, max_connections=-1),
        start(path),
        start(path),
        add("e0", "nope"),
        add("0bad"),
        add("e0", "ro", writable=True),
        add("e0", writable=True, bitmaps=["nob"]),
        add("e0", writable=True, bitmaps=[{"node": "n0", "name": "nob"}]),
        add("e0", writable=True, bitmaps=[{"node": "nope", "name": "nob"}]),
        add("e0", writable=True, name="x"),
        add("e0", writable=True, name="y"),
        add("e1", writable=True, name="x"),
        add("e1", iothread="foo"),
        add("e1", name="a" * 4097),
        add("e1", description="a" * 4097),
        add("e1", typo=1),
        command("block-export-add", type="nbd", id="e1"),
        command("nbd-server-add", device="n0"),
        command("nbd-server-add", device="n0"),
        command("nbd-server-add", device="n0", name="m", bitmap="nob"),
        command("nbd-server-add", device="nope"),
        command("nbd-server-add", device="ro", writable=True),
        command("query-block-exports"),
        command(remove, name="n0", mode="hard"),
        command(remove, name="n0"),
        command("block-export-del", id="nope"),
        command("block-export-del", id="e0", mode="soft"),
        command("block-export-del", id="e0"),
        add("e0", name="again"),
        command("nbd-server-stop"),
        command("nbd-server-stop"),
        command("query-block-exports"),
    ]


async def converse(peer: Peer, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that is said, replies and events; without times."""
    said = []
    for message in messages:
        peer.writer.write(json.dumps(message).encode() + b"\n")
        while True:
            reply = await peer.read()
            said.append({key: value for key, value in reply.items() if key != "timestamp"})
            if "event" not in reply:
                break
    return said


NODES = [
    {"driver": "null-co", "node-name": "n0", "size": SIZE, "read-zeroes": True},
    {"driver": "null-co", "node-name": "ro", "size": SIZE, "read-only": True},
]


@contextlib.asynccontextmanager
async def daemon_with_nodes() -> AsyncIterator[Daemon]:
    async with Daemon() as daemon:
        for options in NODES:
            await nodes.add(daemon, options)
        yield daemon


def test_every_reply_is_the_real_one(tmp_path: Path) -> None:
    async def ours() -> list[dict[str, Any]]:
        folder = tmp_path / "ours"
        folder.mkdir()
        async with daemon_with_nodes() as daemon, serving(folder / "qmp", daemon=daemon):
            peer = await (await Peer.connect(folder / "qmp")).greeted()
            said = await converse(peer, script(folder))
            await peer.close()
            return said

    async def theirs(path: Path) -> list[dict[str, Any]]:
        peer = await (await Peer.connect(path)).greeted()
        for options in NODES:
            await peer.ask({"execute": "blockdev-add", "arguments": options})
        said = await converse(peer, script(path.parent))
        await peer.close()
        return said

    real = tmp_path / "real"
    real.mkdir()
    with real_daemon(real / "qmp"):
        expected = run(theirs(real / "qmp"))
    got = run(ours())
    assert [pair for pair in zip(got, expected, strict=False) if pair[0] != pair[1]] == []
    assert len(got) == len(expected)


def test_an_id_is_free_when_its_event_is_sent(tmp_path: Path) -> None:
    async def go() -> None:
        said: list[Event] = []
        async with daemon_with_nodes() as daemon:
            daemon.graph.listeners.append(said.append)
            path = tmp_path / "nbd.sock"
            await exports.nbd_server_start(daemon, UnixSocketAddress(path=str(path)))
            await exports.block_export_add(daemon, "e0", "n0", writable=True)
            client = await Client.connect(path, "n0")
            await exports.block_export_del(daemon, "e0", "hard")
            (info,) = exports.query_block_exports(daemon)
            assert (info.id, info.shutting_down, said) == ("e0", True, [])
            assert await client.reader.read() == b""
            while not said:
                await asyncio.sleep(0)
            assert said == [BlockExportDeleted(id="e0")]
            assert not exports.query_block_exports(daemon)
            await exports.block_export_add(daemon, "e0", "n0", writable=True)
        assert not path.exists()

    run(go())


def test_several_servers_have_exports_of_their_own(tmp_path: Path) -> None:
    async def go() -> None:
        async with daemon_with_nodes() as daemon:
            for name in ("", "second"):
                address = UnixSocketAddress(path=str(tmp_path / f"{name}.sock"))
                await exports.nbd_server_start(daemon, address, server=name)
            await exports.block_export_add(daemon, "e0", "n0")
            await exports.block_export_add(daemon, "e1", "ro", name="n0", server="second")
            first = await Client.listed(tmp_path / ".sock")
            assert [each.name for each in first.result] == ["n0"]
            client = await Client.connect(tmp_path / "second.sock", "n0")
            await exports.nbd_server_stop(daemon)
            assert (await client.do(0, 0, 512)).content() == bytes(512)
            assert [each.id for each in exports.query_block_exports(daemon)] == ["e1"]

    run(go())
