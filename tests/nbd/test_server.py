"""The server under a client of ours: every command, every mode, errors, limits, hostile clients."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blocklayer.codec.nbd import messages
from blocklayer.codec.nbd.constants import Command, CommandFlag, Mode, TransmissionFlag
from blocklayer.codec.nbd.messages import Request
from blocklayer.errors import LockedError, UsageError
from blocklayer.exports.nbd.connection import MAX_IN_FLIGHT
from blocklayer.exports.nbd.export import NbdExport
from blocklayer.graph import bitmaps, edit
from blocklayer.graph.io import truncate
from blocklayer.graph.open import open_options
from blocklayer.graph.root import drained
from nbd.serving import Client, image, memory, run, served
from oracles import Oracle

FUA, DF = int(CommandFlag.FUA), int(CommandFlag.DF)


@pytest.mark.parametrize("mode", Mode)
def test_what_is_written_is_read(tmp_path: Path, mode: Mode) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            client = await Client.connect(stage.path, mode=mode)
            model, chance = bytearray(client.size), random.Random(7)
            for _ in range(200):
                length = chance.choice((1, 512, 4096, 70000, 300000))
                offset = chance.randrange(client.size - length)
                match chance.randrange(5):
                    case 0:
                        answer = await client.do(Command.WRITE_ZEROES, offset, length)
                        model[offset : offset + length] = bytes(length)
                    case 1:
                        answer = await client.do(Command.READ, offset, length)
                        assert answer.content() == model[offset : offset + length]
                    case 2:
                        answer = await client.do(Command.READ, offset, length, flags=DF)
                        if mode is Mode.SIMPLE:
                            assert len(answer.data) == 1
                        assert not answer.holes
                    case _:
                        data = chance.randbytes(length)
                        flags = chance.choice((0, FUA))
                        answer = await client.do(Command.WRITE, offset, payload=data, flags=flags)
                        model[offset : offset + length] = data
                assert not answer.error
            for command in (Command.FLUSH, Command.CACHE, Command.TRIM):
                assert not (await client.do(command)).error
            await client.close()

    run(go())


@pytest.mark.parametrize("mode", Mode)
def test_many_requests_at_once_are_all_answered(tmp_path: Path, mode: Mode) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(8 << 20)) as stage:
            client = await Client.connect(stage.path, mode=mode)
            asked = {
                client.ask(Command.WRITE, at * 4096, payload=bytes([at]) * 4096).cookie: at
                for at in range(200)
            }
            assert not any(each.error for each in (await client.answers(200)).values())
            asked = {client.ask(Command.READ, at * 4096, 4096).cookie: at for at in range(200)}
            for cookie, answer in (await client.answers(200)).items():
                assert answer.content() == bytes([asked[cookie]]) * 4096
            await client.close()

    run(go())


ERRORS = [
    (Command.READ, (1 << 20, 512), 0, 22),
    (Command.READ, (2**64 - 1, 512), 0, 22),
    (Command.READ, (0, 4096), int(CommandFlag.NO_HOLE), 22),
    (Command.WRITE_ZEROES, (1 << 20, 1), 0, 28),
    (Command.WRITE_ZEROES, (0, 1), int(CommandFlag.REQ_ONE), 22),
    (Command.TRIM, (1 << 19, 1 << 20), 0, 22),
    (Command.CACHE, (1 << 20, 1), 0, 22),
    (Command.BLOCK_STATUS, (0, 512), 0, 22),
    (99, (0, 0), 0, 22),
]


@pytest.mark.parametrize("mode", Mode)
def test_wrong_requests_fail_alone(tmp_path: Path, mode: Mode) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            client = await Client.connect(stage.path, mode=mode)
            for command, arguments, flags, error in ERRORS:
                answer = await client.do(command, *arguments, flags=flags)
                assert answer.error == error, (command, arguments)
                assert bool(answer.message) == (mode is not Mode.SIMPLE)
            answer = await client.do(Command.WRITE, (1 << 20) - 1, payload=b"xy")
            assert answer.error == 28
            assert (await client.do(Command.READ, 0, 4)).content() == bytes(4)
            await client.close()

    run(go())


def test_a_read_only_export_takes_no_writes(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(), writable=False) as stage:
            client = await Client.connect(stage.path)
            assert client.flags & TransmissionFlag.READ_ONLY
            assert (await client.do(Command.WRITE, 0, payload=b"x")).error == 1
            for command in (Command.TRIM, Command.WRITE_ZEROES):
                assert (await client.do(command, 0, 512)).error == 1
            assert not (await client.do(Command.FLUSH)).error
            await client.close()

    run(go())


def test_block_status_with_contexts_chosen_by_the_request(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> None:
        wanted = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"]
        graph_options = image(path)
        async with served(tmp_path, graph_options) as stage:
            bitmaps.add(stage.node, "b", granularity=65536)
            second = await NbdExport.open(
                "e2", stage.node, name="x", writable=True, bitmaps=["b"], allocation_depth=True
            )
            stage.server.add(second)
            client = await Client.connect(stage.path, "x", contexts=wanted)
            assert list(client.contexts.values()) == wanted
            await client.do(Command.WRITE, 65536, payload=bytes([1]) * 65536)
            await client.do(Command.WRITE_ZEROES, 262144, 131072)
            answer = await client.do(Command.BLOCK_STATUS, 0, 1 << 20)
            k = 1024
            assert answer.status == {
                0: [(64 * k, 3), (64 * k, 0), (896 * k, 3)],
                1: [(64 * k, 0), (64 * k, 1), (128 * k, 0), (128 * k, 1), (640 * k, 0)],
                2: [(64 * k, 0), (64 * k, 1), (128 * k, 0), (128 * k, 1), (640 * k, 0)],
            }
            one = await client.do(
                Command.BLOCK_STATUS, 100, 1 << 18, flags=int(CommandFlag.REQ_ONE)
            )
            assert one.status[2] == [(64 * k - 100, 0)]
            payload = messages.pack_status_payload(1 << 20, [2])
            chosen = await client.do(
                Command.BLOCK_STATUS, 0, payload=payload, flags=int(CommandFlag.PAYLOAD_LEN)
            )
            assert list(chosen.status) == [2]
            bad = await client.do(
                Command.BLOCK_STATUS, 0, payload=b"12345", flags=int(CommandFlag.PAYLOAD_LEN)
            )
            assert bad.error == 22
            with pytest.raises(LockedError, match="in use"):
                await bitmaps.remove(stage.node.dirty_bitmaps["b"])
            with pytest.raises(LockedError, match="incompatible with readonly"):
                await NbdExport.open("e3", stage.node, bitmaps=["b"])
            await client.close()
            await stage.server.remove(second)
            await bitmaps.remove(stage.node.dirty_bitmaps["b"])

    run(go())


def test_a_sparse_read_says_where_zeros_are(tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> None:
        async with served(tmp_path, image(path)) as stage:
            client = await Client.connect(stage.path, mode=Mode.STRUCTURED)
            await client.do(Command.WRITE, 65536, payload=b"x" * 65536)
            answer = await client.do(Command.READ, 0, 1 << 20)
            assert answer.holes == {0: 65536, 131072: (1 << 20) - 131072}
            assert answer.data == {65536: b"x" * 65536}
            await client.close()

    run(go())


def test_a_grown_disk_shows_its_size_to_new_clients_and_takes_requests_of_all(
    tmp_path: Path,
) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            old = await Client.connect(stage.path)
            await truncate(stage.node, 2 << 20)
            new = await Client.connect(stage.path)
            assert (old.size, new.size) == (1 << 20, 2 << 20)
            for client in (old, new):
                assert not (await client.do(Command.WRITE, 3 << 19, payload=b"x")).error
                await client.close()

    run(go())


def test_clients_stay_where_they_are_while_an_overlay_slips_in(
    tmp_path: Path, qemu_img: Oracle
) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", top, "1M")

    async def go() -> None:
        async with served(tmp_path, image(base)) as stage:
            client = await Client.connect(stage.path)
            await client.do(Command.WRITE, 0, payload=b"before")
            overlay = await open_options(
                stage.graph,
                {"node-name": "top", "backing": None, **image(top)},
                stage.node.flags,
            )
            async with edit.changing(stage.graph):
                waiting = client.ask(Command.WRITE, 6, payload=b"after")
                edit.append(stage.node, overlay)
            assert not (await client.answers(1))[waiting.cookie].error
            assert stage.export.node is overlay
            assert (await client.do(Command.READ, 0, 11)).content() == b"beforeafter"
            await client.close()

    run(go())
    assert b"after" not in base.read_bytes()


def test_a_client_that_does_not_read_is_read_from_no_more(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(4 << 20)) as stage:
            greedy = await Client.connect(stage.path, mode=Mode.SIMPLE)
            await greedy.do(Command.WRITE, 0, payload=b"z" * (4 << 20))
            count = 60
            for _ in range(count):
                greedy.ask(Command.READ, 0, 4 << 20)
            other = await Client.connect(stage.path)
            for _ in range(50):
                assert (await other.do(Command.READ, 0, 3)).content() == b"zzz"
            (held,) = [each for each in stage.server.connections if each._wire.pending > 1 << 20]
            assert held._wire.pending <= 48 << 20
            assert len(await greedy.answers(count)) == count
            await greedy.close()
            await other.close()

    run(go())


def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            client = await Client.connect(stage.path)
            async with drained(stage.graph):
                for _ in range(5 * MAX_IN_FLIGHT):
                    client.ask(Command.READ, 0, 512)
                other = await Client.listed(stage.path)
                assert [each.name for each in other.result] == ["disk"]
                (connection,) = stage.export.connections
                assert connection._in_flight == MAX_IN_FLIGHT
            assert len(await client.answers(5 * MAX_IN_FLIGHT)) == 5 * MAX_IN_FLIGHT
            await client.close()

    run(go())


async def _conversation(path: Path) -> list[bytes]:
    """All that a client says in a short session, piece by piece."""
    client = await Client.connect(path, contexts=["base:allocation"])
    said: list[bytes] = []
    write = client.writer.write

    def listen(data: bytes) -> None:
        said.append(data)
        write(data)

    client.writer.write = listen  # type: ignore[method-assign,assignment]
    await client.do(Command.WRITE, 0, payload=b"q" * 100)
    await client.do(Command.READ, 0, 100)
    await client.do(Command.BLOCK_STATUS, 0, 512)
    await client.close()
    return said


def test_a_client_may_leave_after_any_byte(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            whole = b"".join(await _conversation(stage.path))
            for cut in range(len(whole)):
                client = await Client.connect(stage.path, contexts=["base:allocation"])
                client.writer.write(whole[:cut])
                client.writer.close()
            for cut in range(60):
                _, writer = await asyncio.open_unix_connection(stage.path)
                writer.write((bytes([0, 0, 0, 3]) + b"IHAVEOPT\0\0\0\7\0\0\0\x0a" * 3)[:cut])
                writer.close()
            survivor = await Client.connect(stage.path)
            assert not (await survivor.do(Command.FLUSH)).error
            await survivor.close()
            while stage.server.connections:
                await asyncio.sleep(0)

    run(go())


HOSTILE = [
    messages.pack_request(Mode.EXTENDED, Request(Command.WRITE, 0, 1, 0, 1 << 40)),
    messages.pack_request(Mode.EXTENDED, Request(Command.READ, 32, 1, 0, 1 << 30)),
    messages.pack_request(Mode.SIMPLE, Request(Command.READ, 0, 1, 0, 1)).ljust(64),
    bytes(64),
]


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_a_client_that_breaks_the_protocol_is_dropped(tmp_path: Path, words: bytes) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            client = await Client.connect(stage.path)
            client.writer.write(words)
            assert await client.reader.read() == b""
            assert len(stage.reports) == 1
            assert not stage.export.clients

    run(go())


def test_a_client_that_says_nothing_is_dropped_in_time(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(), server={"handshake_max_seconds": 0.05}) as stage:
            settled = await Client.connect(stage.path)
            reader, writer = await asyncio.open_unix_connection(stage.path)
            assert len(await reader.read()) == 18
            writer.close()
            assert not (await settled.do(Command.FLUSH)).error
            await settled.close()

    run(go())


def test_clients_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(), server={"max_connections": 1}) as stage:
            first = await Client.connect(stage.path)
            assert not first.flags & TransmissionFlag.CAN_MULTI_CONN
            second = asyncio.create_task(Client.connect(stage.path))
            assert not (await first.do(Command.FLUSH)).error
            assert not second.done()
            await first.close()
            await (await second).close()

    run(go())


def test_many_idle_clients_cost_little_and_leave_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory(), server={"max_connections": 0}) as stage:
            clients = [await Client.connect(stage.path) for _ in range(150)]
            assert stage.export.clients == len(clients)
            for client in clients:
                await client.close()
            assert not stage.export.clients

    run(go())


def test_an_export_in_use_goes_only_by_force(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            extra = await NbdExport.open("e2", stage.node, name="extra", writable=True)
            stage.server.add(extra)
            with pytest.raises(UsageError, match="already has export named"):
                stage.server.add(extra)
            client = await Client.connect(stage.path, "extra")
            with pytest.raises(LockedError, match="still in use"):
                await stage.server.remove(extra)
            assert not (await client.do(Command.FLUSH)).error
            await stage.server.remove(extra, hard=True)
            assert await client.reader.read() == b""
            with pytest.raises(Exception, match="not present"):
                await Client.connect(stage.path, "extra")

    run(go())


def test_a_request_under_way_ends_when_its_client_is_dropped(tmp_path: Path) -> None:
    async def go() -> None:
        async with served(tmp_path, memory()) as stage:
            extra = await NbdExport.open("e2", stage.node, name="extra", writable=True)
            stage.server.add(extra)
            client = await Client.connect(stage.path, "extra")
            async with drained(stage.graph):
                client.ask(Command.WRITE, 0, payload=b"written all the same")
                while not any(each._in_flight for each in extra.connections):
                    await asyncio.sleep(0)
                removal = stage.server.begin_removal(extra, hard=True)
                await asyncio.sleep(0)
                assert not removal.done()
            await removal
            other = await Client.connect(stage.path)
            assert (await other.do(Command.READ, 0, 7)).content() == b"written"
            await other.close()

    run(go())
