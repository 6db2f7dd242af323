"""The story of the tour: a disk, a chain on top of it, and what one can do with a chain.

1. After every scene each byte a guest would read is compared with what it must be.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import blocklayer
from blocklayer.api.disk import Disk
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.cli.tour.stage import Stage, TourError
from blocklayer.units import KIB, MIB, format_size

_DISK_SIZE = 96 * MIB
_DIARY_SIZE = 16 * MIB


class Tour(Command):
    """Play with disk images and with disks in use, checking every step

    First a chain of images that nobody uses: commit, rebase, convert. Then a live daemon and a
    guest that never stops writing: snapshots, commit, stream, mirrors, backups, and a disk that
    moves to another daemon.
    """

    OPERANDS = (("[FOLDER]", "where to put the tour's disks (default: the temporary folder)"),)

    live: Annotated[bool, Option("play with disks in use only")] = False

    async def run(self) -> int:
        """Play; 0 if every check held."""
        from blocklayer.cli.tour.live import LiveStory

        if len(self.operands) > 1:
            raise CommandLineError("Expecting one folder at most")
        parent = Path(self.operands[0] if self.operands else tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        stage = Stage(Path(tempfile.mkdtemp(prefix="blocklayer-tour-", dir=parent)))
        began = time.monotonic()
        try:
            content = random.Random(1).randbytes(_DIARY_SIZE)
            if not self.live:
                await Story(stage).play()
                content = (stage.folder / "base.raw").read_bytes()
            await LiveStory(stage, content).play()
        except TourError:
            print(f"\nThe tour stopped. Its disks are in {stage.folder}")
            return 1
        print(f"\n{stage.checks} checks passed in {time.monotonic() - began:.1f} seconds.")
        if not self.live:
            _what_next(stage.folder)
        return 0


class Story:
    """The scenes, in order. ``self.expected`` is the active disk as the guest must see it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.folder = stage.folder
        self.expected = bytearray()
        self.monday = b""
        self.diary = 0
        """Where the diary begins on the disk."""

    async def play(self) -> None:
        """All scenes."""
        await self.a_real_disk()
        await self.a_chain()
        await self.fall_through()
        await self.commit()
        await self.rebase()
        await self.convert()

    async def a_real_disk(self) -> None:
        """Make an ext4 file system from real files, with a large file to write into later."""
        stage = self.stage
        stage.scene("A real disk")
        files = self.folder / "files"
        shutil.copytree(
            Path(blocklayer.__file__).parent,
            files / "blocklayer",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        diary = random.Random(1).randbytes(_DIARY_SIZE)
        (files / "diary").write_bytes(diary)
        base = self.folder / "base.raw"
        if _make_file_system(base, files):
            stage.say("mke2fs made base.raw: an ext4 file system with this program's own source")
            stage.say("and a large file, the guest's diary.")
            stage.file_system_sound("base.raw")
        else:
            stage.say("mke2fs is not installed: base.raw holds the diary alone.")
            base.write_bytes(bytes(4 * MIB) + diary + bytes(_DISK_SIZE - 4 * MIB - _DIARY_SIZE))
        self.expected = bytearray(base.read_bytes())
        # The story writes to the first half of the diary: it must be one piece on the disk.
        self.diary = self.expected.find(diary[: _DIARY_SIZE // 2])
        stage.check(self.diary > 0, f"the diary lies at {self.diary:#x} of the disk")
        stage.blk("img info -f raw base.raw")

    async def a_chain(self) -> None:
        """Two overlays; each is written while it is the active layer."""
        stage = self.stage
        stage.scene("A chain: base, overlay, overlay")
        stage.say("An overlay holds what differs from the image below it. The base stays as it is.")
        before = await stage.digest("base.raw")
        stage.blk("img create -f qcow2 -b base.raw -F raw overlay1.qcow2")
        stage.chain("base.raw", "overlay1.qcow2")
        await self.write("overlay1.qcow2", 1 * MIB, b"monday. ", 300 * KIB)
        stage.say("The guest wrote its diary. A snapshot: a new overlay becomes the active layer.")
        self.monday = bytes(self.expected)
        stage.blk("img create -f qcow2 -b overlay1.qcow2 -F qcow2 overlay2.qcow2")
        stage.chain("base.raw", "overlay1.qcow2", "overlay2.qcow2")
        await self.write("overlay2.qcow2", 0, b"tuesday. ", 64 * KIB)
        await self.zero("overlay2.qcow2", 6 * MIB, 256 * KIB)
        stage.check(
            await stage.digest("base.raw") == before, "base.raw did not change by a single byte"
        )
        await stage.same_bytes("overlay1.qcow2", self.monday, "overlay1 still shows monday's disk")
        await stage.same_bytes("overlay2.qcow2", self.expected, "overlay2 shows tuesday's")
        stage.sound("overlay1.qcow2", "overlay2.qcow2")

    async def fall_through(self) -> None:
        """Which layer a read comes from."""
        stage = self.stage
        stage.scene("A read falls through to the first layer that has the data")
        async with await Disk.open(self.folder / "overlay2.qcow2") as disk:
            for depth, place in enumerate((0, 1 * MIB + 64 * KIB, 3 * MIB)):
                extent = await anext(disk.map(self.diary + place, 4 * KIB))
                layer = ("overlay2.qcow2", "overlay1.qcow2", "base.raw")[depth]
                stage.check(
                    extent.depth == depth, f"{self.diary + place:#010x} is read from {layer}"
                )
        stage.say("The same, for the whole disk:")
        stage.blk("img map overlay2.qcow2")

    async def commit(self) -> None:
        """Merge the active layer into the one below."""
        stage = self.stage
        stage.scene("Commit: the overlay's data moves down into its backing file")
        stage.blk("img commit -d overlay2.qcow2")
        stage.chain("base.raw", "overlay1.qcow2")
        await stage.same_bytes("overlay1.qcow2", self.expected, "overlay1 now shows tuesday's disk")
        stage.sound("overlay1.qcow2")
        (self.folder / "overlay2.qcow2").unlink()

    async def rebase(self) -> None:
        """Move the overlay onto another base, then onto none."""
        stage = self.stage
        stage.scene("Rebase: the same disk on another base, then on none")
        stage.blk("img create -f qcow2 empty.qcow2 " + str(len(self.expected)), show=False)
        stage.blk("img rebase -b empty.qcow2 -F qcow2 overlay1.qcow2")
        stage.chain("empty.qcow2", "overlay1.qcow2")
        await stage.same_bytes("overlay1.qcow2", self.expected, "the guest sees no difference")
        stage.blk("img rebase -b '' overlay1.qcow2")
        stage.chain("overlay1.qcow2")
        await stage.same_bytes("overlay1.qcow2", self.expected, "nor without any base")
        stage.sound("overlay1.qcow2")

    async def convert(self) -> None:
        """To compressed and back."""
        stage = self.stage
        stage.scene("Convert: to a compressed image, and back to raw")
        stage.blk("img convert -c -O qcow2 overlay1.qcow2 small.qcow2")
        sizes = [(self.folder / name).stat().st_size for name in ("overlay1.qcow2", "small.qcow2")]
        stage.say(
            f"overlay1.qcow2 takes {format_size(sizes[0])}, small.qcow2 {format_size(sizes[1])}"
        )
        stage.check(sizes[1] < sizes[0], "the compressed image is smaller")
        stage.blk("img convert -O raw small.qcow2 back.raw")
        stage.blk("img compare overlay1.qcow2 back.raw")
        await stage.same_bytes(
            "back.raw", self.expected, "back.raw holds the same disk, byte for byte"
        )
        stage.sound("small.qcow2")
        stage.file_system_sound("back.raw")

    async def write(self, image: str, place: int, words: bytes, length: int) -> None:
        """The guest writes ``length`` bytes of its diary, and the tour notes what it must read."""
        text = (words * (length // len(words) + 1))[:length]
        at = self.diary + place
        async with await Disk.open(self.folder / image, writable=True) as disk:
            await disk.write(at, text)
            await disk.flush()
        self.expected[at : at + len(text)] = text

    async def zero(self, image: str, place: int, length: int) -> None:
        """The guest makes a part of its diary read as zeros."""
        async with await Disk.open(self.folder / image, writable=True) as disk:
            await disk.write_zeroes(self.diary + place, length)
        self.expected[self.diary + place : self.diary + place + length] = bytes(length)


def _make_file_system(image: Path, files: Path) -> bool:
    tool = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if tool is None:
        return False
    command = [tool, "-q", "-t", "ext4", "-b", "4096", "-d", str(files), str(image)]
    command.append(f"{_DISK_SIZE // KIB}k")
    subprocess.run(command, check=True, capture_output=True)
    return True


def _what_next(folder: Path) -> None:
    print(f"\nThe disks are yours to play with. Try:\n\n  cd {folder}")
    beside = Path(sys.executable).with_name("blk")
    if shutil.which("blk") is None and beside.exists():
        print(f"  alias blk={beside}")
    for command in (
        "blk img create -f qcow2 -b small.qcow2 -F qcow2 mine.qcow2",
        "blk io -c 'write -P 0x42 1M 64k' -c 'read -v 1M 64' mine.qcow2",
        "blk img map mine.qcow2",
        "blk img info --backing-chain mine.qcow2",
    ):
        print(f"  {command}")
