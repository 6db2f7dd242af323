"""Snapshots, transactions and bitmaps: scripts of commands, with the real storage daemon beside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from oracles import Oracle
from qmp.conversation import Peer, real_daemon, run, serving, talk_in_turn

pytestmark = pytest.mark.oracle("qemu-img", "qemu-storage-daemon")

MIB = 1 << 20


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": given}


def sync(node: str, file: str, name: str, **more: Any) -> dict[str, Any]:
    return command(
        "blockdev-snapshot-sync",
        node_name=node,
        snapshot_file=file,
        snapshot_node_name=name,
        **more,
    )


def bitmap(verb: str, node: str, name: str, **more: Any) -> dict[str, Any]:
    return command(f"block-dirty-bitmap-{verb}", node=node, name=name, **more)


def together(*members: dict[str, Any], **more: Any) -> dict[str, Any]:
    actions = [
        {"type": member["execute"], "data": member.get("arguments", {})} for member in members
    ]
    return command("transaction", actions=actions, **more)


ABORT = {"execute": "abort"}


def internal(device: str, name: str) -> dict[str, Any]:
    return command("blockdev-snapshot-internal-sync", device=device, name=name)


def delete(device: str, **which: str) -> dict[str, Any]:
    return command("blockdev-snapshot-delete-internal-sync", device=device, **which)


def external(node: str, overlay: str) -> dict[str, Any]:
    return command("blockdev-snapshot", node=node, overlay=overlay)


def merge(*bitmaps: Any, node: str = "d0", target: str = "g") -> dict[str, Any]:
    return command("block-dirty-bitmap-merge", node=node, target=target, bitmaps=list(bitmaps))


SCRIPTS = {
    "snapshots": [
        external("nope", "ov"), external("d0", "nope"), external("d0", "r"),
        external("d0", "d0"), external("d0", "used"), external("d0", "ov"),
        external("d0", "ov"), external("d0", "d1"), external("ov", "big"), external("big", "d1"),
    ],
    "snapshots to files": [
        command("blockdev-snapshot-sync", snapshot_file="s1.qcow2"),
        command("blockdev-snapshot-sync", device="d1", snapshot_file="s1.qcow2"),
        command("blockdev-snapshot-sync", node_name="d1", snapshot_file="s1.qcow2"),
        sync("nope", "s1.qcow2", "s1"),
        sync("d1", "s1.qcow2", "d0"),
        sync("d1", "s1.qcow2", "s1", format="nope"),
        sync("d1", "s1.qcow2", "s1", format="raw"),
        sync("d1", "s1.qcow2", "s1", mode="bad"),
        sync("d1", "nope/s1.qcow2", "s1"),
        sync("d1", "nope.qcow2", "s1", mode="existing"),
        sync("d1", "s1.qcow2", "s1"),
        sync("d1", "s2.qcow2", "s2"),
        sync("s1", "s2.qcow2", "s2"),
        sync("s2", "s1.qcow2", "s3"),
        sync("s2", "c.qcow2", "s3", mode="existing"),
        sync("d0", "s4.qcow2", "s4"),
        sync("ro", "s5.qcow2", "s5"),
    ],
    "internal snapshots": [
        internal("d0", "i1"), internal("d0", "i1"), internal("d0", ""), internal("nope", "x"),
        internal("r", "x"), internal("ro", "x"), internal("d1", "i1"),
        delete("d0", name="nope"), delete("d0", id="1", name="nope"), delete("d0"),
        delete("nope", name="x"), delete("r", name="x"), delete("ro", name="x"),
        delete("d0", name="i1", id="1"), delete("d0", name="i1"), delete("d1", id="1"),
        together(internal("d0", "i1"), ABORT), internal("d0", "i1"),
        together(internal("d0", "i1")), sync("d0", "s0.qcow2", "s0"), internal("d0", "i2"),
    ],
    "bitmaps": [
        bitmap("add", "nope", "b"), bitmap("add", "d0", ""), bitmap("add", "d0", "b"),
        bitmap("add", "d0", "b"), bitmap("add", "d0", "g", granularity=1000),
        bitmap("add", "d0", "g", granularity=256), bitmap("add", "d0", "g", granularity=0),
        bitmap("add", "d0", "g", granularity=4096, disabled=True),
        bitmap("add", "d0", "q", disabled="x"), bitmap("add", "d0", "p", persistent=True),
        bitmap("add", "ro", "q"), bitmap("add", "big", "big"), bitmap("add", "d0", "n" * 1024),
        *(
            bitmap(verb, node, "nope")
            for verb in ("remove", "clear", "enable", "disable") for node in ("d0", "nope")
        ),
        bitmap("clear", "d0", "b"), bitmap("disable", "d0", "b"), bitmap("enable", "d0", "b"),
        merge("b", target="nope"), merge("nope"), merge({"node": "nope", "name": "b"}),
        merge({"node": "big", "name": "nope"}), merge({"node": "big", "name": "big"}),
        merge("b", {"node": "d0", "name": "b"}), merge("g"), merge({"node": "d0"}),
        command("x-debug-block-dirty-bitmap-sha256", node="d0", name="g"),
        command("x-debug-block-dirty-bitmap-sha256", node="d0", name="nope"),
        bitmap("remove", "d0", "b"), bitmap("remove", "d0", "p"), bitmap("remove", "d0", "b"),
    ],
    "transactions": [
        command("transaction", actions=[]),
        command("transaction", actions=[{"type": "nope", "data": {}}]),
        command("transaction", actions=[{"type": "abort"}]),
        command("transaction", actions=[{"type": "block-dirty-bitmap-add", "data": {"name": "q"}}]),
        together(bitmap("add", "d0", "t"), ABORT),
        bitmap("clear", "d0", "t"),
        together(bitmap("add", "d0", "t"), bitmap("clear", "d0", "t"), bitmap("remove", "d0", "t")),
        bitmap("clear", "d0", "t"),
        bitmap("add", "d0", "t", persistent=True),
        together(bitmap("remove", "d0", "t"), bitmap("clear", "d0", "t")),
        together(bitmap("remove", "d0", "t"), bitmap("add", "d0", "t")),
        together(bitmap("remove", "d0", "t"), ABORT),
        bitmap("clear", "d0", "t"),
        together(bitmap("add", "d0", "u"), merge("t", target="u"), bitmap("disable", "d0", "u")),
        together(bitmap("enable", "d0", "u"), merge("t", target="u"), ABORT),
        command("x-debug-block-dirty-bitmap-sha256", node="d0", name="u"),
        *(
            together(member, properties={"completion-mode": "grouped"})
            for member in (
                ABORT, bitmap("add", "d0", "x"), external("d0", "ov"), internal("d0", "x"),
                sync("d0", "x.qcow2", "x"),
            )
        ),
        together(sync("d0", "t.qcow2", "s0"), internal("d0", "x"), ABORT),
        together(sync("d0", "c.qcow2", "x", mode="existing"), sync("d0", "e.qcow2", "y")),
        together(external("d0", "nope"), bitmap("remove", "d0", "nope")),
        together(
            sync("d0", "t.qcow2", "s0"), bitmap("add", "s0", "t"), sync("d1", "t1.qcow2", "s1")
        ),
        bitmap("clear", "s0", "t"), bitmap("clear", "d0", "t"), bitmap("remove", "d0", "t"),
        bitmap("disable", "d0", "u"),
    ],
}  # fmt: skip

IMAGES = {"d0": "a", "d1": "b", "ov": "o", "ro": "c", "big": "big", "used": "used"}


def make_images(folder: Path, qemu_img: Oracle) -> None:
    folder.mkdir()
    for name in (*IMAGES.values(), "e"):
        size = "2M" if name == "big" else "1M"
        qemu_img("create", "-q", "-f", "qcow2", folder / f"{name}.qcow2", size)
    qemu_img("create", "-q", "-f", "raw", folder / "r.raw", "1M")


def definitions(folder: Path) -> Iterator[dict[str, Any]]:
    """The nodes; `used`, `d0` and `d1` have users."""
    for name, image in IMAGES.items():
        options: dict[str, Any] = {"backing": None} if name in ("ov", "big", "used") else {}
        if name == "ro":
            options["read-only"] = True
        file = {"driver": "file", "filename": str(folder / f"{image}.qcow2")}
        yield {"driver": "qcow2", "node-name": name, "file": file, **options}
    file = {"driver": "file", "filename": str(folder / "r.raw")}
    yield {"driver": "raw", "node-name": "r", "file": file}


USERS = ("d0", "d1", "used")


def placed(messages: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """`messages` with files in `folder`."""
    text = re.sub(r'("snapshot-file": ")', rf"\1{folder}/", json.dumps(messages))
    return list(json.loads(text))


def masked(reply: dict[str, Any], folder: Path) -> dict[str, Any]:
    text = json.dumps(reply).replace(str(folder), "FOLDER")
    text = re.sub(r'("(?:date|vm-clock)-n?sec": )\d+', r"\1 0", text)
    return dict(json.loads(text))


def real_replies(folder: Path, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with real_daemon(folder / "m"):
        setup = [{"execute": "qmp_capabilities"}]
        setup += [command("blockdev-add", **each) for each in definitions(folder)]
        for name in USERS:
            address = {"type": "unix", "path": str(folder / f"{name}.sock")}
            setup.append(command(
                "block-export-add", id=name, node_name=name, type="vhost-user-blk", addr=address,
                writable=True,
            ))  # fmt: skip
        replies = talk_in_turn(folder / "m", setup + placed(messages, folder))[1:]
        assert all("return" in reply for reply in replies[: len(setup)])
        return [masked(reply, folder) for reply in replies[len(setup) :]]


@asynccontextmanager
async def our_daemon(folder: Path) -> Any:
    async with Daemon() as daemon:
        for each in definitions(folder):
            await nodes.add(daemon, each)
        roots = [
            Root(
                daemon.find(name), f"user of {name}", Permission.CONSISTENT_READ | Permission.WRITE
            )
            for name in USERS
        ]
        yield daemon
        for root in roots:
            await root.close()


def our_replies(folder: Path, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        async with our_daemon(folder) as daemon, serving(folder / "m", daemon=daemon):
            peer = await (await Peer.connect(folder / "m")).greeted()
            replies = [await peer.ask(message) for message in placed(messages, folder)]
            await peer.close()
        return [masked(reply, folder) for reply in replies]

    return run(main())


@pytest.mark.parametrize("script", SCRIPTS)
def test_replies(tmp_path: Path, qemu_img: Oracle, script: str) -> None:
    """What the real one says, we say; where it says more after that, its beginning."""
    messages = SCRIPTS[script]
    make_images(tmp_path / "real", qemu_img)
    make_images(tmp_path / "ours", qemu_img)
    real = real_replies(tmp_path / "real", messages)
    ours = our_replies(tmp_path / "ours", messages)
    for message, theirs, mine in zip(messages, real, ours, strict=True):
        if "error" in theirs and "error" in mine:
            assert mine["error"]["class"] == theirs["error"]["class"]
            assert mine["error"]["desc"].startswith(theirs["error"]["desc"]), message
            continue
        if "icount" not in theirs["return"]:
            mine["return"].pop("icount", None)
        assert mine == theirs, message
    for image in (tmp_path / "ours").glob("*.qcow2"):
        qemu_img("check", image)
