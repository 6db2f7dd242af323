"""Key slots: their life beside the real tool's words, and through power failures and errors."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from blocklayer.api.disk import Disk
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.create import create_image
from blocklayer.graph.graph import Graph
from blocklayer.testing.crashing import CrashingDisk, registry
from cli.runs import ours, theirs
from crypto.volumes import FAST, MIB, OBJECTS, SECRETS, create, create_qcow2, luks, open_disk, qcow2
from oracles import Oracle

REFUSED = [
    "state=active",
    "new-secret=two",
    "state=active,new-secret=two,keyslot=0",
    "state=active,new-secret=two,keyslot=9",
    "state=active,new-secret=nope,keyslot=3",
    "state=active,new-secret=two,old-secret=one",
    "state=inactive",
    "state=inactive,keyslot=12",
    "state=inactive,old-secret=one,keyslot=5",
    "state=inactive,new-secret=two",
    "state=inactive,iter-time=10,old-secret=two",
    "state=inactive,old-secret=two",
    "state=inactive,old-secret=one",
    "state=inactive,keyslot=0",
    "state=foo",
    "key-secret=two",
    "cipher-alg=aes-128",
    "nope=1",
]


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_same_refusals(format: str, tmp_path: Path, qemu_img: Oracle) -> None:
    prefix = "" if format == "luks" else "encrypt."
    (create if format == "luks" else create_qcow2)(tmp_path / "a", MIB)
    before = (tmp_path / "a").read_bytes()
    named = f"driver={format},{prefix}key-secret=one,file.filename=a"
    for text in REFUSED:
        options = ",".join(prefix + part for part in text.split(","))
        line = ["amend", *OBJECTS, "-o", options, "--image-opts", named]
        mine, their = ours(line, tmp_path), theirs(qemu_img, line, tmp_path)
        assert mine == their
        assert mine.code == 1
    assert (tmp_path / "a").read_bytes() == before
    plain = ["amend", *OBJECTS, "-o", "encrypt.state=active,encrypt.new-secret=two", "p.qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", "p.qcow2", "1M", cwd=tmp_path)
    assert ours(plain, tmp_path) == theirs(qemu_img, plain, tmp_path)


def opens(options: dict[str, Any]) -> bool:
    try:
        open_disk(options, writable=False).close()
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_a_slots_life(format: str, tmp_path: Path, qemu_img: Oracle) -> None:
    path = tmp_path / "a"
    prefix = "" if format == "luks" else "encrypt."
    (create if format == "luks" else create_qcow2)(path, MIB)
    options = luks if format == "luks" else qcow2

    def amend(secret: str, *, force: bool = False, **change: Any) -> None:
        with open_disk(options(path, secret)) as disk:
            named = {prefix + name.replace("_", "-"): value for name, value in change.items()}
            asyncio.run(disk.aio.amend(force=force, **named))

    with open_disk(options(path)) as disk:
        disk.write(0, b"kept")
    amend("one", state="active", new_secret="two", iter_time=1)
    assert opens(options(path, "one"))
    assert opens(options(path, "two"))
    text = f"driver={format},{prefix}key-secret=two,file.filename={path}"
    qemu_img("convert", *OBJECTS, "--image-opts", text, "-O", "raw", tmp_path / "out")
    assert (tmp_path / "out").read_bytes()[:4] == b"kept"
    amend("two", state="active", new_secret="two", keyslot=7, iter_time=1)
    before = path.read_bytes()
    amend("two", state="inactive", keyslot=0)
    after = path.read_bytes()
    assert not opens(options(path, "one"))
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    assert changed > 200_000, "the key material was not overwritten"
    with pytest.raises(UsageError, match="already erased"):
        amend("two", state="inactive", keyslot=0)
    with pytest.raises(UsageError, match="All the active keyslots"):
        amend("two", state="inactive", old_secret="two")
    amend("two", force=True, state="active", new_secret="one", keyslot=1, iter_time=1)
    amend("two", force=True, state="active", new_secret="one", keyslot=7, iter_time=1)
    info = qemu_img.json("info", "--output=json", path)["format-specific"]["data"]
    slots = (info if format == "luks" else info["encrypt"])["slots"]
    assert [slot["active"] for slot in slots] == [False, True, *[False] * 5, True]
    assert not opens(options(path, "two"))
    amend("one", force=True, state="inactive", old_secret="one")
    assert not opens(options(path, "one"))


def test_all_slots(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create(path, MIB)
    with open_disk(luks(path)) as disk:
        for _ in range(7):
            asyncio.run(disk.aio.amend(**{"state": "active", "new-secret": "two", "iter-time": 1}))
        with pytest.raises(UsageError, match="all keyslots are in use"):
            asyncio.run(disk.aio.amend(**{"state": "active", "new-secret": "two"}))
        for index in range(7):
            asyncio.run(disk.aio.amend(state="inactive", keyslot=index))
    assert opens(luks(path, "two"))
    assert not opens(luks(path, "one"))


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("add", {"state": "active", "new-secret": "two", "iter-time": 1}),
    ("erase", {"state": "inactive", "keyslot": 0}),
    ("overwrite", {"state": "active", "new-secret": "two", "keyslot": 0, "iter-time": 1}),
]


async def _make(format: str, disk: CrashingDisk) -> dict[str, Any]:
    graph = Graph(registry())
    for name, data in SECRETS.items():
        graph.objects.add_secret(name, data)
    prefix = "" if format == "luks" else "encrypt."
    options: dict[str, Any] = {
        f"{prefix}key-secret": "one", f"{prefix}iter-time": FAST, f"{prefix}cipher-alg": "aes-128",
    }  # fmt: skip
    if prefix:
        options |= {"encrypt.format": "luks", "cluster_size": "64k"}
    await create_image(graph, disk.name, format, options, size=64 << 10)
    return options


async def _open(format: str, disk: CrashingDisk, secret: str, *, writable: bool = True) -> Disk:
    graph = Graph(registry())
    key = {"key-secret": secret}
    named = {"driver": "crashing", "filename": disk.name}
    options = {"driver": format, "file": named, **(key if format == "luks" else {"encrypt": key})}
    return await Disk.open(options, writable=writable, secrets=SECRETS, graph=graph)


async def _prepared(format: str, change: str) -> CrashingDisk:
    disk = CrashingDisk()
    await _make(format, disk)
    opened = await _open(format, disk, "one")
    await opened.write(0, b"precious")
    if change == "erase":
        await opened.amend(**_named(format, CHANGES[0][1]))
    await opened.close()
    disk.settle()
    return disk


def _named(format: str, change: dict[str, Any]) -> dict[str, Any]:
    prefix = "" if format == "luks" else "encrypt."
    return {prefix + name: value for name, value in change.items()}


async def _readable(format: str, disk: CrashingDisk) -> list[str]:
    """The passphrases that open it; what they show is right."""
    found = []
    for secret in ("one", "two"):
        try:
            opened = await _open(format, disk, secret, writable=False)
        except UsageError:
            continue
        assert await opened.read(0, 8) == b"precious"
        await opened.close()
        found.append(secret)
    return found


@pytest.mark.parametrize("format", ["luks", "qcow2"])
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_power_failures_lose_no_key(format: str, name: str, change: dict[str, Any]) -> None:
    async def main() -> None:
        disk = await _prepared(format, name)
        opened = await _open(format, disk, "one")
        await opened.amend(force=name == "overwrite", **_named(format, change))
        end = disk.position
        await opened.close()
        assert await _readable(format, disk) == (["one", "two"] if name == "add" else ["two"])
        seen = set()
        for position in range(end + 1):
            # Every state of the last moment before a barrier, and of those in between.
            for state in list(disk.states(position))[:6]:
                content = tuple((at, bytes(page)) for at, page in sorted(state.pages.pages.items()))
                if content not in seen:
                    seen.add(content)
                    assert await _readable(format, state.disk()), str(state)
        assert len(seen) > 3

    asyncio.run(main())


@pytest.mark.parametrize("format", ["luks", "qcow2"])
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_an_error_loses_no_key(format: str, name: str, change: dict[str, Any]) -> None:
    async def main() -> None:
        number = 1
        prepared = await _prepared(format, name)
        while True:
            disk = prepared.snapshot()
            opened = await _open(format, disk, "one")
            disk.fail(number, errno.EIO, kinds=("write", "flush", "read"))
            failed = False
            try:
                await opened.amend(force=name == "overwrite", **_named(format, change))
            except BlockError:
                failed = True
            try:
                await opened.close()
            except BlockError:
                failed = True
            disk.fail(0)
            assert await _readable(format, disk)
            if not failed:
                break
            number += 1
        assert number > 3

    asyncio.run(main())
