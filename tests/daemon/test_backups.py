"""blockdev-backup and drive-backup beside the real storage daemon: replies, events, images."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from blocklayer import aio
from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.transactions import transaction
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import bitmaps
from blocklayer.graph.events import Event
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.qmp.commands import COMMANDS
from blocklayer.qmp.errors import describe
from oracles import HANG_TIMEOUT_S, Oracle, require

SIZE = "4M"
NODES = ("a", "b", "t", "t2", "small", "raw")

Arguments = dict[str, Any]
Step = tuple[str, Arguments]


def backup(**arguments: Any) -> Step:
    return "blockdev-backup", _full(arguments)


def drive(**arguments: Any) -> Step:
    return "drive-backup", _full(arguments)


def _full(arguments: Arguments) -> Arguments:
    given = {"job-id": "j", "device": "a", "target": "t", "sync": "full"}
    given |= {name.replace("_", "-"): value for name, value in arguments.items()}
    return {name: value for name, value in given.items() if value is not None}


def perf(**arguments: Any) -> Arguments:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


REFUSED: list[Step] = [
    backup(job_id=None),
    backup(job_id="1x"),
    backup(device="zz"),
    backup(target="zz"),
    backup(target="small"),
    backup(target="a"),
    backup(target="raw", compress=True),
    backup(sync="bitmap"),
    backup(sync="incremental"),
    backup(sync="incremental", bitmap="q"),
    backup(sync="bitmap", bitmap="q", bitmap_mode="always"),
    backup(bitmap="q"),
    backup(bitmap="x"),
    backup(bitmap_mode="always"),
    backup(sync="none", bitmap="x"),
    backup(sync="none", bitmap="x", bitmap_mode="always"),
    backup(bitmap="x", bitmap_mode="never"),
    backup(sync="top", bitmap="x", bitmap_mode="never"),
    backup(sync="incremental", bitmap="x", bitmap_mode="never"),
    backup(sync="bitmap", bitmap="x"),
    backup(x_perf=perf(max_workers=0)),
    backup(x_perf=perf(max_workers=3_000_000_000)),
    backup(x_perf=perf(max_chunk=-1)),
    backup(x_perf=perf(max_chunk=1000)),
    backup(x_perf=perf(min_cluster_size=1000)),
    backup(x_perf=perf(bad=1)),
    backup(filter_node_name="b"),
    backup(sync="nonsense"),
    backup(sync=None),
    backup(device=None),
    backup(target=None),
    backup(speed="x"),
    backup(nonsense=1),
    backup(bitmap_mode="bad"),
    backup(on_source_error="bad"),
    backup(target="small", bitmap="q", compress=True, bitmap_mode="always"),
    backup(target="small", sync="incremental", bitmap="q", x_perf=perf(max_workers=0)),
    backup(job_id="", x_perf=perf(max_workers=0)),
    backup(job_id="1", target="small"),
    backup(job_id="1", speed=-1),
    drive(target=None),
    drive(mode="bad", target="n1"),
    drive(target="n2.qcow2", format="nope"),
    drive(target="missing/n3.qcow2"),
    drive(target="n4.qcow2", mode="existing", format="qcow2"),
    drive(target="n5.qcow2", sync="bitmap"),
    drive(target="n6.raw", format="raw", sync="none"),
    drive(target="n7.qcow2", device="zz"),
]

DONE: list[list[Step]] = [
    [backup()],
    [backup(compress=True)],
    [backup(sync="top")],
    [backup(sync="incremental", bitmap="x")],
    [backup(sync="incremental", bitmap="dirty")],
    [backup(sync="bitmap", bitmap="dirty", bitmap_mode="never")],
    [backup(bitmap="dirty", bitmap_mode="always")],
    [backup(sync="none"), ("job-cancel", {"id": "j"})],
    [backup(auto_finalize=False, auto_dismiss=False), ("job-finalize", {"id": "j"})],
    [drive(target="n10.qcow2")],
    [drive(target="n11.qcow2", sync="top")],
    [drive(target="n12.raw", format="raw")],
    [drive(target="n13.qcow2", sync="none"), ("job-cancel", {"id": "j"})],
    [drive(target="n14.qcow2"), drive(target="n14.qcow2", mode="existing", format="qcow2")],
]


Goal = tuple[str, int]


def goal_of(steps: list[Step], position: int) -> Goal:
    """The event, and how many of it, that a step of a conversation ends with."""
    following = steps[position + 1][0] if position + 1 < len(steps) else ""
    if following == "job-cancel":
        return "running", 2
    if following == "job-finalize":
        return "BLOCK_JOB_PENDING", 1
    return ("concluded" if steps[position][0] == "job-finalize" else "null"), 1


def met(goal: Goal, events: list[Any]) -> bool:
    names = [event["data"].get("status", event["event"]) for event in events]
    return names.count(goal[0]) >= goal[1]


class Real:
    """The real daemon; the job's events are read until it is over."""

    def __init__(self) -> None:
        # By pipes, in this folder: with --daemonize it would go to another.
        self.process = subprocess.Popen(
            [
                require("qemu-storage-daemon").path,
                *("--chardev", "stdio,id=m,signal=off", "--monitor", "chardev=m"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.events: list[Any] = []
        self._read()
        self.ask("qmp_capabilities", {})

    def close(self) -> None:
        with self.process:
            self.process.kill()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith(b"{"):
            # Images that are made are told of among the messages.
            assert line.startswith(b"Formatting"), line
        return json.loads(line)

    def ask(self, name: str, arguments: Arguments) -> Any:
        message = {"execute": name, "arguments": arguments}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode())
        self.process.stdin.flush()
        while "event" in (reply := self._read()):
            self._heard(reply)
        return reply

    def _heard(self, reply: Any) -> None:
        self.events.append({"event": reply["event"], "data": reply["data"]})

    def until(self, goal: Goal) -> list[Any]:
        """The events so far, once ``goal`` is met."""
        while not met(goal, self.events):
            self._heard(self._read())
        heard, self.events = self.events, []
        return heard


class Ours:
    """Our daemon behind the same commands."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.monitor = SimpleNamespace(server=SimpleNamespace(daemon=daemon))
        self.events: list[Any] = []
        daemon.graph.listeners.append(self._heard)

    def _heard(self, event: Event) -> None:
        self.events.append({"event": event.NAME, "data": msgspec.to_builtins(event)})

    async def ask(self, name: str, arguments: Arguments) -> Any:
        job = self.daemon.jobs.find("j")
        if name == "job-cancel":
            assert job is not None
            # A command of its own, elsewhere.
            job.cancel()
            return {"return": {}}
        if name == "job-finalize":
            assert job is not None
            await job.finalize()
            return {"return": {}}
        command = COMMANDS.get(name)
        assert command is not None
        try:
            return {"return": await command.run(self.monitor, command.decode(arguments))}
        except BlockError as error:
            return {"error": describe(error)}

    async def until(self, goal: Goal) -> list[Any]:
        async with asyncio.timeout(HANG_TIMEOUT_S):
            while not met(goal, self.events):
                await asyncio.sleep(0.001)
        heard, self.events = self.events, []
        return heard


def images(folder: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    folder.mkdir()
    for name in ("base", "b", "t", "t2"):
        qemu_img("create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", SIZE)
    qemu_img("create", "-q", "-f", "qcow2", folder / "small.qcow2", "2M")
    qemu_img("create", "-q", "-f", "raw", folder / "raw.raw", SIZE)
    qemu_img(
        "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "a.qcow2", cwd=folder
    )
    qemu_io("-c", "write -P 1 0 2M", folder / "base.qcow2")
    qemu_img("bitmap", "--add", "a.qcow2", "dirty", cwd=folder)
    qemu_io("-c", "write -P 2 1M 256k", "a.qcow2", cwd=folder)


def blockdev(name: str) -> Arguments:
    format = "raw" if name == "raw" else "qcow2"
    file = {"driver": "file", "filename": f"{name}.{format}"}
    return {"driver": format, "node-name": name, "file": file}


async def conversation(steps: list[Step]) -> tuple[list[Any], list[Any]]:
    """What our daemon answers to ``steps``, and the events of the jobs."""
    replies, events = [], []
    async with Daemon() as daemon:
        ours = Ours(daemon)
        for name in NODES:
            await nodes.add(daemon, blockdev(name))
        bitmaps.add(daemon.find("a"), "x")
        for position, (name, arguments) in enumerate(steps):
            replies.append(await ours.ask(name, arguments))
            if "return" in replies[-1]:
                events += await ours.until(goal_of(steps, position))
    return replies, events


def real_conversation(steps: list[Step]) -> tuple[list[Any], list[Any]]:
    """The same with the real daemon."""
    replies, events = [], []
    with contextlib.closing(Real()) as real:
        for name in NODES:
            assert real.ask("blockdev-add", blockdev(name)) == {"return": {}}
        real.ask("block-dirty-bitmap-add", {"node": "a", "name": "x"})
        for position, (name, arguments) in enumerate(steps):
            replies.append(real.ask(name, arguments))
            if "return" in replies[-1]:
                events += real.until(goal_of(steps, position))
        real.ask("quit", {})
        real.process.wait(HANG_TIMEOUT_S)
    return replies, events


def both(
    folder: Path, qemu_img: Oracle, qemu_io: Oracle, monkeypatch: pytest.MonkeyPatch,
    steps: list[Step],
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """The real one's conversation in one folder, and ours in another."""
    said = []
    for name in ("real", "ours"):
        images(folder / name, qemu_img, qemu_io)
        monkeypatch.chdir(folder / name)
        said.append(
            real_conversation(steps) if name == "real" else asyncio.run(conversation(steps))
        )
    return said


@pytest.mark.oracle("qemu-storage-daemon")
def test_refusals_are_those_of_the_real_one(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs, _), (ours, _) = both(tmp_path, qemu_img, qemu_io, monkeypatch, REFUSED)
    assert list(zip(REFUSED, ours, strict=True)) == list(zip(REFUSED, theirs, strict=True))


@pytest.mark.oracle("qemu-storage-daemon")
@pytest.mark.parametrize("number", range(len(DONE)))
def test_jobs_and_images_are_those_of_the_real_one(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    steps = DONE[number]
    theirs, ours = both(tmp_path, qemu_img, qemu_io, monkeypatch, steps)
    assert ours == theirs
    target = steps[0][1]["target"]
    target = target if "." in target else f"{target}.qcow2"
    infos = []
    for name in ("real", "ours"):
        monkeypatch.chdir(tmp_path / name)
        info = qemu_img.json("info", "--output=json", target)
        names = ("filename", "format", "backing-filename", "backing-filename-format")
        infos.append({key: info.get(key) for key in names})
        if target.endswith("qcow2"):
            qemu_img("check", target)
    assert infos[0] == infos[1]
    monkeypatch.chdir(tmp_path)
    qemu_img("compare", f"real/{target}", f"ours/{target}")


async def write(daemon: Daemon, name: str, offset: int, data: bytes) -> None:
    root = Root(daemon.find(name), "the guest", Permission.WRITE)
    await root.write(offset, data)
    await root.close()


async def content(daemon: Daemon, name: str) -> bytes:
    root = Root(daemon.find(name), "the test", Permission.CONSISTENT_READ)
    try:
        return await root.read(0, root.node.size)
    finally:
        await root.close()


async def disks(daemon: Daemon, folder: Path, *names: str) -> None:
    for name in names:
        path = folder / f"{name}.qcow2"
        await aio.create(path, 1 << 20)
        file = {"driver": "file", "filename": str(path)}
        await nodes.add(daemon, {"driver": "qcow2", "node-name": name, "file": file})


@pytest.mark.parametrize("mode", ["individual", "grouped"])
def test_a_transaction_makes_checkpoints_and_begins_backups(tmp_path: Path, mode: Any) -> None:
    """As a backup program does it: bitmaps made and merged at the moment of the backups."""

    async def scene() -> None:
        async with Daemon() as daemon:
            await disks(daemon, tmp_path, "a", "b", "ta", "tb")
            for name in ("a", "b"):
                bitmaps.add(daemon.find(name), "old")
                await write(daemon, name, 65536, b"x" * 65536)
            wanted: list[Any] = []
            for name in ("a", "b"):
                if mode == "individual":
                    wanted += [
                        ("block-dirty-bitmap-add", {"node": name, "name": "new"}),
                        (
                            "block-dirty-bitmap-add",
                            {"node": name, "name": "temp", "disabled": True},
                        ),
                        (
                            "block-dirty-bitmap-merge",
                            {"node": name, "target": "temp", "bitmaps": ["old"]},
                        ),
                    ]
                else:
                    # Only jobs can share their fate.
                    bitmaps.add(daemon.find(name), "temp", enabled=False).merge(
                        bitmaps.find(daemon.find(name), "old")
                    )
                arguments = {
                    "job-id": f"j{name}", "device": name, "target": f"t{name}",
                    "sync": "incremental", "bitmap": "temp",
                }  # fmt: skip
                wanted.append(("blockdev-backup", arguments))
            await transaction(daemon, wanted, completion_mode=mode)
            jobs = list(daemon.jobs)
            assert [job.id for job in jobs] == ["ja", "jb"]
            for job in jobs:
                await job.ended.wait()
                assert job.error is None
            for name in ("ta", "tb"):
                data = bytes(65536) + b"x" * 65536
                assert await content(daemon, name) == data.ljust(1 << 20, b"\0")

    asyncio.run(scene())


def test_one_failing_job_fails_its_group(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Daemon() as daemon:
            await disks(daemon, tmp_path, "a", "b", "ta", "tb")
            wanted: list[Any] = [
                (
                    "blockdev-backup",
                    {"job-id": name, "device": name, "target": f"t{name}", "sync": "none"},
                )
                for name in ("a", "b")
            ]
            await transaction(daemon, wanted, completion_mode="grouped")
            jobs = list(daemon.jobs)
            jobs[0].cancel()
            for job in jobs:
                await job.ended.wait()
                assert job.cancelled
            assert set(daemon.graph.nodes) >= {"a", "b", "ta", "tb"}
            assert all(node.busy is None for node in daemon.graph.nodes.values())

    asyncio.run(scene())


def test_a_failing_member_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scene() -> None:
        async with Daemon() as daemon:
            await disks(daemon, tmp_path, "a", "b", "ta", "tb")
            bitmap = bitmaps.add(daemon.find("a"), "x")
            guest = Root(daemon.find("a"), "the guest", Permission.WRITE)
            await guest.write(0, b"x" * 512)
            before = set(daemon.graph.nodes)
            overlay = str(tmp_path / "overlay.qcow2")
            new = str(tmp_path / "new.qcow2")
            wanted: list[Any] = [
                (
                    "blockdev-backup",
                    {
                        "job-id": "j", "device": "a", "target": "ta", "sync": "full",
                        "bitmap": "x", "bitmap-mode": "always",
                    },
                ),
                ("drive-backup", {"job-id": "k", "device": "b", "target": new, "sync": "full"}),
                (
                    "blockdev-snapshot-sync",
                    {"node-name": "b", "snapshot-file": overlay, "snapshot-node-name": "o"},
                ),
                ("abort", {}),
            ]  # fmt: skip
            with pytest.raises(UsageError, match="aborted using Abort"):
                await transaction(daemon, wanted)
            assert set(daemon.graph.nodes) == before
            assert not list(daemon.jobs)
            assert not bitmap.busy
            assert guest.node is daemon.find("a")
            assert bitmap.is_dirty(0)
            assert all(node.busy is None for node in daemon.graph.nodes.values())
            await guest.write(512, b"y" * 512)
            await guest.close()
            # And all of it can be done after that.
            await transaction(daemon, wanted[:-1])
            for job in list(daemon.jobs):
                await job.ended.wait()
                assert job.error is None
            assert Path(overlay).exists()

    asyncio.run(scene())
