"""Nodes at run time: scripts of commands, answered as the real storage daemon answers them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from blocklayer.daemon.daemon import Daemon
from oracles import Oracle
from qmp.conversation import real_daemon, run, serving, talk_in_turn

NAMES = "query-named-block-nodes"
SINCE_LATER = {"children"}
FOLDER = "THE-FOLDER"
"""Stands for where the images are: a daemon in the background has no folder of its own."""


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    given = {key.replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": given}


def add(name: str, driver: str, **options: Any) -> dict[str, Any]:
    return command("blockdev-add", driver=driver, node_name=name, **options)


def file(name: str) -> dict[str, Any]:
    return {"driver": "file", "filename": f"{FOLDER}/{name}"}


def reopen(*nodes: dict[str, Any]) -> dict[str, Any]:
    return command("blockdev-reopen", options=[each["arguments"] for each in nodes])


def remove(name: str) -> dict[str, Any]:
    return command("blockdev-del", node_name=name)


def resize(size: int, **which: str) -> dict[str, Any]:
    return command("block_resize", size=size, **which)


def activate(active: bool, **which: str) -> dict[str, Any]:
    return command("blockdev-set-active", active=active, **which)


def other_backing(device: str, image: str) -> dict[str, Any]:
    return command(
        "change-backing-file", device=device, image_node_name=image, backing_file="other.qcow2"
    )


def properties(verb: str, path: str, **more: Any) -> dict[str, Any]:
    return command(f"qom-{verb}", path=path, **more)


LIST = command(NAMES)
FLAT = command(NAMES, flat=True)
DISK0 = add("disk0", "qcow2", file=file("top.qcow2"))

SCRIPTS: dict[str, list[dict[str, Any]]] = {
    "adding": [
        DISK0, LIST, FLAT,
        add("r", "raw", file="disk0"), FLAT,
        add("r2", "raw", file="nope"), add("", "raw", file="disk0"),
        command("blockdev-add", driver="raw", file="disk0"), add("r", "raw", file="disk0"),
        add("1r", "raw", file="disk0"), add("r5", "raw", file=file("none/nope")),
        add("r6", "raw", file={"driver": "null-co", "node-name": "below"}),
        remove("disk0"), remove("below"), remove("nope"), remove("#block999"), remove("r"),
        remove("disk0"), remove("r6"), LIST,
    ],
    "sizes": [
        DISK0, add("n", "null-co", size=1 << 20), add("ro", "raw", read_only=True, file="n"),
        resize(20 << 20, node_name="disk0"), FLAT, resize((1 << 20) + 1, node_name="disk0"),
        resize(-1, node_name="disk0"), resize(100), resize(100, node_name="nope"),
        resize(100, device="nope"), resize(1000, device="disk0"),
        resize(1000, node_name="nope", device="nope"),
        command("block-set-write-threshold", node_name="nope", write_threshold=1),
        command("block-set-write-threshold", node_name="disk0", write_threshold=5), FLAT,
        command("block-set-write-threshold", node_name="disk0", write_threshold=0), FLAT,
    ],
    "backing files": [
        DISK0, add("alone", "qcow2", file=file("alone.qcow2")),
        other_backing("nope", "disk0"), other_backing("disk0", "nope"),
        other_backing("alone", "alone"), other_backing("disk0", "disk0"),
    ],
    "reopening": [
        DISK0, add("n", "null-co", size=16 << 20), add("m", "null-co", size=16 << 20),
        add("r", "raw", file="n"),
        reopen(DISK0),
        reopen(add("disk0", "qcow2", backing="n", file=file("top.qcow2"))), FLAT,
        reopen(add("disk0", "qcow2", backing=None, file=file("top.qcow2"))), FLAT,
        reopen(DISK0),
        reopen(add("disk0", "qcow2", backing={"driver": "null-co"}, file=file("top.qcow2"))),
        reopen(add("disk0", "qcow2", backing="disk0", file=file("top.qcow2"))),
        reopen(add("disk0", "qcow2", backing=None, file=file("other.qcow2"))),
        reopen(add("disk0", "qcow2", backing=None, read_only=True, file=file("top.qcow2"))), FLAT,
        reopen(add("disk0", "qcow2", backing=None, file=file("top.qcow2"))), FLAT,
        reopen(add("disk0", "qcow2", backing=None, discard="unmap", detect_zeroes="unmap",
                   cache={"direct": False, "no-flush": True}, file=file("top.qcow2"))), FLAT,
        reopen(add("disk0", "qcow2", backing=None, force_share=True, file=file("top.qcow2"))),
        reopen(add("n", "null-co", size=16 << 20)), reopen(add("n", "null-co", size=512)),
        reopen(add("n", "null-co")), reopen(add("n", "null-co", size=16 << 20, latency_ns=5)),
        reopen(add("r", "raw", file="m", size=512)), FLAT, reopen(add("r", "raw", file="r")),
        reopen(add("r", "raw", file="nope")), reopen(add("nope", "raw", file="m")),
        command("blockdev-reopen", options=[{"driver": "raw", "file": "n"}]),
        reopen(add("r", "qcow2", file="m")), reopen(add("r", "raw", file="m")),
        reopen(add("r", "raw", file="n", read_only=True), add("nope", "raw", file="n")), FLAT,
        reopen(add("r", "raw", file="n", read_only=True), add("m", "null-co", size=1)), FLAT,
    ],
    "handing over": [
        DISK0, activate(False, node_name="disk0"), FLAT,
        add("r", "raw", file="disk0"), add("ra", "raw", active=False, file="disk0"),
        activate(True, node_name="disk0"), FLAT, activate(True, node_name="ra"),
        activate(False, node_name="disk0"), FLAT, activate(False, node_name="ra"), FLAT,
        activate(True, node_name="ra"), FLAT, activate(False), FLAT,
        resize(2 << 20, node_name="disk0"), activate(True), FLAT,
        activate(True, node_name="nope"), resize(1 << 20, node_name="disk0"),
    ],
    "objects": [
        command("object-add", qom_type="secret", id="s0", data="abc"),
        command("object-add", qom_type="secret", id="s0", data="abc"),
        command("object-add", qom_type="nope", id="s1", data="abc"),
        command("object-add", qom_type="secret", id="0s", data="abc"),
        command("object-add", qom_type="secret", id="s1"),
        command("object-del", id="nope"),
        properties("list", "/objects"), properties("list", "objects"),
        properties("list", "/objects/nope"), properties("get", "/objects/s0", property="type"),
        properties("get", "/objects/s0", property="nope"),
        properties("get", "/objects/nope", property="nope"),
        properties("get", "/objects", property="s0"),
        properties("set", "/objects/s0", property="nope", value=1),
        command("qom-list-properties", typename="nope"),
        command("object-del", id="s0"), command("object-del", id="s0"),
    ],
}  # fmt: skip


@pytest.fixture
def images(tmp_path: Path, qemu_img: Oracle, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    folders = [tmp_path / "real", tmp_path / "ours"]
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name in ("base", "alone"):
            qemu_img("create", "-q", "-f", "qcow2", f"{name}.qcow2", "16M")
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    return folders


def placed(script: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(json.dumps(script).replace(FOLDER, str(folder))))


def ours(folder: Path, script: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def main() -> list[dict[str, Any]]:
        async with Daemon() as daemon, serving(folder / "q", daemon=daemon):
            return await asyncio.to_thread(talk_in_turn, folder / "q", placed(script, folder))

    return run(main())


def comparable(reply: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Without what may differ: names of unnamed nodes, order, host space, newer members."""
    reply = json.loads(json.dumps(reply).replace(str(folder), FOLDER))
    result = reply.get("return")
    if isinstance(result, list) and all("node-name" in each for each in result):
        return {"return": sorted(map(_node, result), key=_text)}
    if isinstance(result, list) and all("type" in each for each in result):
        return {"return": sorted(result, key=_text)}
    return reply


def _node(info: dict[str, Any]) -> dict[str, Any]:
    info = {name: value for name, value in info.items() if name not in SINCE_LATER}
    if info["node-name"].startswith("#"):
        info["node-name"] = "#"
    image = info["image"]
    while image:
        image.pop("actual-size", None)
        # The options of json: names come in any order.
        image["filename"] = _name(image["filename"])
        image = image.get("backing-image")
    for name in ("file", "backing_file"):
        if name in info:
            info[name] = _name(info[name])
    return info


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _name(text: str) -> Any:
    """An image's name. Another backing file than the image's own is no part of ours."""
    if not text.startswith("json:"):
        return text
    options = json.loads(text[5:])
    if not options.get("offset"):
        options.pop("offset", None)
    if "backing" in options:
        return options["file"]["filename"]
    return options


@pytest.mark.oracle("qemu-img", "qemu-storage-daemon")
@pytest.mark.parametrize("name", SCRIPTS)
def test_replies(images: list[Path], name: str) -> None:
    """Same results; where both refuse, the same class, and what it says first."""
    script = [{"execute": "qmp_capabilities"}, *SCRIPTS[name]]
    with real_daemon(images[0] / "q"):
        theirs = talk_in_turn(images[0] / "q", placed(script, images[0]))
    for message, real, own in zip(script, theirs[1:], ours(images[1], script)[1:], strict=True):
        real, own = comparable(real, images[0]), comparable(own, images[1])
        if "error" in real and "error" in own:
            assert own["error"]["class"] == real["error"]["class"]
            assert own["error"]["desc"].startswith(real["error"]["desc"]), message
        else:
            assert own == real, message


@pytest.mark.oracle("qemu-img")
@pytest.mark.parametrize("name", SCRIPTS)
def test_images_stay_valid(images: list[Path], name: str, qemu_img: Oracle) -> None:
    ours(images[1], [{"execute": "qmp_capabilities"}, *SCRIPTS[name]])
    for image in images[1].glob("*.qcow2"):
        if name != "backing files":
            qemu_img("check", image)
