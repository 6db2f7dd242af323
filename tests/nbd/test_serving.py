"""Serving from Python, synchronous and asyncio."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import blocklayer
from nbd.certificates import make_certificates
from nbd.serving import Client, run
from oracles import Oracle


def test_beside_synchronous_code(tmp_path: Path, qemu_io: Oracle) -> None:
    disk, path = tmp_path / "a.qcow2", tmp_path / "s"
    blocklayer.create(str(disk), size="1M")
    uri = f"nbd+unix:///x?socket={path}"
    with blocklayer.serve(disk, uri, writable=True) as server:
        assert server.uri == uri
        qemu_io("-f", "raw", "-c", "write -P 3 0 64k", server.uri)
        with pytest.raises(blocklayer.BlockError, match="lock"):
            blocklayer.open(disk, writable=True)
    server.close()
    assert not path.exists()
    with blocklayer.open(disk) as opened:
        assert opened.read(0, 4) == b"\3" * 4


def test_on_a_port_of_the_system_s_choice(tmp_path: Path, qemu_io: Oracle) -> None:
    disk = tmp_path / "a.raw"
    disk.write_bytes(b"q" * (1 << 20))
    with blocklayer.serve(disk, "nbd://127.0.0.1:0/name", format="raw") as server:
        assert server.uri.startswith("nbd://127.0.0.1:")
        assert not server.uri.endswith(":0/name")
        qemu_io("-f", "raw", "-r", "-c", f"read -P {ord('q')} 0 1M", server.uri)


def test_for_asyncio_and_encrypted(tmp_path: Path) -> None:
    disk, path = tmp_path / "a.raw", tmp_path / "s"
    disk.write_bytes(b"q" * (1 << 20))
    uri = f"nbd+unix:///?socket={path}"

    async def go() -> None:
        async with await blocklayer.aio.serve(disk, uri, format="raw") as server:
            assert server.uri == uri
            client = await Client.connect(path, "")
            assert (await client.do(0, 0, 3)).content() == b"qqq"
            await client.close()
        folder = str(make_certificates(tmp_path))
        async with await blocklayer.aio.serve(disk, uri, format="raw", certificates=folder):
            with pytest.raises(blocklayer.BlockError, match="TLS"):
                await Client.connect(path, "")

    run(go())


@pytest.mark.parametrize(
    "uri", ["http://x/", "nbd://127.0.0.1:0/?socket=x", "nbd+unix:///?socket=/nonexistent/s"]
)
def test_what_cannot_be_leaves_nothing_open(tmp_path: Path, uri: str) -> None:
    disk = tmp_path / "a.qcow2"
    blocklayer.create(str(disk), size="1M")
    with pytest.raises(blocklayer.BlockError):
        blocklayer.serve(disk, uri, writable=True)
    with blocklayer.open(disk, writable=True):
        pass
    with pytest.raises(blocklayer.BlockError):
        asyncio.run(blocklayer.aio.serve(tmp_path / "nothing", f"nbd+unix:///?socket={tmp_path}/s"))
