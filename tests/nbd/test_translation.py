"""The translation cache on and off: the same bytes, errors and bitmaps, whatever happens meanwhile.

The same seed gives the same requests; graph changes come between them, on the same connection.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blocklayer.codec.nbd.constants import Command, CommandFlag, Mode
from blocklayer.exports.translation import Translation
from blocklayer.graph import bitmaps, edit, snapshots
from blocklayer.graph.io import truncate
from blocklayer.graph.node import Node
from blocklayer.graph.open import open_options
from nbd.serving import Client, Served, image, run, served
from oracles import Oracle

SIZE = 3 << 20


class Story:
    """Requests and changes by a seed; keeps what the disk must hold."""

    def __init__(self, folder: Path, seed: int, form: str, qemu_img: Oracle) -> None:
        self.folder, self.chance, self.form, self.qemu_img = (
            folder,
            random.Random(seed),
            form,
            qemu_img,
        )
        self.model = bytearray(SIZE)
        self.log: list[Any] = []
        self.layers = 0

    async def request(self, client: Client) -> None:
        chance, model = self.chance, self.model
        length = chance.choice((1, 512, 4096, 4096, 65536, 70000, 300000))
        offset = chance.randrange(len(model) - length)
        if chance.random() < 0.7:
            offset &= ~4095
        match chance.randrange(9):
            case 0:
                await client.do(Command.WRITE_ZEROES, offset, length)
                model[offset : offset + length] = bytes(length)
            case 1:
                start, end = -(-offset // 65536) * 65536, (offset + length) // 65536 * 65536
                if start < end:
                    await client.do(Command.WRITE_ZEROES, start, end - start)
                    model[start:end] = bytes(end - start)
            case 2 | 3 | 4 | 5:
                answer = await client.do(Command.READ, offset, length)
                assert answer.content() == model[offset : offset + length], hex(offset)
            case _:
                data = chance.randbytes(length)
                flags = int(CommandFlag.FUA) if chance.random() < 0.1 else 0
                answer = await client.do(Command.WRITE, offset, payload=data, flags=flags)
                assert not answer.error
                model[offset : offset + length] = data

    async def change(self, stage: Served) -> None:
        """Something that the table must notice."""
        node = stage.export.node
        match self.chance.randrange(7):
            case 0 if self.form == "qcow2" and self.layers < 5:
                self.layers += 1
                path = self.folder / f"{self.layers}.qcow2"
                self.qemu_img("create", "-q", "-f", "qcow2", path, str(node.size))
                options = {"node-name": f"n{self.layers}", "backing": None, **image(path)}
                overlay = await open_options(stage.graph, options, node.flags)
                async with edit.changing(stage.graph):
                    edit.append(node, overlay)
            case 1:
                name = f"b{len(node.dirty_bitmaps)}"
                bitmaps.add(node, name, granularity=4096)
            case 2 if node.dirty_bitmaps:
                bitmap = self.chance.choice(list(node.dirty_bitmaps.values()))
                self.log.append((bitmap.name, bitmap.sha256(), bitmap.count))
                await bitmaps.remove(bitmap)
            case 3 if self.form == "qcow2":
                async with edit.changing(stage.graph):
                    await snapshots.create(stage.export.root, f"s{self.chance.randrange(1 << 30)}")
            case 4 if self.chance.random() < 0.3:
                node.flags.detect_zeroes = self.chance.choice(("off", "on", "unmap"))
            case 5:
                await truncate(node, node.size + 65536)
                self.model += bytes(65536)
            case _:
                pass


def digests(node: Node) -> list[Any]:
    return [
        (layer.name, name, bitmap.sha256())
        for layer in node.chain()
        for name, bitmap in layer.dirty_bitmaps.items()
    ]


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("seed", range(4))
def test_on_and_off_are_the_same(
    tmpfs: Path, seed: int, form: str, qemu_img: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_by_table: Counter[str] = Counter()
    _count(monkeypatch, served_by_table)

    async def tell(translate: bool) -> Any:
        folder = tmpfs / str(translate)
        folder.mkdir()
        path = folder / "disk"
        qemu_img("create", "-q", "-f", form, path, str(SIZE))
        story = Story(folder, seed, form, qemu_img)
        async with served(folder, image(path, form), translate=translate) as stage:
            clients = [await Client.connect(stage.path, mode=mode) for mode in Mode]
            for _ in range(3):
                await clients[0].do(Command.WRITE, 0, payload=b"w" * 65536)
                await clients[0].do(Command.READ, 0, 4096)
            story.model[:65536] = b"w" * 65536
            for _ in range(12):
                for _ in range(12):
                    await story.request(story.chance.choice(clients))
                await story.change(stage)
            for client in clients:
                content = await client.do(Command.READ, 0, len(story.model))
                assert content.content() == story.model
                await client.close()
            return story.model, story.log, digests(stage.export.node)

    with_table, without = run(tell(True)), None
    assert served_by_table["read"]
    assert served_by_table["write"]
    before = dict(served_by_table)
    without = run(tell(False))
    assert dict(served_by_table) == before
    assert with_table == without


def _count(monkeypatch: pytest.MonkeyPatch, counter: Counter[str]) -> None:
    """Count what the table serves."""
    read, write = Translation.read, Translation.write

    def counted_read(self: Translation, offset: int, length: int) -> bytearray | None:
        data = read(self, offset, length)
        counter["read"] += data is not None
        return data

    def counted_write(self: Translation, offset: int, data: Any) -> bool:
        done = write(self, offset, data)
        counter["write"] += done
        return done

    monkeypatch.setattr(Translation, "read", counted_read)
    monkeypatch.setattr(Translation, "write", counted_write)


async def _warm(tmpfs: Path, stage: Served) -> Client:
    """A client whose first granules are in the table, for reading and writing."""
    client = await Client.connect(stage.path)
    for _ in range(3):
        await client.do(Command.WRITE, 0, payload=b"w" * 65536)
        await client.do(Command.READ, 0, 4096)
    return client


@pytest.mark.parametrize("reason", ["poisoned", "read-only"])
def test_a_node_that_takes_no_writes_takes_none_through_the_table(
    tmpfs: Path, reason: str, qemu_img: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter: Counter[str] = Counter()
    _count(monkeypatch, counter)
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> None:
        async with served(tmpfs, image(path)) as stage:
            client = await _warm(tmpfs, stage)
            assert counter["write"]
            file = stage.node.children["file"].node
            if reason == "poisoned":
                file.poison("a flush failed")
            else:
                # As if reopened: the flag alone must be enough.
                file.flags.read_only = True
            before = counter["write"]
            answer = await client.do(Command.WRITE, 0, payload=b"x")
            assert answer.error
            assert counter["write"] == before
            assert (await client.do(Command.READ, 0, 1)).content() == b"w"
            file.flags.read_only, file.poisoned = False, None
            await client.close()

    run(go())


def test_nothing_passes_a_drained_root(
    tmpfs: Path, qemu_img: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter: Counter[str] = Counter()
    _count(monkeypatch, counter)
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> None:
        async with served(tmpfs, image(path)) as stage:
            client = await _warm(tmpfs, stage)
            async with edit.changing(stage.graph):
                before = dict(counter)
                client.ask(Command.READ, 0, 4096)
                client.ask(Command.WRITE, 0, payload=b"x")
                (connection,) = stage.export.connections
                other = await Client.listed(stage.path)
                assert other.result
                assert connection._in_flight == 2
                assert dict(counter) == before
            assert len(await client.answers(2)) == 2
            await client.close()

    run(go())


def test_write_through_means_the_graph(
    tmpfs: Path, qemu_img: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter: Counter[str] = Counter()
    _count(monkeypatch, counter)
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")

    async def go() -> None:
        async with served(tmpfs, image(path), writethrough=True) as stage:
            client = await _warm(tmpfs, stage)
            assert counter["read"]
            assert not counter["write"]
            await client.close()

    run(go())
