"""Opening: what names stand for, whole chains, limits, policy; a failure leaves nothing open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from blocklayer.errors import (
    BlockError,
    FormatError,
    LockedError,
    PolicyError,
    StorageError,
    UsageError,
)
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from graph.toys import SHELF, ToyStorage, new_graph, open_root, run, toy_image


@pytest.fixture(autouse=True)
def _empty_shelf() -> Iterator[None]:
    SHELF.reset()
    yield
    assert SHELF.open == []


def opened(image: Any, policy: Policy | None = None, **arguments: Any) -> list[str]:
    """Open, name the drivers of the chain from the top down, and close."""

    async def main() -> list[str]:
        graph = Graph(new_graph().registry, policy)
        root = await open_root(graph, image, **arguments)
        names = [f"{node.driver.NAME}:{node.filename}" for node in root.node.chain()]
        await root.close()
        assert graph.nodes == {}
        return names

    return run(main())


def refused(image: Any, policy: Policy | None = None, **arguments: Any) -> BlockError:
    """Opening fails with an error of ours, and nothing stays open."""

    async def main() -> BlockError:
        graph = Graph(new_graph().registry, policy)
        with pytest.raises(BlockError) as caught:
            await open_root(graph, image, **arguments)
        assert graph.nodes == {}
        assert graph.roots == []
        return caught.value

    return run(main())


NAMES: list[Any] = [
    "shelf:a",
    {"driver": "toy", "file": {"driver": "toy-storage", "filename": "shelf:a"}},
    {"file": {"driver": "toy-storage", "filename": "shelf:a"}},
    {"filename": "shelf:a"},
    {"driver": "toy", "filename": "shelf:a"},
    'json:{"driver":"toy","file.driver":"toy-storage","file.filename":"shelf:a"}',
    'json:{"driver":"toy","file":{"driver":"toy-storage","filename":"shelf:a"}}',
    {"filename": 'json:{"driver":"toy","file":{"driver":"toy-storage","filename":"shelf:a"}}'},
]


@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_naming_an_image(name: Any) -> None:
    toy_image("a", 512)
    assert opened(name) == ["toy:shelf:a"]


def test_format_given_and_guessed() -> None:
    toy_image("a", 512)
    assert opened("shelf:a", format="toy") == ["toy:shelf:a"]
    assert refused('json:{"driver":"toy","file.filename":"shelf:a"}', format="raw")


BAD_OPTIONS: list[Any] = [
    "shelf:missing",
    "unknown:a",
    "",
    {},
    {"driver": "toy"},
    {"driver": "toy", "file": None},
    {"driver": "toy", "file": "no-such-node"},
    {"driver": "toy", "file": 5},
    {"file": 5},
    {"file": [1]},
    {"file": None},
    {"driver": 5, "file": {"filename": "shelf:a"}},
    {"driver": "nothing"},
    {"driver": "toy-storage"},
    {"driver": "toy", "filename": "shelf:a", "file": {"filename": "shelf:a"}},
    {"filename": "shelf:a", "file": {"filename": "shelf:a"}},
    {"driver": "toy", "filename": 'json:{"driver":"toy"}'},
    {"filename": "json:"},
    {"filename": 5},
    {"driver": "toy", "file": {"filename": "shelf:a"}, "backing": 5},
    {"driver": "toy", "file": {"filename": "shelf:a"}, "backing": {"driver": "raw"}},
    {"driver": "toy", "file": {"filename": "shelf:a"}, "node-name": "1bad"},
    {"driver": "toy", "file": {"filename": "shelf:a"}, "colour": "red"},
    {"driver": "toy", "file": {"filename": "shelf:a"}, "force-share": True},
    {
        "driver": "toy",
        "file": {"filename": "shelf:a"},
        "detect-zeroes": "unmap",
        "discard": "ignore",
    },
    'json:{"driver":"toy","file.filename":"shelf:a","file.colour":"red"}',
    "json:" + '{"file":' * 40 + '{"filename":"shelf:a"}' + "}" * 40,
]


@pytest.mark.parametrize("image", BAD_OPTIONS)
def test_bad_options_are_clear_errors(image: Any) -> None:
    toy_image("a", 512)
    assert str(refused(image)).strip()


def test_a_node_is_used_by_name_and_stays_held() -> None:
    async def main() -> None:
        toy_image("a", 512)
        graph = new_graph()
        storage = await open_image(
            graph, {"driver": "toy-storage", "filename": "shelf:a", "node-name": "disk"}
        )
        storage.held = True
        for options in ({"file": "disk"}, {"driver": "toy", "file": "disk"}):
            root = await open_root(graph, options, writable=False)
            assert root.node.children["file"].node is storage
            await root.close()
            assert graph.nodes == {"disk": storage}
            assert storage.held
        with pytest.raises(UsageError, match="Duplicate"):
            await open_image(
                graph, {"driver": "toy-storage", "filename": "shelf:a", "node-name": "disk"}
            )
        storage.held = False
        await graph.release(storage)
        assert graph.nodes == {}

    run(main())


def test_a_chain_opens_down_to_its_base() -> None:
    toy_image("c", 512)
    toy_image("b", 512, backing="c")
    assert opened(toy_image("a", 512, backing="b")) == [f"toy:shelf:{n}" for n in "abc"]
    assert opened("shelf:a", backing=False) == ["toy:shelf:a"]
    top = {"driver": "toy", "file": {"filename": "shelf:a", "driver": "toy-storage"}}
    assert opened({**top, "backing": None})[0].startswith("toy:")
    assert len(opened({**top, "backing": None})) == 1


def test_backing_that_is_missing_names_the_layer() -> None:
    toy_image("b", 512, backing="gone")
    error = refused(toy_image("a", 512, backing="b"))
    assert isinstance(error, StorageError)
    assert "Could not open backing file" in str(error)
    assert "gone" in str(error)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_loop_of_backing_files_is_refused(length: int) -> None:
    for number in range(length):
        toy_image(str(number), 512, backing=str((number + 1) % length))
    error = refused("shelf:0")
    assert isinstance(error, FormatError)
    assert "loop" in str(error)


def test_a_loop_spelled_in_other_ways_is_refused() -> None:
    name = toy_image("a", 512)
    said = "json:" + json.dumps(
        {"driver": "toy", "file": {"driver": "toy-storage", "filename": name}}
    )
    image = SHELF[name]
    header = json.loads(image[4:].rstrip(b"\0")) | {"backing": [said, None]}
    packed = b"TOY!" + json.dumps(header).encode()
    image[: len(packed)] = packed
    assert "loop" in str(refused(name))


def test_an_image_that_names_itself_as_storage_of_its_backing_file_is_refused() -> None:
    name = toy_image("a", 512)
    inner = {"driver": "toy", "file": {"driver": "toy-storage", "filename": name}}
    image = SHELF[name]
    header = json.loads(image[4:].rstrip(b"\0"))
    header["backing"] = ["json:" + json.dumps({"driver": "toy", "file": inner}), None]
    packed = b"TOY!" + json.dumps(header).encode()
    image[: len(packed)] = packed
    assert "nest" in str(refused(name))


def test_the_format_of_storage_is_never_guessed() -> None:
    async def main() -> None:
        toy_image("a", 512)
        graph = new_graph()
        root = await open_root(graph, {"driver": "toy", "file": {"filename": "shelf:a"}})
        assert root.node.children["file"].node.driver.NAME == "toy-storage"
        await root.close()

    run(main())


def test_storage_that_refuses_is_closed_again() -> None:
    image = toy_image("a", 512)
    ToyStorage.refuses_writers.add(image)
    try:
        assert isinstance(refused(image, format="toy"), LockedError)
        assert isinstance(refused(image), LockedError)
    finally:
        ToyStorage.refuses_writers.clear()


def test_a_chain_too_deep_is_refused() -> None:
    toy_image("0", 512)
    for number in range(1, 10):
        toy_image(str(number), 512, backing=str(number - 1))
    assert len(opened("shelf:9", Policy(max_depth=10))) == 10
    assert isinstance(refused("shelf:9", Policy(max_depth=9)), PolicyError)


def test_a_conflict_in_the_chain_leaves_nothing_open() -> None:
    async def main() -> None:
        toy_image("base", 512)
        toy_image("top", 512, backing="base")
        graph = new_graph()
        base = await open_root(
            graph,
            {"driver": "toy", "filename": "shelf:base", "node-name": "base"},
            writable=False,
            shared=0,
        )
        nodes = dict(graph.nodes)
        with pytest.raises(BlockError):
            await open_root(graph, {"driver": "toy", "filename": "shelf:top", "backing": "base"})
        assert graph.nodes == nodes
        await base.close()

    run(main())


def test_the_gate_is_asked_for_what_an_image_names_only() -> None:
    toy_image("base", 512)
    top = toy_image("top", 512, backing="base")
    assert isinstance(refused(top, Policy(references=False)), PolicyError)
    assert isinstance(refused(top, Policy(allow=("/",))), PolicyError)
    options = {
        "driver": "toy",
        "filename": top,
        "backing": {"driver": "toy", "filename": "shelf:base"},
    }
    assert len(opened(options, Policy(references=False))) == 2


def test_no_guessing_where_the_policy_forbids_it() -> None:
    toy_image("base", 512)
    top = toy_image("top", 512, backing="base", backing_format=None)
    assert isinstance(refused(top, Policy(probing=False)), PolicyError)
    assert isinstance(refused(top, Policy(probing=False), format="toy"), PolicyError)
    toy_image("top", 512, backing="base", backing_format="toy")
    assert len(opened(top, Policy(probing=False), format="toy")) == 2


@pytest.mark.parametrize(
    ("allowed", "name", "fits"),
    [
        ("/images", "/images/a", True),
        ("/images/", "/images/a", True),
        ("/images", "/images", True),
        ("/images", "/images-secret/a", False),
        ("/images", "/images/../etc/passwd", False),
        ("/images/a", "/images/a/b", True),
        ("/", "/etc/passwd", True),
    ],
)
def test_allowed_folders(allowed: str, name: str, fits: bool) -> None:
    policy = Policy(allow=(allowed,))
    if fits:
        policy.check("x", "backing file", name, local=True)
        return
    with pytest.raises(PolicyError):
        policy.check("x", "backing file", name, local=True)


def test_300_layers_open_read_and_close() -> None:
    async def main() -> None:
        toy_image("0", 1024, {0: b"base"})
        for number in range(1, 300):
            toy_image(str(number), 1024, backing=str(number - 1))
        graph = new_graph()
        root = await open_root(graph, "shelf:299")
        assert await root.read(0, 1024) == b"base".ljust(1024, b"\0")
        await root.write(1000, b"top")
        assert await root.read(1000, 3) == b"top"
        await root.flush()
        await root.truncate(2048)
        await root.close()
        assert graph.nodes == {}

    run(main())


def test_describing_and_reopening_gives_an_equal_node() -> None:
    async def main() -> None:
        toy_image("a", 512)
        graph = new_graph()
        node = await open_image(graph, "shelf:a", flags=Flags())
        again = await open_image(graph, node.filename, flags=Flags())
        assert again.filename == node.filename == "shelf:a"
        await graph.release(node)
        await graph.release(again)

    run(main())
