"""Stream, commit, mirrors, create, amend and job control: scripts, with the real daemon beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from oracles import Oracle
from qmp.conversation import NEGOTIATE, Peer, real_daemon, run, serving

pytestmark = pytest.mark.oracle("qemu-img", "qemu-io", "qemu-storage-daemon")

SIZE = "1M"
CHAIN = ("base", "low", "middle", "top")
ANY_NUMBER = ("len", "offset", "current-progress", "total-progress")
PATIENCE = 50


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": given}


def until(status: str, job: str = "j") -> dict[str, Any]:
    """Wait for a job's status."""
    return {"until": status, "job": job}


def stream(job_id: str | None = "j", device: str = "top", **more: Any) -> dict[str, Any]:
    given = {} if job_id is None else {"job_id": job_id}
    return command("block-stream", device=device, **given, **more)


def commit(job_id: str | None = "j", device: str = "top", **more: Any) -> dict[str, Any]:
    given = {} if job_id is None else {"job_id": job_id}
    return command("block-commit", device=device, **given, **more)


def mirror(target: str = "target", sync: str = "full", **more: Any) -> dict[str, Any]:
    given = {"job_id": "j", "device": "top", **more}
    return command("blockdev-mirror", target=target, sync=sync, **given)


def drive(target: str = "new.qcow2", sync: str = "full", **more: Any) -> dict[str, Any]:
    given = {"job_id": "j", "device": "top", **more}
    return command("drive-mirror", target=target, sync=sync, **given)


def verb(name: str, job: str = "j", **more: Any) -> dict[str, Any]:
    by_device = name.startswith("block-job") and name.rpartition("-")[2] in (
        "pause", "resume", "complete", "cancel", "speed",
    )  # fmt: skip
    return command(name, **{"device" if by_device else "id": job}, **more)


def create(**options: Any) -> dict[str, Any]:
    return command(
        "blockdev-create", job_id="j",
        options={key.replace("_", "-"): value for key, value in options.items()},
    )  # fmt: skip


LOOK = [{"execute": "query-jobs"}, {"execute": "query-block-jobs"}]
BY_HAND = {"auto_finalize": False, "auto_dismiss": False}
VERBS = ("job-pause", "job-resume", "job-complete", "job-finalize", "job-dismiss")

SCRIPTS: dict[str, list[dict[str, Any]]] = {
    "stream, bad arguments": [
        stream(None), stream(device="nope"), stream("1j"), stream(base="x", base_node="y"),
        stream(base="x", bottom="y"), stream(base_node="x", bottom="y"), stream(base="x"),
        stream(base_node="x"), stream(base_node="top"), stream(base_node="target"),
        stream(bottom="x"), stream(bottom="basef"), stream(on_error="bad"),
        stream(backing_file="x"),
        stream(base_node=1), stream(nope=1), stream(device="low", base_node="middle"), *LOOK,
    ],
    "stream": [
        stream(base_node="base", **BY_HAND), until("pending"), *LOOK,
        *(verb(name) for name in VERBS if name != "job-finalize"),
        verb("block-job-set-speed", speed=0), stream("k"), commit("k"), verb("job-finalize"),
        until("concluded"), *LOOK, *(verb(name) for name in VERBS if name != "job-dismiss"),
        verb("job-cancel"), verb("block-job-cancel"), verb("block-job-dismiss"),
        until("null"), *LOOK, stream(), until("null"), stream(), until("null"),
    ],
    "stream by file, into the middle": [
        stream(device="middle", base="base.qcow2", backing_file="other.qcow2"), until("null"),
        stream(bottom="middle", backing_mask_protocol=True), until("null"),
    ],
    "control of a job at work": [
        stream(speed=1, **BY_HAND), verb("job-complete"), verb("job-resume"), verb("job-pause"),
        until("paused"), verb("job-pause"), verb("block-job-cancel"), verb("job-resume"),
        verb("block-job-pause"), until("paused"), verb("block-job-resume"),
        verb("block-job-set-speed", speed=-1), stream("k"), stream("k", device="low"),
        command("block-job-change", id="j", type="mirror", copy_mode="write-blocking"),
        command("block-job-change", id="j", type="stream"),
        command("block-job-change", id="j", type="mirror"),
        command("block-job-change", id="j", type="nope"),
        verb("job-cancel"), until("concluded"), *LOOK, verb("job-dismiss"), *LOOK,
    ],
    "no such job": [
        *(verb(name) for name in (*VERBS, "job-cancel")),
        *(verb(f"block-{name}") for name in (*VERBS, "job-cancel")),
        verb("block-job-set-speed", speed=1),
        command("block-job-change", id="j", type="mirror", copy_mode="background"),
    ],
    "commit, bad arguments": [
        commit(None), commit(device="nope"), commit(top="a", top_node="b"),
        commit(base="a", base_node="b"), commit(top="a"), commit(top_node="a"),
        commit(top_node="basef"), commit(base="a"), commit(base_node="a"),
        commit(base_node="basef"),
        commit(base_node="top"), commit(base_node="middle", top_node="middle"),
        commit(base_node="middle", top_node="low"), commit(device="low"),
        commit(backing_file="x"), commit(top_node="base"), commit(device="target"), commit("1j"),
        commit("1j", top_node="low"),
        commit(filter_node_name="top"), commit(filter_node_name="1x"), *LOOK,
    ],
    "commit of layers": [
        commit(top_node="low", auto_dismiss=False, backing_file="other.qcow2"), until("concluded"),
        *LOOK, verb("job-dismiss"), until("null"), commit(top_node="middle", base="base.qcow2"),
        until("null"),
    ],
    "commit of the active layer": [
        commit(), until("ready"), *LOOK, commit("k"), stream("k"), verb("job-pause"),
        verb("job-complete"), verb("job-resume"), until("null"), *LOOK,
    ],
    "commit, given up": [
        commit(base_node="middle"), until("ready"),
        command("block-job-change", id="j", type="mirror", copy_mode="write-blocking"),
        verb("block-job-cancel"), until("null"),
        commit(top_node="middle", speed=1), verb("job-cancel"), until("null"), *LOOK,
    ],
    "mirror, bad arguments": [
        mirror(job_id=""), mirror(device="nope"), mirror("nope"), mirror("top"), mirror("low"),
        mirror(sync="incremental"), mirror(sync="bitmap"), mirror(sync="nope"),
        mirror(granularity=100), mirror(granularity=1000), mirror(granularity=1 << 27),
        mirror(granularity=-1), mirror(buf_size=-1), mirror(replaces="nope"),
        mirror(replaces="middle"), mirror(replaces="small"), mirror(filter_node_name="1x"),
        mirror(filter_node_name="target"), mirror(device="low"), *LOOK,
    ],
    "mirror": [
        mirror(), until("ready"), *LOOK, command("block-job-change", id="j", type="commit"),
        command("block-job-change", id="j", type="mirror", copy_mode="background"),
        command("block-job-change", id="j", type="mirror", copy_mode="write-blocking"),
        command("block-job-change", id="j", type="mirror", copy_mode="write-blocking"),
        command("block-job-change", id="j", type="mirror", copy_mode="background"),
        verb("job-pause"), verb("job-complete"), verb("job-complete"), verb("job-resume"),
        until("null"), *LOOK, mirror(sync="top"), until("ready"), verb("block-job-cancel"),
        until("null"), mirror(sync="none"), until("ready"), verb("job-cancel"), until("null"),
    ],
    "mirror to files": [
        drive(device="nope"), drive(device="low"), drive(sync="none", format="raw"),
        drive(mode="existing", target="none.qcow2"), drive(format="nope"), drive("nope/x.qcow2"),
        drive(replaces="top"), drive(replaces="nope", node_name="x"), drive(node_name="top"),
        drive(sync="incremental"), drive(unmap=False), until("ready"), verb("block-job-cancel"),
        until("null"), drive("top2.qcow2", "top", node_name="x"), until("ready"),
        verb("block-job-cancel"), until("null"), drive("none.qcow2", "none"), until("ready"),
        verb("block-job-cancel"), until("null"), drive("full.raw", format="raw"), until("ready"),
        verb("block-job-cancel"), until("null"),
        drive("top2.qcow2", "top", mode="existing"), until("ready"), verb("block-job-cancel"),
        until("null"),
    ],
    "create": [
        create(driver="nope"), create(driver="null-co"), create(driver="qcow2", size=0),
        create(driver="file", filename="n.img", size=65536, nope=1),
        create(driver="file", filename="n.img"), create(driver="file", filename="n.img", size="x"),
        create(driver="file", filename="n.img", size=65536), until("concluded"), *LOOK,
        verb("block-job-dismiss"), verb("block-job-cancel"),
        create(driver="file", filename="n.img", size=65536), verb("job-dismiss"),
        create(driver="file", filename="nope/n.img", size=65536), until("concluded"), *LOOK,
        verb("job-dismiss"), create(driver="qcow2", file="nope", size=65536), until("concluded"),
        *LOOK, verb("job-dismiss"),
        command("blockdev-add", driver="file", node_name="n", filename="n.img"),
        create(driver="qcow2", file="n", size=65537), until("concluded"), *LOOK,
        verb("job-dismiss"), create(driver="qcow2", file="n", size=65536, cluster_size=1000),
        until("concluded"), *LOOK, verb("job-dismiss"),
        create(
            driver="qcow2", file="n", size=65536, version="v3", cluster_size=4096,
            preallocation="off", lazy_refcounts=True, refcount_bits=8, compression_type="zstd",
        ),
        until("concluded"), *LOOK, verb("job-dismiss"),
        create(driver="qcow2", file="n", size=65536, version="1.1"),
    ],
    "amend": [
        command("x-blockdev-amend", job_id="j", node_name="nope", options={"driver": "qcow2"}),
        command("x-blockdev-amend", job_id="j", node_name="basef", options={"driver": "qcow2"}),
        command("x-blockdev-amend", job_id="j", node_name="top", options={"driver": "qcow2"}),
        until("concluded"), *LOOK, verb("job-dismiss"),
    ],
}  # fmt: skip


def make_images(folder: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    folder.mkdir()
    below: tuple[str, ...] = ()
    for number, name in enumerate(CHAIN):
        path = folder / f"{name}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", *below, path, SIZE)
        qemu_io("-c", f"write -P {number} {number * 128}k 256k", path)
        below = ("-b", f"{name}.qcow2", "-F", "qcow2")
    for name, size in (("target", SIZE), ("small", "512k"), ("other", SIZE)):
        qemu_img("create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", size)


def definitions(folder: Path) -> Iterator[dict[str, Any]]:
    below: str | None = None
    for name in (*CHAIN, "target", "small"):
        file = {"driver": "file", "filename": str(folder / f"{name}.qcow2")}
        if name == "base":
            file["node-name"] = "basef"
        in_chain = name in CHAIN
        yield {
            "driver": "qcow2", "node-name": name, "file": file, "read-only": name in CHAIN[:-1],
            "backing": below if in_chain else None,
        }  # fmt: skip
        below = name


def placed(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``message`` with its files in ``folder``."""
    given = json.loads(json.dumps(message))
    arguments = given.get("arguments", {})
    for place in (arguments, arguments.get("options", {})):
        for name in ("target", "base", "top", "filename"):
            value = place.get(name)
            if isinstance(value, str) and "." in value:
                place[name] = f"{folder}/{value}"
    return dict(given)


class Talk:
    """The replies and the events of one conversation, apart."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.peer = peer
        self.folder = folder
        self.replies: list[dict[str, Any]] = []
        self.events: list[tuple[Any, ...]] = []
        self._waited = 0

    async def _next(self) -> dict[str, Any] | None:
        message = json.loads(json.dumps(await self.peer.read()).replace(str(self.folder), "FOLDER"))
        if "event" not in message:
            return dict(message)
        data = message["data"]
        told = [data[key] for key in ("id", "device", "status", "type", "error") if key in data]
        self.events.append((message["event"], *told))
        return None

    async def ask(self, message: dict[str, Any]) -> None:
        self.peer.writer.write(json.dumps(message).encode() + b"\n")
        while (reply := await self._next()) is None:
            pass
        self.replies.append(reply)

    async def until(self, status: str, job: str) -> None:
        """Read on until the event has come, which may have been before."""
        wanted = ("JOB_STATUS_CHANGE", job, status)
        while wanted not in self.events[self._waited :]:
            assert await self._next() is None
        self._waited = self.events.index(wanted, self._waited) + 1


async def converse(path: Path, folder: Path, script: Sequence[dict[str, Any]]) -> Talk:
    peer = await Peer.connect(path)
    await peer.read()
    talk = Talk(peer, folder)
    await talk.ask(NEGOTIATE)
    for message in script:
        if "until" in message:
            await talk.until(message["until"], message["job"])
        else:
            await talk.ask(placed(message, folder))
    await peer.close()
    return talk


def real(folder: Path, script: Sequence[dict[str, Any]]) -> Talk:
    setup = [command("blockdev-add", **each) for each in definitions(folder)]
    with real_daemon(folder / "m"):
        run(converse(folder / "m", folder, setup))
        return run(converse(folder / "m", folder, script))


def ours(folder: Path, script: Sequence[dict[str, Any]]) -> Talk:
    async def main() -> Talk:
        async with Daemon() as daemon:
            for each in definitions(folder):
                await nodes.add(daemon, each)
            async with serving(folder / "m", daemon=daemon):
                return await converse(folder / "m", folder, script)

    return run(main())


def masked(reply: dict[str, Any]) -> dict[str, Any]:
    """Progress in numbers, and whether a job is waiting just now, are everybody's own."""
    for job in reply["return"] if isinstance(reply.get("return"), list) else ():
        for name in (*ANY_NUMBER, "busy"):
            if name in job:
                job[name] = "masked"
    return reply


@pytest.mark.parametrize("script", SCRIPTS)
def test_replies_and_events(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, script: str) -> None:
    """What the real one says, we say; where it says more after that, its beginning."""
    messages = SCRIPTS[script]
    make_images(tmp_path / "real", qemu_img, qemu_io)
    make_images(tmp_path / "ours", qemu_img, qemu_io)
    theirs, mine = real(tmp_path / "real", messages), ours(tmp_path / "ours", messages)
    asked = [NEGOTIATE, *(message for message in messages if "until" not in message)]
    for message, one, other in zip(asked, theirs.replies, mine.replies, strict=True):
        if "error" in one and "error" in other:
            assert other["error"]["class"] == one["error"]["class"], message
            assert other["error"]["desc"].startswith(one["error"]["desc"]), message
        else:
            assert masked(other) == masked(one), message
    assert mine.events == theirs.events
    for image in sorted((tmp_path / "ours").glob("*.qcow2")):
        qemu_img("check", image)
        shown = [
            qemu_img.json("info", "--output=json", folder / image.name)
            for folder in (tmp_path / "ours", tmp_path / "real")
        ]
        mine_said, they_said = (each.get("backing-filename") for each in shown)
        # The real one describes a graph that no file name stands for.
        if they_said is None or not they_said.startswith("json:"):
            said = they_said and they_said.replace(str(tmp_path / "real"), str(tmp_path / "ours"))
            assert mine_said == said, image
