"""The tour's second half: a live daemon, and a guest that writes while its disks are moved about.

1. After every scene the guest is paused, and each byte of its disks compared with what was
   acknowledged. Each copy of a moment must be the disk after exactly so many requests.
2. Everything here is done by ``blocklayer.Daemon``; the lines shown say it in `blk live`'s words.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from blocklayer.api.disk import Disk, create
from blocklayer.cli.tour.guest import Guest
from blocklayer.cli.tour.stage import Stage
from blocklayer.daemon.program import Daemon, SyncMode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import MIB

_SIZE = 24 * MIB
_SOME = 100
"""Requests that the guest makes at least before and after each operation."""


class LiveStory:
    """The scenes with disks in use."""

    def __init__(self, stage: Stage, content: bytes) -> None:
        self.stage = stage
        self.folder = stage.folder / "live"
        self.content = content[:_SIZE].ljust(_SIZE, b"\0")
        self.daemon = Daemon()
        self.guest: Guest

    async def play(self) -> None:
        """All scenes."""
        self.folder.mkdir()
        async with self.daemon:
            await self.a_live_disk()
            await self.snapshots()
            await self.commit()
            await self.stream()
            await self.mirrors()
            await self.point_in_time()
            await self.incremental_backups()
            await self.migration()
        await self.sound()

    def path(self, name: str) -> str:
        """Where the image ``name`` is."""
        return str(self.folder / name)

    def draw(self) -> None:
        """The chains, as the daemon has them now."""
        for name, disk in self.daemon.disks.items():
            layers = [Path(layer.filename).name for layer in disk.root.node.chain()]
            self.stage.chain(*reversed(layers), user=name)

    async def settle(self, what: str) -> None:
        """Pause the guest, compare, draw, and let it go on."""
        await self.guest.at_least(_SOME)
        await self.guest.pause()
        held = [await self.guest.lost_nothing(name) for name in self.daemon.disks]
        self.stage.check(
            all(held), f"{what}; {self.guest.acknowledged} acknowledged requests, none lost"
        )
        self.draw()
        self.guest.start()

    def moment(self, what: str, **copies: bytes) -> None:
        """Check that ``copies`` are one moment of the disks."""
        number = self.guest.moment(**copies)
        self.stage.check(number is not None, f"{what} the disk after request {number} exactly")

    async def sound(self) -> None:
        """Check the metadata of every image that came about."""
        images = sorted(path for path in self.folder.iterdir() if path.suffix == ".qcow2")
        for path in images:
            async with await Disk.open(path, format="qcow2") as disk:
                found = await disk.check()
            wrong = found.corruptions or found.leaks or found.check_errors
            self.stage.check(not wrong, f"{path.name} is sound", quiet=True)
            self.stage.foreign_check(path)
        self.stage.check(True, f"the metadata of all {len(images)} images is sound")

    async def a_live_disk(self) -> None:
        """Two disks, and a guest that writes to both all the time."""
        stage = self.stage
        stage.scene("A live daemon: two disks, and a guest that never stops writing")
        for name in ("disk0", "disk1"):
            (self.folder / f"{name}.raw").write_bytes(self.content)
            await create(
                self.path(f"{name}.qcow2"), None, backing=self.path(f"{name}.raw"),
                backing_format="raw",
            )  # fmt: skip
            await self.daemon.add(name, self.path(f"{name}.qcow2"))
        stage.say("blockdev-add: each disk is an overlay over a raw image.")
        self.guest = Guest(self.daemon.disks, dict.fromkeys(self.daemon.disks, self.content))
        self.draw()
        self.guest.start()
        await self.settle("the guest reads what it wrote")

    async def snapshots(self) -> None:
        """Both disks at one instant."""
        stage = self.stage
        stage.scene("Live snapshot: both disks, at one instant")
        stage.command("blk live SOCKET snapshot-create-as s1 --disk-only --atomic")
        await self.guest.at_least(_SOME)
        await self.daemon.snapshot({n: self.path(f"{n}.s1.qcow2") for n in self.daemon.disks})
        await self.guest.at_least(_SOME)
        below = {
            name: await _content(disk.root.node.chain()[1])
            for name, disk in self.daemon.disks.items()
        }
        self.moment("the layers below are, both of them,", **below)
        await self.settle("the guest went on in the overlays")

    async def commit(self) -> None:
        """The overlays move down again."""
        stage = self.stage
        stage.scene("Active commit and pivot: the overlay's data moves down, the guest with it")
        stage.command("blk live SOCKET blockcommit disk0 --shallow --active --pivot")
        for name in self.daemon.disks:
            await self.daemon.commit(name, base=self.path(f"{name}.qcow2"))
        await self.settle("the guest writes to the lower images again")

    async def stream(self) -> None:
        """The disk becomes one image."""
        stage = self.stage
        stage.scene("Stream: what is below is copied up, the chain becomes one image")
        stage.command("blk live SOCKET snapshot-create-as s2 && … blockpull disk0 --wait")
        await self.daemon.snapshot("disk0", self.path("disk0.s2.qcow2"))
        await self.guest.at_least(_SOME)
        self.draw()
        await self.daemon.stream("disk0")
        alone = len(self.daemon.disk("disk0").root.node.chain()) == 1
        stage.check(alone, "disk0 no longer needs any image below")
        await self.settle("the guest saw nothing of it")

    async def mirrors(self) -> None:
        """Full, top and none."""
        stage = self.stage
        stage.scene(
            "Mirror: a copy that keeps up, of all (full), of one layer (top), of what is new"
        )
        stage.command("blk live SOCKET blockcopy disk0 full.qcow2 --finish")
        plan: tuple[tuple[SyncMode, str], ...] = (
            ("full", "disk0"), ("top", "disk1"), ("none", "disk0")
        )  # fmt: skip
        for sync, disk in plan:
            copied: list[bytes] = []

            async def compare(disk: str = disk, copied: list[bytes] = copied) -> None:
                await self.guest.at_least(_SOME)
                await self.guest.pause()
                copied.append(await _content(self.daemon.disk(disk).root.node))

            name = f"{disk}.{sync}.qcow2"
            await self.daemon.mirror(
                disk,
                self.path(name),
                sync=sync,
                write_blocking=True,  # a guest that never pauses may outrun a copy behind it
                when_ready=compare,
            )
            await self.daemon.disk(disk).flush()
            shown = await _shown(self.path(name))
            stage.check(shown == copied[0], f"sync={sync}: {name} shows the disk as it was left")
            self.guest.start()
        stage.command("blk live SOCKET blockcopy disk0 moved.qcow2 --pivot --synchronous-writes")
        moved = self.path("disk0.moved.qcow2")
        await self.daemon.mirror("disk0", moved, pivot=True, write_blocking=True)
        await self.settle("the guest's disk is another file now")

    async def point_in_time(self) -> None:
        """A moment of the disk, kept readable beside the guest."""
        stage = self.stage
        stage.scene("Backup with sync=none: one moment, readable while the disk goes on")
        stage.command("blk live SOCKET backup-begin --pull --diskspec disk1")
        await self.guest.at_least(_SOME)
        target = self.path("disk1.moment.qcow2")
        keeping = asyncio.create_task(self.daemon.backup("disk1", target, sync="none"))
        while (job := self.daemon.jobs.find("backup-disk1")) is None:
            await asyncio.sleep(0)
        await self.guest.at_least(2 * _SOME)
        self.moment("what it shows is", disk1=await _content(job.target.node))  # type: ignore[attr-defined]
        keeping.cancel()
        await asyncio.wait((keeping,))
        await self.settle("the guest's writes waited for nothing but its own clusters")

    async def incremental_backups(self) -> None:
        """A full backup, then only what changed."""
        stage = self.stage
        stage.scene("Incremental backups: a bitmap records what changes")
        stage.command("blk live SOCKET backup-begin --incremental c1 --checkpoint c2 --wait")
        await self.daemon.backup("disk1", self.path("full.qcow2"), checkpoint="changes")
        below = self.path("full.qcow2")
        for number in (1, 2):
            await self.guest.at_least(_SOME)
            saved = self.path(f"inc{number}.qcow2")
            await self.daemon.backup("disk1", saved, sync="incremental", bitmap="changes")
            restored = await _shown(saved, below)
            self.moment(f"full.qcow2 with {number} increment(s) is", disk1=restored)
            await _rebase(saved, below)
            below = saved
        sizes = [Path(self.path(n)).stat().st_size // 1024 for n in ("full.qcow2", "inc2.qcow2")]
        stage.say(f"full.qcow2 takes {sizes[0]} KiB, inc2.qcow2 {sizes[1]} KiB")
        await self.settle("the guest never waited for a backup")

    async def migration(self) -> None:
        """The disk moves to another daemon."""
        stage = self.stage
        stage.scene("Live storage migration: disk1 moves to another daemon, over NBD")
        uri = f"nbd+unix:///disk1?socket={self.path('b.sock')}"
        stage.command(f"blk live SOCKET blockcopy disk1 '{uri}' --pivot --synchronous-writes")
        async with Daemon() as other:
            await create(self.path("host-b.qcow2"), _SIZE)
            there = await other.add("disk1", self.path("host-b.qcow2"))
            await other.export("disk1", uri)
            await self.daemon.mirror("disk1", uri, pivot=True, write_blocking=True)
            stage.say("The guest's requests go to host-b.qcow2 in the other daemon now.")
            await self.settle("moved while in use")
            await self.guest.pause()
            same = await there.read(0, _SIZE) == await self.daemon.disk("disk1").read(0, _SIZE)
            stage.check(same, "the other daemon's disk is the guest's disk, byte for byte")
            await self.daemon.remove("disk1")
        await self.daemon.remove("disk0")


async def _content(node: Any) -> bytes:
    """What ``node`` shows, read beside its users."""
    root = Root(node, "the tour", Permission.CONSISTENT_READ, follows=False)
    try:
        return await root.read(0, node.size)
    finally:
        await root.close()


async def _shown(path: str, backing: str | None = None) -> bytes:
    """What a guest would read from the image, which a daemon may have open below."""
    options: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": path}}
    if backing is not None:
        options["backing"] = {"driver": "qcow2", "file": {"driver": "file", "filename": backing}}
    async with await Disk.open(options, force_share=True) as disk:
        return await disk.read(0, disk.size)


async def _rebase(path: str, below: str) -> None:
    """Let the increment name what it builds on."""
    from blocklayer.api.rebase import rebase

    await rebase(path, below, backing_format="qcow2", unsafe=True)
