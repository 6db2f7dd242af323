"""Graph changes while roots stay in use: all edges move or none, and every change can be undone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blocklayer import aio
from blocklayer.drivers import REGISTRY
from blocklayer.errors import LockedError, StorageError, UsageError
from blocklayer.graph import edit
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.reopen import set_read_only
from blocklayer.graph.root import Root

MIB = 1 << 20
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


async def writable(graph: Graph, path: Path, **options: object) -> Node:
    return await open_image(
        graph,
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options},
        flags=Flags(read_only=False),
    )


def shape(graph: Graph) -> dict[str, object]:
    """Every node's users and permissions, to compare before and after."""
    return {
        name: (
            node.taken,
            node.shared,
            [(edge.name, edge.parent and edge.parent.name) for edge in node.parents],
        )
        for name, node in graph.nodes.items()
    }


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    async def make() -> None:
        await aio.create(tmp_path / "a.qcow2", MIB)
        await aio.create(tmp_path / "b.qcow2", MIB)

    asyncio.run(make())
    return tmp_path / "a.qcow2", tmp_path / "b.qcow2"


def test_an_overlay_takes_the_place_of_its_base_and_gives_it_back(
    images: tuple[Path, Path],
) -> None:
    async def main() -> None:
        graph = Graph(REGISTRY)
        base = await writable(graph, images[0])
        root = Root(base, "the disk", READ_WRITE)
        await root.write(0, b"old" * 100)
        overlay = await writable(graph, images[1], backing=None)
        before = shape(graph)
        async with edit.changing(graph, base):
            change = edit.append(base, overlay)
        assert root.node is overlay
        assert not base.taken & (Permission.WRITE | Permission.RESIZE)
        async with edit.changing(graph, base):
            change.undo()
        assert root.node is base
        assert shape(graph) == before
        async with edit.changing(graph, base):
            edit.append(base, overlay)
        await root.write(0, b"new")
        assert await root.read(0, 6) == b"newold"
        await root.close()
        assert graph.nodes == {}
        async with await aio.Disk.open(images[0]) as disk:
            assert await disk.read(0, 6) == b"oldold"

    asyncio.run(main())


def test_a_root_that_does_not_follow_and_a_frozen_edge_stay(images: tuple[Path, Path]) -> None:
    async def main() -> None:
        graph = Graph(REGISTRY)
        base = await writable(graph, images[0])
        guest = Root(base, "the guest", READ_WRITE)
        job = Root(base, "the job", Permission.NONE, follows=False)
        overlay = await writable(graph, images[1], backing=None)
        edit.append(base, overlay)
        assert (guest.node, job.node) == (overlay, base)
        thaw = edit.freeze([overlay.children["backing"]])
        before = shape(graph)
        with pytest.raises(LockedError, match="frozen 'backing' link"):
            edit.set_backing(overlay, None)
        assert shape(graph) == before
        thaw()
        edit.set_backing(overlay, None)
        await job.close()
        await guest.close()
        assert graph.nodes == {}

    asyncio.run(main())


def test_what_makes_no_chain_is_refused(images: tuple[Path, Path]) -> None:
    async def main() -> None:
        graph = Graph(REGISTRY)
        base = await writable(graph, images[0])
        root = Root(base, "the disk", READ_WRITE)
        overlay = await writable(graph, images[1], backing=None)
        before = shape(graph)
        edit.append(base, overlay)
        with pytest.raises(UsageError, match="already has a backing image"):
            edit.append(base, overlay)
        with pytest.raises(UsageError, match="cycle"):
            edit.set_backing(base, overlay)
        edit.set_backing(overlay, None)
        with edit.Change() as change:
            change.move(root, base)
        assert shape(graph) == before
        user = Root(overlay, "somebody", Permission.NONE)
        with pytest.raises(UsageError, match="already in use"):
            edit.append(base, overlay)
        await user.close()
        await root.close()

    asyncio.run(main())


def test_read_only_and_back_with_the_locks_held_all_the_time(images: tuple[Path, Path]) -> None:
    async def main() -> None:
        graph = Graph(REGISTRY)
        node = await writable(graph, images[0])
        root = Root(node, "the disk", READ_WRITE)
        await root.write(0, b"data")
        reader = Root(node, "a reader", Permission.CONSISTENT_READ)
        with pytest.raises(LockedError):
            # Its writer is still there.
            async with edit.changing(graph, node):
                await set_read_only(node, True)
        assert not node.read_only
        await root.write(4, b"more")
        await root.close()
        async with edit.changing(graph, node):
            await set_read_only(node, True)
        assert node.children["file"].node.read_only
        assert await reader.read(0, 8) == b"datamore"
        with pytest.raises(StorageError, match="read-only"):
            node.check_writable()
        async with edit.changing(graph, node):
            await set_read_only(node, False)
        with pytest.raises(LockedError):
            await aio.Disk.open(images[0], writable=True)
        root = Root(node, "the disk", READ_WRITE)
        await root.write(8, b"again")
        assert await reader.read(0, 13) == b"datamoreagain"
        await root.close()
        await reader.close()
        assert graph.nodes == {}

    asyncio.run(main())


def test_storage_that_cannot_be_reopened_leaves_all_as_it_was(images: tuple[Path, Path]) -> None:
    async def main() -> None:
        graph = Graph(REGISTRY)
        node = await writable(graph, images[0], **{"read-only": True})
        root = Root(node, "the disk", Permission.CONSISTENT_READ)
        images[0].rename(images[0].with_suffix(".away"))
        with pytest.raises(StorageError, match="Could not open"):
            async with edit.changing(graph, node):
                await set_read_only(node, False)
        assert node.read_only
        assert await root.read(0, 4) == bytes(4)
        images[0].with_suffix(".away").rename(images[0])
        async with edit.changing(graph, node):
            await set_read_only(node, False)
        await root.close()

    asyncio.run(main())
