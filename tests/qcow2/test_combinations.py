"""Features of qcow2 that meet in one image: encryption, extended L2 entries, data files, bitmaps,
snapshots. Both tools make the images, write to them by turns, and find the same in them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blocklayer.drivers import REGISTRY
from blocklayer.graph import bitmaps
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from crypto.volumes import FAST, OBJECTS, SECRETS, image_opts
from oracles import Oracle
from proof.chains import blk, blk_json
from proof.test_bitmaps import uncovered
from qcow2.images import driver_of, run
from qcow2.test_differential import LENGTHS, SIZES, Disk, spell

ENCRYPTED = {"encrypt.format": "luks", "encrypt.key-secret": "one", "encrypt.iter-time": FAST}
EXTENDED = {"extended_l2": "on", "cluster_size": 16384}

SHAPES: dict[str, dict[str, Any]] = {
    "encrypted, extended": {**ENCRYPTED, **EXTENDED},
    "encrypted, data file": {**ENCRYPTED, "data_file": "", "cluster_size": 4096},
    "encrypted, extended, data file": {**ENCRYPTED, **EXTENDED, "data_file": ""},
    "encrypted, bitmaps, snapshots": {**ENCRYPTED, "cluster_size": 65536},
    "encrypted, extended, bitmaps, snapshots": {**ENCRYPTED, **EXTENDED},
    "extended, bitmaps, snapshots": EXTENDED,
    "extended, raw data file, bitmaps": {**EXTENDED, "data_file": "", "data_file_raw": "on"},
}

KEYED_BY_QEMU = "encrypted, extended, data file"
"""The real tool measures for seconds how often to hash a passphrase, whatever it is told: of the
encrypted shapes it makes this one only, but in `make soak`."""

VERBS = ("write", "write", "write", "together", "zero", "unmap", "discard", "flush", "read")
VERBS += ("compress", "grow", "shrink")


class Life:
    """An image, what it must hold, and how either tool opens it."""

    def __init__(self, folder: Path, name: str, size: int) -> None:
        self.name = name
        self.path = folder / "a.qcow2"
        self.model = bytearray(size)
        self.snapshots: dict[str, bytes] = {}
        self.records = False
        """A bitmap knows what was written since the image was made."""
        self.made = dict(SHAPES[name])
        if "data_file" in self.made:
            self.made["data_file"] = str(folder / "data")
        self.source: dict[str, Any] = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(self.path)},
        }
        if "encrypted" in name:
            self.source["encrypt"] = {"key-secret": "one"}

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*OBJECTS, "--image-opts", image_opts(self.source))

    def fits(self, verb: str) -> bool:
        if verb == "compress":
            return "encrypted" not in self.name and "data file" not in self.name
        # Snapshots are of one size here; QEMU refuses to shrink beside them.
        return verb not in ("grow", "shrink") or "snapshots" not in self.name

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Root]:
        graph = Graph(REGISTRY)
        for name, data in SECRETS.items():
            graph.objects.add_secret(name, data)
        flags = Flags(read_only=False, discard_unmap=True)
        node = await open_image(graph, self.source, flags=flags)
        taken = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        root = Root(node, "test", taken=taken)
        try:
            yield root
        finally:
            await root.close()

    async def ours(self, steps: list[Any], number: int) -> None:
        """Requests by blocklayer; a bitmap and a snapshot at the start."""
        async with self.opened() as root:
            if "bitmaps" in self.name and not number:
                bitmaps.add(root.node, "all", granularity=512, persistent=True)
                self.records = True
            if "snapshots" in self.name:
                await driver_of(root).snapshot_create(f"s{number}")
                self.snapshots[f"s{number}"] = bytes(self.model)
            disk = Disk(root, self.model, self.made["cluster_size"])
            for verb, position, length in steps:
                if self.fits(verb):
                    await disk.request(verb, position, length)
            assert await root.read(0, len(self.model)) == self.model

    def theirs(self, steps: list[Any], number: int, qemu_img: Oracle, qemu_io: Oracle) -> None:
        """Requests by the real tools."""
        if "bitmaps" in self.name and not number:
            qemu_img("bitmap", "--add", "-g", "512", *self.arguments, "all")
            self.records = True
        if "snapshots" in self.name:
            qemu_img("snapshot", "-c", f"s{number}", *self.arguments)
            self.snapshots[f"s{number}"] = bytes(self.model)
        commands = []
        size = len(self.model)
        for verb, position, length in steps:
            offset = position % size // 512 * 512
            length = min(length, size - offset) // 512 * 512
            if not length:
                continue
            fill = random.Random(position).randrange(1, 256)
            if verb in ("write", "together", "compress"):
                commands.append(f"write -P {fill} {offset} {length}")
                self.model[offset : offset + length] = bytes([fill]) * length
            elif verb in ("zero", "unmap"):
                commands.append(f"write -z {'-u ' * (verb == 'unmap')}{offset} {length}")
                self.model[offset : offset + length] = bytes(length)
        given = [part for command in commands for part in ("-c", command)]
        said = qemu_io(*OBJECTS, *given, "--image-opts", image_opts(self.source)).stdout
        assert "failed" not in said

    def verify(self, qemu_img: Oracle) -> None:
        """Both tools find nothing wrong, and the model's bytes; maps are alike."""
        said = qemu_img("check", *self.arguments).stdout
        assert "No errors were found" in said
        run(self._look())
        out = self.path.with_name("out")
        contents = {None: self.model, **self.snapshots}
        for name in (None, *list(self.snapshots)[-1:]):
            which = () if name is None else ("-l", name)
            qemu_img("convert", *which, *self.arguments, "-O", "raw", out)
            assert out.read_bytes() == contents[name]
        if "raw" not in self.name:
            # Where such a file has holes, ours says so.
            line = ("map", "--output=json", *self.arguments)
            assert blk_json(*line) == qemu_img.json(*line)
        else:
            assert Path(self.made["data_file"]).read_bytes()[: len(self.model)] == self.model

    async def _look(self) -> None:
        async with self.opened() as root:
            assert await root.read(0, len(self.model)) == self.model
            found = await driver_of(root).check(frozenset())
            assert not found.corruptions
            assert not found.leaks
            if not self.records:
                return
            bitmap = bitmaps.find(root.node, "all")
            assert not bitmap.inconsistent
            await bitmap.load()
            assert uncovered(bitmap, bytes(len(self.model)), bytes(self.model)) == []


def random_steps(dice: random.Random) -> list[Any]:
    """Requests of one life."""
    return [
        (dice.choice(VERBS), dice.randrange(1 << 30), dice.choice(LENGTHS))
        for _ in range(dice.randint(1, 15))
    ]


def by_turns(qemu_img: Oracle, qemu_io: Oracle, name: str, seed: int, *, makers: int = 2) -> None:
    """Made by one tool, written by both in turns, and copied by both to an image of its kind.

    With 1 of the ``makers``, blocklayer makes the images, and the real tool only writes to them.
    """
    dice = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder), name, dice.choice(SIZES))
        line = ("create", "-q", *OBJECTS, "-f", "qcow2", "-o", spell(life.made))
        if dice.random() < 0.5 or makers == 1:
            blk("img", *line, life.path, len(life.model))
        else:
            qemu_img(*line, life.path, str(len(life.model)))
        turn = dice.randrange(2)
        for number in range(3):
            if number % 2 == turn:
                run(life.ours(random_steps(dice), number))
            else:
                life.theirs(random_steps(dice), number, qemu_img, qemu_io)
            life.verify(qemu_img)
        other = Life(Path(folder) / "copy", name, len(life.model))
        other.path.parent.mkdir()
        other.model = life.model
        where = ("-O", "qcow2", "-o", spell(other.made), other.path)
        for tool in (lambda *line: blk("img", *line), qemu_img)[:makers]:
            tool("convert", *life.arguments, *where)
            other.verify(qemu_img)


@pytest.mark.parametrize("name", SHAPES)
def test_by_turns(qemu_img: Oracle, qemu_io: Oracle, name: str) -> None:
    makers = 2 if "encrypted" not in name or name == KEYED_BY_QEMU else 1
    by_turns(qemu_img, qemu_io, name, 0, makers=makers)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 20))
@pytest.mark.parametrize("name", SHAPES)
def test_by_many_turns(qemu_img: Oracle, qemu_io: Oracle, name: str, seed: int) -> None:
    by_turns(qemu_img, qemu_io, name, seed)
