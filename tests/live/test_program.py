"""`blocklayer.Daemon`: disks in use, from Python, beside a guest that writes all the time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import blocklayer
from blocklayer import aio
from blocklayer.errors import UsageError
from jobs.live import SIZE, Guest
from oracles import HANG_TIMEOUT_S, Oracle

Scene = Callable[[blocklayer.Daemon, Guest, Path], Awaitable[None]]


@asynccontextmanager
async def writing(guest: Guest) -> AsyncIterator[None]:
    """The guest writes meanwhile, before and after."""
    guest.start()
    await guest.at_least(5)
    yield
    await guest.at_least(5)
    await guest.stop()
    await guest.check()


def play(folder: Path, scene: Scene) -> None:
    """``scene`` with a daemon that has disk0: a chain of base, middle, top; and the guest on it."""

    async def main() -> None:
        below = None
        for name in ("base", "middle", "top"):
            path = folder / f"{name}.qcow2"
            await aio.create(path, SIZE, backing=below, backing_format="qcow2" if below else None)
            async with await aio.Disk.open(path, writable=True) as disk:
                for _ in range(4):
                    place = random.randrange(SIZE // 65536) * 65536
                    await disk.write(place, random.randbytes(65536))
            below = path
        async with blocklayer.Daemon() as daemon:
            disk = await daemon.add("disk0", folder / "top.qcow2")
            guest = Guest(disk.root, 1, await disk.read(0, SIZE))
            async with asyncio.timeout(HANG_TIMEOUT_S):
                await scene(daemon, guest, folder)
        assert daemon.graph.nodes == {}

    asyncio.run(main())


async def content(path: Path, format: str | None = None) -> bytes:
    async with await aio.Disk.open(path, format=format) as disk:
        return await disk.read(0, SIZE)


def names(daemon: blocklayer.Daemon) -> list[str]:
    return [Path(layer.filename).name for layer in daemon.disk("disk0").root.node.chain()]


def test_snapshots_commits_and_streams(tmp_path: Path, qemu_img: Oracle) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        reports: list[float] = []
        async with writing(guest):
            await daemon.snapshot("disk0", overlay=str(folder / "o1.qcow2"))
            assert names(daemon) == ["o1.qcow2", "top.qcow2", "middle.qcow2", "base.qcow2"]
            await guest.at_least(5)
            await daemon.commit(
                "disk0", top=str(folder / "top.qcow2"), base=str(folder / "middle.qcow2")
            )
            assert names(daemon) == ["o1.qcow2", "middle.qcow2", "base.qcow2"]
            await daemon.commit("disk0", base=str(folder / "middle.qcow2"))
            assert names(daemon) == ["middle.qcow2", "base.qcow2"]
            await daemon.snapshot("disk0", overlay=str(folder / "o2.qcow2"))
            await guest.at_least(5)
            await daemon.stream("disk0", progress=lambda report: reports.append(report.percent))
            assert names(daemon) == ["o2.qcow2"]
        assert reports
        await daemon.remove("disk0")
        assert await content(folder / "o2.qcow2") == bytes(guest.content)
        qemu_img("check", "-q", folder / "o2.qcow2")

    play(tmp_path, scene)


def test_snapshots_of_two_disks_have_one_instant(tmp_path: Path) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        await aio.create(folder / "b.qcow2", SIZE)
        other = await daemon.add("disk1", folder / "b.qcow2")
        counting = asyncio.Event()

        async def count() -> None:
            # A count is on both disks, or is about to be on the second.
            for number in range(1, 1 << 30):
                await guest.root.write(0, number.to_bytes(512, "big"))
                await other.write(0, number.to_bytes(512, "big"))
                if number == 20:
                    counting.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(count())
        await counting.wait()
        await daemon.snapshot({"disk0": folder / "a1.qcow2", "disk1": folder / "b1.qcow2"})
        task.cancel()
        await asyncio.wait((task,))
        await daemon.remove("disk0")
        await daemon.remove("disk1")
        kept = [
            int.from_bytes((await content(folder / n))[:512], "big")
            for n in ("top.qcow2", "b.qcow2")
        ]
        assert kept[0] >= 20
        assert kept[0] - kept[1] in (0, 1)

    play(tmp_path, scene)


@pytest.mark.parametrize("pivot", [True, False])
def test_mirror(tmp_path: Path, pivot: bool) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        copy = folder / "copy.qcow2"
        async with writing(guest):
            await daemon.mirror("disk0", copy, pivot=pivot, write_blocking=True)
        assert names(daemon)[0] == ("copy.qcow2" if pivot else "top.qcow2")
        if pivot:
            await daemon.remove("disk0")
            assert await content(copy) == bytes(guest.content)
        else:
            await daemon.mirror("disk0", folder / "still.raw", format="raw")
            assert await content(folder / "still.raw", "raw") == bytes(guest.content)

    play(tmp_path, scene)


def test_backups(tmp_path: Path) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        disk = daemon.disk("disk0")
        disk.bitmaps.add("b")
        full = bytes(guest.content)
        async with writing(guest):
            pass
        first = bytes(guest.content)
        task = asyncio.create_task(
            daemon.backup(
                "disk0", folder / "i1.qcow2", sync="incremental", bitmap="b", speed=1 << 20
            )
        )
        while not list(daemon.jobs):
            await asyncio.sleep(0)
        async with writing(guest):
            pass
        await task
        assert await disk.bitmaps.dirty("b")
        await daemon.backup("disk0", folder / "full.qcow2")
        assert await content(folder / "full.qcow2") == bytes(guest.content)
        restored = bytearray(full)
        async with await aio.Disk.open(folder / "i1.qcow2", backing=False) as saved:
            async for extent in saved.map():
                if extent.present:
                    end = extent.start + extent.length
                    restored[extent.start : end] = await saved.read(extent.start, extent.length)
        assert bytes(restored) == first

    play(tmp_path, scene)


@pytest.mark.parametrize("sync", ["incremental", "bitmap"])
def test_zeros_are_part_of_an_increment(tmp_path: Path, sync: str) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        disk = daemon.disk("disk0")
        await disk.write(0, b"x" * (256 << 10))
        await daemon.backup("disk0", folder / "full.qcow2", checkpoint="c1")
        await disk.write_zeroes(0, 64 << 10)
        await disk.write_zeroes(64 << 10, 64 << 10, unmap=True)
        await disk.write(128 << 10, bytes(64 << 10))
        saved = folder / "inc.qcow2"
        await daemon.backup("disk0", saved, sync=sync, bitmap="c1")  # type: ignore[arg-type]
        await aio.rebase(saved, str(folder / "full.qcow2"), backing_format="qcow2", unsafe=True)
        assert await content(saved) == await disk.read(0, SIZE)

    play(tmp_path, scene)


def test_a_job_whose_waiter_is_cancelled_is_called_off(tmp_path: Path) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        async with writing(guest):
            task = asyncio.create_task(daemon.stream("disk0", speed=1))
            await guest.at_least(5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert list(daemon.jobs) == []
            assert len(names(daemon)) == 3

    play(tmp_path, scene)


def test_exports_and_resizing(tmp_path: Path, qemu_io: Oracle) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        uri = f"nbd+unix:///vda?socket={folder}/nbd.sock"
        await daemon.export("disk0", uri)
        await asyncio.to_thread(qemu_io, "-f", "raw", "-c", "write -P 7 0 64k", uri)
        assert await daemon.disk("disk0").read(0, 65536) == b"\x07" * 65536
        await daemon.resize("disk0", "8M")
        assert daemon.disk("disk0").size == 8 << 20
        await daemon.unexport("disk0")

    play(tmp_path, scene)


def test_what_is_refused(tmp_path: Path) -> None:
    async def scene(daemon: blocklayer.Daemon, guest: Guest, folder: Path) -> None:
        with pytest.raises(UsageError, match="no disk 'nowhere'"):
            await daemon.snapshot("nowhere", overlay="x")
        with pytest.raises(UsageError, match="already"):
            await daemon.add("disk0", folder / "base.qcow2")
        with pytest.raises(UsageError, match="Invalid disk name"):
            await daemon.add("0", folder / "base.qcow2")
        with pytest.raises(UsageError, match="backing chain"):
            await daemon.commit("disk0", base="nowhere")

    play(tmp_path, scene)
