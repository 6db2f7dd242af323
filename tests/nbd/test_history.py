"""A history checker: clients write versions, the server is killed, and no promise may be broken.

Each client owns some sectors, and writes ever higher versions to them, some with FUA, with flushes
between. A flush on one connection covers what was answered on all. After the server was killed a
sector may hold any version from the last one promised to the last one sent, and nothing else.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import pytest

from blocklayer.codec.nbd.constants import Command, CommandFlag, Mode
from nbd.serving import Client, run
from oracles import Oracle

SECTORS = 24
SPREAD = 40_960
"""Bytes between two sectors: some share a cluster, some do not."""
CLIENTS = 3
ROUNDS = 3


class History:
    """What was sent, answered and promised of each sector, as version numbers."""

    def __init__(self) -> None:
        self.sent = [0] * SECTORS
        self.answered = [0] * SECTORS
        self.promised = [0] * SECTORS

    def promise(self, answered: list[int]) -> None:
        """All that ``answered`` says is on stable storage."""
        self.promised = [max(pair) for pair in zip(self.promised, answered, strict=True)]


def tagged(sector: int, version: int) -> bytes:
    return (sector.to_bytes(4, "big") + version.to_bytes(4, "big")) * 64 if version else bytes(512)


async def start(disk: Path, path: Path) -> asyncio.subprocess.Process:
    """`blk nbd`, ready for clients."""
    path.unlink(missing_ok=True)
    words = ["-m", "blocklayer.cli.main", "nbd", "-t", "-e", "0", "-k", str(path)]
    process = await asyncio.create_subprocess_exec(sys.executable, *words, "-f", "qcow2", str(disk))
    while process.returncode is None:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return process
    raise AssertionError("it does not come up")


async def write_on(path: Path, history: History, number: int, seed: int) -> None:
    """Write until the connection breaks."""
    chance = random.Random(seed)
    client = await Client.connect(path, "", Mode(number % 3))
    mine = range(number, SECTORS, CLIENTS)
    try:
        while True:
            if chance.random() < 0.15:
                before = list(history.answered)
                assert not (await client.do(Command.FLUSH)).error
                history.promise(before)
                continue
            sector = chance.choice(mine)
            version = history.sent[sector] + 1
            history.sent[sector] = version
            flags = int(CommandFlag.FUA) if chance.random() < 0.2 else 0
            data = tagged(sector, version)
            answer = await client.do(Command.WRITE, sector * SPREAD, payload=data, flags=flags)
            assert not answer.error
            history.answered[sector] = version
            if flags:
                history.promised[sector] = version
    except (OSError, asyncio.IncompleteReadError):
        return


async def look(path: Path, history: History) -> None:
    """Check every sector; what is there now has been read, and must not go back."""
    client = await Client.connect(path, "")
    for sector in range(SECTORS):
        found = (await client.do(Command.READ, sector * SPREAD, 512)).content()
        version = int.from_bytes(found[4:8], "big")
        assert found == tagged(sector, version)
        assert history.promised[sector] <= version <= history.sent[sector]
    assert not (await client.do(Command.FLUSH)).error
    await client.close()


@pytest.mark.parametrize("seed", range(2))
def test_no_promise_is_broken(tmp_path: Path, seed: int, qemu_img: Oracle) -> None:
    disk, path = tmp_path / "a.qcow2", tmp_path / "s"
    qemu_img("create", "-q", "-f", "qcow2", disk, "4M")

    async def go() -> None:
        history, chance = History(), random.Random(seed)
        for turn in range(ROUNDS):
            server = await start(disk, path)
            try:
                await look(path, history)
                goal = sum(history.sent) + chance.randrange(50, 150)
                writers = [
                    asyncio.create_task(write_on(path, history, number, seed + turn * 9))
                    for number in range(CLIENTS)
                ]
                while sum(history.sent) < goal:
                    await asyncio.sleep(0)
            finally:
                server.kill()
                await server.wait()
            await asyncio.gather(*writers)
        server = await start(disk, path)
        await look(path, history)
        server.terminate()
        assert await server.wait() == 0
        assert min(history.sent)

    run(go())
    # Space may be lost to a kill, data never.
    assert qemu_img("check", disk, check=False).returncode in (0, 3)
