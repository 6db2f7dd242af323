"""The human monitor: the table's rules, help, and a prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blocklayer.errors import UsageError
from blocklayer.qmp.human import HumanCommandTable
from blocklayer.qmp.server import Server
from oracles import HANG_TIMEOUT_S
from qmp.conversation import Peer, run, serving

TABLE = HumanCommandTable()


@TABLE.command("resize", "[-f] DEVICE SIZE:size [COUNT:int]", "change a size", also=("r",))
async def resize(server: Server, arguments: dict[str, Any]) -> str:
    """Show what came."""
    return f"{arguments}\n"


@TABLE.command("io", "DEVICE COMMAND...", "carry a command out")
async def io(server: Server, arguments: dict[str, Any]) -> str:
    """Show what came."""
    return f"{arguments}"


@TABLE.command("info blocks", "", "show blocks")
async def info_blocks(server: Server, arguments: dict[str, Any]) -> str:
    """Fail."""
    raise UsageError("no blocks today")


MIB = 1 << 20
LINES = [
    ("resize a 10", {"f": False, "device": "a", "size": 10 * MIB, "count": None}),
    ("  r   -f  a 10K 0x10 ", {"f": True, "device": "a", "size": 10240, "count": 16}),
    (r'resize "a \"b\"\n" 1B', {"f": False, "device": 'a "b"\n', "size": 1, "count": None}),
    ('io d write -P 7 0 "64k"', {"device": "d", "command": 'write -P 7 0 "64k"'}),
]


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_arguments(line: str, expected: dict[str, Any]) -> None:
    server: Any = None
    assert run(TABLE.execute(server, line)).strip() == f"{expected}".replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", ""),
        ("nope", "unknown command: 'nope'\r\n"),
        ("resize", "Error: 'resize' needs device; try 'help resize'\r\n"),
        ("resize a", "Error: 'resize' needs size; try 'help resize'\r\n"),
        ("resize a x", "Error: Invalid size 'x'"),
        ("resize a 1 x", "Error: 'x' is no number\r\n"),
        ("resize a 1 1 1", "Error: 'resize' has no place for '1'"),
        ('resize "a 1', "Error: The quotes are not closed"),
        ("info blocks", "Error: no blocks today\r\n"),
        ("info nope", "unknown command: 'info nope'\r\n"),
    ],
)
def test_mistakes(line: str, said: str) -> None:
    server: Any = None
    assert run(TABLE.execute(server, line)).startswith(said)


def test_help_lists_usages() -> None:
    assert "resize [-f] DEVICE SIZE:size [COUNT:int] -- change a size" in TABLE.help()
    assert TABLE.help("info") == "info blocks -- show blocks\n"
    assert TABLE.help("res") == ""


def test_a_prompt(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(tmp_path / "q", mode="readline", name="disks") as server:
            peer = await Peer.connect(tmp_path / "q")
            greeting = await peer.reader.readuntil(b"(qemu) ")
            assert b"type 'help' for more information" in greeting
            peer.writer.write(b"info name\r\n\nnope\n" + b"x" * 200_000 + b"\ninfo version\n")
            said = [await peer.reader.readuntil(b"(qemu) ") for _ in range(4)]
            assert said[:3] == [
                b"disks\r\n(qemu) ",
                b"(qemu) ",
                b"unknown command: 'nope'\r\n(qemu) ",
            ]
            assert b"10.0.2" in said[3]
            peer.writer.write(b"quit\n")
            await asyncio.wait_for(server.stopping.wait(), HANG_TIMEOUT_S)
            await peer.close()

    run(check())


def test_by_way_of_qmp(tmp_path: Path) -> None:
    def line(text: str) -> dict[str, Any]:
        return {"execute": "human-monitor-command", "arguments": {"command-line": text}}

    async def check() -> None:
        async with serving(tmp_path / "q"):
            peer = await (await Peer.connect(tmp_path / "q")).greeted()
            assert "quit -- end the daemon\r\n" in (await peer.ask(line("help")))["return"]
            assert (await peer.ask(line("help quit")))["return"] == "quit -- end the daemon\r\n"
            assert (await peer.ask(line("info")))["return"].startswith("info ")
            assert (await peer.ask(line("zz")))["return"] == "unknown command: 'zz'\r\n"
            await peer.close()

    run(check())
