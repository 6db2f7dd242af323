"""Transactions beside guests that write: one instant for all disks, and all or none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import blocklayer
from blocklayer import aio
from blocklayer.daemon import bitmaps, nodes, snapshots
from blocklayer.daemon.actions import Action, Options, carry_out
from blocklayer.daemon.bitmaps import BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.snapshots import (
    BlockdevSnapshot,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
)
from blocklayer.daemon.transactions import transaction
from blocklayer.errors import BlockError, LockedError
from blocklayer.graph import reopen
from blocklayer.graph import snapshots as internal_snapshots
from blocklayer.graph.bitmaps import listed
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from jobs.live import READ_WRITE, SIZE, Guest
from oracles import HANG_TIMEOUT_S

MIB = 1 << 20


class Note(Action):
    """Remembers what guests had written at the instant."""

    NAME = "note"
    Options = Options
    guests: list[Guest]
    contents: list[bytes]

    def commit(self) -> None:
        """The instant."""
        self.contents = [bytes(guest.content) for guest in self.guests]


async def disk(daemon: Daemon, folder: Path, name: str, **options: Any) -> Node:
    path = folder / f"{name}.qcow2"
    await aio.create(path, SIZE)
    file = {"driver": "file", "filename": str(path)}
    return await nodes.add(daemon, {"driver": "qcow2", "node-name": name, "file": file, **options})


def play(scene: Callable[[Daemon], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(HANG_TIMEOUT_S), Daemon() as daemon:
            await scene(daemon)
            for root in list(daemon.graph.roots):
                await root.close()
        assert daemon.graph.nodes == {}

    asyncio.run(main())


def sync(node: str, folder: Path, name: str, **more: Any) -> BlockdevSnapshotSync:
    return BlockdevSnapshotSync(
        node_name=node, snapshot_file=str(folder / f"{name}.qcow2"), snapshot_node_name=name, **more
    )


async def state(daemon: Daemon, folder: Path) -> dict[str, Any]:
    """All that a transaction could have changed."""
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "nodes": {
            name: (
                node.taken, node.shared, node.read_only, node.busy, node.held,
                [(edge.name, edge.user) for edge in node.parents],
                {child: edge.node.name for child, edge in node.children.items()},
                [(info, daemon.graph.nodes[name].dirty_bitmaps[info.name or ""].sha256())
                 for info in await listed(node)],
                [each.name for each in internal_snapshots.listed(node)],
            )
            for name, node in daemon.graph.nodes.items()
        },
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_one_instant_of_several_disks(tmp_path: Path, seed: int) -> None:
    """The layers below hold what was acknowledged at the instant, on all disks; guests go on."""

    async def scene(daemon: Daemon) -> None:
        names = ["a", "b", "c"]
        guests = []
        for number, name in enumerate(names):
            root = Root(await disk(daemon, tmp_path, name), f"guest {name}", READ_WRITE)
            guests.append(Guest(root, seed * 10 + number))
            guests[-1].start()
        noted = []
        for generation in range(3):
            for guest in guests:
                await guest.at_least(8)
            tops = [guest.root.node.name for guest in guests]
            made = [
                snapshots.Sync(daemon, sync(top, tmp_path, f"{name}{generation}"))
                for name, top in zip(names, tops, strict=True)
            ]
            bits = [
                bitmaps.Add(daemon, BlockDirtyBitmapAdd(node=f"{name}{generation}", name="since"))
                for name in names
            ]
            note = Note(daemon, Options())
            note.guests = guests
            await carry_out(daemon, [*made, *bits, note])
            noted.append((tops, note.contents))
        for guest in guests:
            await guest.at_least(8)
            await guest.stop()
            await guest.check()
        for tops, contents in noted:
            for top, content in zip(tops, contents, strict=True):
                node = daemon.find(top)
                assert node.read_only
                assert node.children["file"].node.read_only
                reader = Root(node, "the test", Permission.CONSISTENT_READ)
                assert await reader.read(0, SIZE) == content
                await reader.close()
        for guest, content in zip(guests, noted[-1][1], strict=True):
            bitmap = guest.root.node.dirty_bitmaps["since"]
            for offset in range(0, SIZE, bitmap.granularity):
                end = offset + bitmap.granularity
                if guest.content[offset:end] != content[offset:end]:
                    assert bitmap.is_dirty(offset)

    play(scene)


FAILING: dict[str, tuple[str, dict[str, Any]]] = {
    "abort": ("abort", {}),
    "snapshot of nothing": ("blockdev-snapshot", {"node": "nope", "overlay": "o"}),
    "overlay in use": ("blockdev-snapshot", {"node": "b", "overlay": "o"}),
    "overlay with a base": ("blockdev-snapshot", {"node": "b", "overlay": "x"}),
    "no folder": (
        "blockdev-snapshot-sync",
        {"node-name": "b", "snapshot-file": "/nope/q", "snapshot-node-name": "q"},
    ),
    "a name twice": (
        "blockdev-snapshot-sync",
        {"node-name": "b", "snapshot-file": "/nope/q", "snapshot-node-name": "x"},
    ),
    "base with an overlay": (
        "blockdev-snapshot-sync",
        {"node-name": "a", "snapshot-file": "FOLDER/q.qcow2", "snapshot-node-name": "q"},
    ),
    "internal, twice": ("blockdev-snapshot-internal-sync", {"device": "b", "name": "in"}),
    "bitmap twice": ("block-dirty-bitmap-add", {"node": "c", "name": "kept"}),
    "bitmap to remove twice": ("block-dirty-bitmap-remove", {"node": "c", "name": "gone"}),
    "no such bitmap": ("block-dirty-bitmap-clear", {"node": "c", "name": "nope"}),
    "one being removed": ("block-dirty-bitmap-enable", {"node": "c", "name": "gone"}),
    "nothing to disable": ("block-dirty-bitmap-disable", {"node": "c", "name": "nope"}),
    "one source missing": (
        "block-dirty-bitmap-merge", {"node": "c", "target": "kept", "bitmaps": ["off", "nope"]},
    ),
}  # fmt: skip


FIRST_GOOD = {
    "overlay in use", "overlay with a base", "a name twice", "base with an overlay",
    "internal, twice", "bitmap to remove twice", "one being removed", "bitmap twice",
}  # fmt: skip
"""What is wrong only because of the actions before; or is right when it comes first."""

CASES = [(failing, "last") for failing in FAILING]
CASES += [(failing, "first") for failing in FAILING if failing not in FIRST_GOOD]


@pytest.mark.parametrize(("failing", "place"), CASES)
def test_all_is_as_before_when_one_fails(tmp_path: Path, failing: str, place: str) -> None:
    async def scene(daemon: Daemon) -> None:
        guests = []
        for name in ("a", "b", "c"):
            root = Root(await disk(daemon, tmp_path, name), f"guest {name}", READ_WRITE)
            guests.append(Guest(root, len(guests)))
        await disk(daemon, tmp_path, "o", backing=None)
        for name, options in (("kept", {}), ("gone", {"persistent": True}), ("off", {})):
            await bitmaps.block_dirty_bitmap_add(
                daemon, BlockDirtyBitmapAdd(node="c", name=name, **options)
            )
        await bitmaps.block_dirty_bitmap_disable(daemon, BlockDirtyBitmap(node="c", name="off"))
        for guest in guests:
            for _ in range(20):
                await guest.one()
        before = await state(daemon, tmp_path)
        good: list[tuple[str, Any]] = [
            ("blockdev-snapshot", BlockdevSnapshot(node="a", overlay="o")),
            ("blockdev-snapshot-internal-sync", BlockdevSnapshotInternal(device="b", name="in")),
            ("blockdev-snapshot-sync", sync("b", tmp_path, "x")),
            ("block-dirty-bitmap-add", BlockDirtyBitmapAdd(node="x", name="new")),
            ("block-dirty-bitmap-remove", BlockDirtyBitmap(node="c", name="gone")),
            ("block-dirty-bitmap-clear", BlockDirtyBitmap(node="c", name="kept")),
            ("block-dirty-bitmap-enable", BlockDirtyBitmap(node="c", name="off")),
            ("block-dirty-bitmap-disable", BlockDirtyBitmap(node="c", name="kept")),
            ("block-dirty-bitmap-merge",
             BlockDirtyBitmapMerge(node="c", target="off", bitmaps=["kept"])),
        ]  # fmt: skip
        name, options = FAILING[failing]
        text = {
            key: value.replace("FOLDER", str(tmp_path)) if isinstance(value, str) else value
            for key, value in options.items()
        }
        wrong = [(name, text)]
        for guest in guests:
            guest.start()
            guest.requests = 0
        with pytest.raises(BlockError):
            await transaction(daemon, [*wrong, *good] if place == "first" else [*good, *wrong])
        for guest in guests:
            await guest.stop()
            await guest.check()
        after = await state(daemon, tmp_path)
        for known in (before, after):
            known["nodes"]["c"] = [
                part if index != 7 else [info.name for info, _ in part]
                for index, part in enumerate(known["nodes"]["c"])
            ]
        assert after == before
        assert [bitmap.enabled for bitmap in daemon.find("c").dirty_bitmaps.values()] == [
            True, True, False,
        ]  # fmt: skip
        await transaction(daemon, good)
        for guest in guests:
            await guest.one()
            await guest.check()

    play(scene)
    for path in tmp_path.glob("*.qcow2"):
        with blocklayer.open(path) as image:
            result = image.check()
        assert not result.corruptions
        assert not result.leaks


def test_a_base_that_is_read_only_keeps_its_caches_and_becomes_writable_again(
    tmp_path: Path,
) -> None:
    async def scene(daemon: Daemon) -> None:
        node = await disk(daemon, tmp_path, "a")
        root = Root(node, "the guest", READ_WRITE)
        await bitmaps.block_dirty_bitmap_add(
            daemon, BlockDirtyBitmapAdd(node="a", name="p", persistent=True)
        )
        await root.write(0, b"x" * 4096)
        with pytest.raises(LockedError):
            await reopen.retire(node)
        assert not node.read_only
        driver = node.driver
        await snapshots.blockdev_snapshot_sync(daemon, sync("a", tmp_path, "o"))
        assert node.driver is driver
        assert node.read_only
        assert node.dirty_bitmaps["p"].read_only
        with pytest.raises(BlockError, match="readonly"):
            await bitmaps.block_dirty_bitmap_clear(daemon, BlockDirtyBitmap(node="a", name="p"))
        assert await root.read(0, 4096) == b"x" * 4096
        await reopen.set_read_only(node, False)
        assert not node.dirty_bitmaps["p"].read_only
        assert node.dirty_bitmaps["p"].count == 65536

    play(scene)


def test_storage_that_fails_to_open_leaves_the_base_writable_and_its_bitmaps_in_use(
    tmp_path: Path,
) -> None:
    async def scene(daemon: Daemon) -> None:
        node = await disk(daemon, tmp_path, "a")
        root = Root(node, "the guest", READ_WRITE)
        await bitmaps.block_dirty_bitmap_add(
            daemon, BlockDirtyBitmapAdd(node="a", name="p", persistent=True)
        )
        await root.write(0, b"x" * 4096)
        await root.close()
        path = tmp_path / "a.qcow2"
        path.rename(tmp_path / "away")
        with pytest.raises(BlockError):
            await reopen.retire(node)
        (tmp_path / "away").rename(path)
        assert not node.read_only
        assert not node.dirty_bitmaps["p"].read_only
        info = node.driver.specific_info()
        assert info is not None
        assert "in-use" in info.bitmaps[0].flags  # type: ignore[attr-defined]

    play(scene)
