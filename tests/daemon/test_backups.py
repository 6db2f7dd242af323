"""blockdev-backup and drive-backup beside the real storage daemon: replies, events, images."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import BlockError
from blocklayer.graph import bitmaps
from blocklayer.graph.events import Event
from blocklayer.qmp.commands import COMMANDS
from blocklayer.qmp.errors import describe
from oracles import HANG_TIMEOUT_S, Oracle
from qmp.conversation import real_daemon

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


class Real:
    """The real daemon; the job's events are read until it is over."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_TIMEOUT_S)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rwb")
        self.file.readline()
        self.events: list[Any] = []
        self.ask("qmp_capabilities", {})

    def ask(self, name: str, arguments: Arguments) -> Any:
        message = {"execute": name, "arguments": arguments}
        self.file.write(json.dumps(message).encode())
        self.file.flush()
        while "event" in (reply := json.loads(self.file.readline())):
            self._heard(reply)
        return reply

    def _heard(self, reply: Any) -> None:
        self.events.append({"event": reply["event"], "data": reply["data"]})

    def until(self, *statuses: str) -> list[Any]:
        """The events so far, once the job has one of ``statuses``."""
        while not any(event["data"].get("status") in statuses for event in self.events):
            self._heard(json.loads(self.file.readline()))
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

    async def until(self, *statuses: str) -> list[Any]:
        async with asyncio.timeout(HANG_TIMEOUT_S):
            while not any(event["data"].get("status") in statuses for event in self.events):
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


async def conversation(steps: list[Step], statuses: tuple[str, ...]) -> list[Any]:
    """The replies to ``steps`` in our daemon, and the events after each that has a job."""
    said: list[Any] = []
    async with Daemon() as daemon:
        ours = Ours(daemon)
        for name in NODES:
            await nodes.add(daemon, blockdev(name))
        bitmaps.add(daemon.find("a"), "x")
        for position, (name, arguments) in enumerate(steps):
            said.append(await ours.ask(name, arguments))
            if "error" in said[-1]:
                continue
            last = position + 1 == len(steps) or steps[position + 1][0].endswith("backup")
            said.append(await ours.until(*(("null", "concluded") if last else statuses)))
    return said


def real_conversation(path: Path, steps: list[Step], statuses: tuple[str, ...]) -> list[Any]:
    said: list[Any] = []
    with real_daemon(path):
        real = Real(path)
        for name in NODES:
            assert real.ask("blockdev-add", blockdev(name)) == {"return": {}}
        real.ask("block-dirty-bitmap-add", {"node": "a", "name": "x"})
        for position, (name, arguments) in enumerate(steps):
            said.append(real.ask(name, arguments))
            if "error" in said[-1]:
                continue
            last = position + 1 == len(steps) or steps[position + 1][0].endswith("backup")
            said.append(real.until(*(("null", "concluded") if last else statuses)))
    return said


@pytest.mark.oracle("qemu-storage-daemon")
def test_refusals_are_those_of_the_real_one(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = []
    for name in ("real", "ours"):
        images(tmp_path / name, qemu_img, qemu_io)
        monkeypatch.chdir(tmp_path / name)
        if name == "real":
            replies.append(real_conversation(tmp_path / "q.sock", REFUSED, ()))
        else:
            replies.append(asyncio.run(conversation(REFUSED, ())))
    for step, theirs, ours in zip(REFUSED, *replies, strict=True):
        # Beside the job that is refused, the real one makes and drops it.
        assert ours == theirs, step


@pytest.mark.oracle("qemu-storage-daemon")
@pytest.mark.parametrize("steps", DONE, ids=lambda steps: f"{steps[0][0]}-{len(steps[0][1])}")
def test_jobs_and_images_are_those_of_the_real_one(
    tmp_path: Path,
    qemu_img: Oracle,
    qemu_io: Oracle,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[Step],
) -> None:
    second = steps[-1][0]
    statuses = ("pending",) if second == "job-finalize" else ("running",)
    said = []
    for name in ("real", "ours"):
        images(tmp_path / name, qemu_img, qemu_io)
        monkeypatch.chdir(tmp_path / name)
        if name == "real":
            said.append(real_conversation(tmp_path / "q.sock", steps, statuses))
        else:
            said.append(asyncio.run(conversation(steps, statuses)))
    theirs, ours = ([_masked(part) for part in one] for one in said)
    assert sum(ours, []) == sum(theirs, [])
    target = steps[0][1]["target"]
    target = target if "." in target else f"{target}.qcow2"
    infos = []
    for name in ("real", "ours"):
        monkeypatch.chdir(tmp_path / name)
        info = qemu_img.json("info", "--output=json", target)
        infos.append(
            {key: value for key, value in info.items() if key.endswith(("name", "format"))}
        )
        if "backing-filename" not in info:
            qemu_img("compare", "a.qcow2" if "none" not in str(steps) else target, target)
        if target.endswith("qcow2"):
            qemu_img("check", target)
    assert infos[0] == infos[1]


def _masked(part: Any) -> list[Any]:
    return [part] if isinstance(part, dict) else list(part)
