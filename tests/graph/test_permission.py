"""Permissions: users that do not fit together are refused, and a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blocklayer.errors import LockedError
from blocklayer.graph.edit import Change
from blocklayer.graph.filename import storage_of
from blocklayer.graph.graph import Graph
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from graph.toys import SHELF, ToyStorage, new_graph, open_root, run, toy_image

READ = Permission.CONSISTENT_READ
WRITE = Permission.WRITE
ALL = Permission.ALL


@pytest.fixture(autouse=True)
def _empty_shelf() -> Iterator[None]:
    SHELF.reset()
    ToyStorage.refuses_writers.clear()
    yield
    ToyStorage.refuses_writers.clear()
    assert SHELF.open == []


def state(graph: Graph) -> dict[str, object]:
    """All permissions of all nodes and edges, to compare before and after."""
    return {
        name: (
            node.taken,
            node.shared,
            getattr(node.driver, "permissions", None),
            sorted((edge.name, edge.taken, edge.shared) for edge in node.parents),
        )
        for name, node in graph.nodes.items()
    }


def test_a_format_takes_what_it_needs_of_its_storage() -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", 4096))
        storage = storage_of(root.node).driver
        assert isinstance(storage, ToyStorage)
        taken, shared = storage.permissions
        assert taken & (READ | WRITE) == READ | WRITE
        assert not shared & WRITE
        await root.close()

    run(main())


def test_read_only_takes_no_write_anywhere() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096), writable=False)
        assert not any(node.taken & (WRITE | Permission.RESIZE) for node in graph.nodes.values())
        await root.close()

    run(main())


def test_backing_is_only_read() -> None:
    async def main() -> None:
        toy_image("base", 4096)
        root = await open_root(new_graph(), toy_image("top", 4096, backing="base"))
        below = root.node.backing
        assert below is not None
        assert below.read_only
        assert not below.taken & (WRITE | Permission.RESIZE)
        await root.close()

    run(main())


def test_second_user_who_does_not_fit_is_refused_and_nothing_changes() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096), shared=READ)
        before = state(graph)
        with pytest.raises(LockedError, match="write"):
            Root(root.node, "second", READ | WRITE)
        assert state(graph) == before
        assert graph.roots == [root]
        assert len(root.node.parents) == 1
        with pytest.raises(LockedError, match="write"):
            # It does not take more than is shared, but it does not share what is taken.
            Root(root.node, "third", READ, READ)
        assert state(graph) == before
        reader = Root(root.node, "reader", READ)
        await reader.close()
        assert state(graph) == before
        await root.close()

    run(main())


def test_a_refusal_deep_below_undoes_all_above() -> None:
    async def main() -> None:
        graph = new_graph()
        image = toy_image("a", 4096)
        ToyStorage.refuses_writers.add(image)
        with pytest.raises(LockedError, match="shelf:a"):
            await open_root(graph, image)
        assert graph.nodes == {}
        assert graph.roots == []

    run(main())


def test_conflict_deep_below_undoes_every_applied_permission() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096), writable=False)
        # Somebody uses the storage directly and lets nobody write to it.
        watcher = Root(storage_of(root.node), "watcher", READ, READ)
        before = state(graph)
        layers = (root.node, storage_of(root.node))
        for node in layers:
            node.flags.read_only = False
        with pytest.raises(LockedError, match="watcher"):
            Root(root.node, "writer", READ | WRITE)
        assert state(graph) == before
        for node in layers:
            node.flags.read_only = True
        await watcher.close()
        await root.close()

    run(main())


def test_nobody_writes_to_a_read_only_node() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096), writable=False)
        before = state(graph)
        with pytest.raises(LockedError, match="is read-only"):
            Root(root.node, "writer", READ | WRITE)
        assert state(graph) == before
        await root.close()

    run(main())


def test_leaving_gives_permissions_back() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096))
        before = state(graph)
        second = Root(
            root.node, "second", READ | WRITE | Permission.WRITE_UNCHANGED, READ | WRITE | 8
        )
        assert state(graph) != before
        await second.close()
        assert state(graph) == before
        await root.close()
        assert graph.nodes == {}

    run(main())


def test_repointing_that_does_not_fit_leaves_the_root_where_it_was() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", 4096))
        other = await open_root(graph, toy_image("b", 4096), shared=READ)
        before = state(graph)
        with pytest.raises(LockedError), Change() as change:
            change.move(root, other.node)
        assert root.node is not other.node
        assert state(graph) == before
        await root.close()
        await other.close()

    run(main())


def test_hundreds_of_layers_need_no_stack() -> None:
    async def main() -> None:
        toy_image("0", 512)
        for number in range(1, 300):
            toy_image(str(number), 512, backing=str(number - 1))
        graph = new_graph()
        root = await open_root(graph, "shelf:299", shared=READ)
        bottom = root.node.chain()[-1]
        assert bottom.taken & READ
        with pytest.raises(LockedError):
            Root(bottom, "writer below", WRITE)
        await root.close()
        assert graph.nodes == {}

    run(main())
