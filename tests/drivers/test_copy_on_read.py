"""The copy-on-read filter: what is read through it stays what it is, and stays in the top layer."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blocklayer.drivers import REGISTRY
from blocklayer.drivers.file import FileDriver
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.create import create_image
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.resolve import runs
from blocklayer.graph.root import Root

SIZE = 600 << 10
CLUSTER = 16 << 10


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, bytearray]:
    """base.raw ← middle.qcow2 ← top.qcow2, and what the top reads."""
    data = bytearray(random.Random(1).randbytes(SIZE - 50_000) + bytes(50_000))
    (tmp_path / "base.raw").write_bytes(data)

    async def make() -> None:
        for name, below, format in (
            ("middle.qcow2", "base.raw", "raw"),
            ("top.qcow2", "middle.qcow2", "qcow2"),
        ):
            await create_image(
                Graph(REGISTRY),
                str(tmp_path / name),
                "qcow2",
                {"cluster_size": CLUSTER},
                backing=str(tmp_path / below),
                backing_format=format,
            )
        graph = Graph(REGISTRY)
        root = await open_root(graph, layer(tmp_path / "middle.qcow2"))
        await root.write(100_000, b"m" * 30_000)
        await root.write_zeroes(16 * CLUSTER, 2 * CLUSTER)
        await root.close()

    asyncio.run(make())
    data[100_000:130_000] = b"m" * 30_000
    data[16 * CLUSTER : 18 * CLUSTER] = bytes(2 * CLUSTER)
    return tmp_path / "top.qcow2", data


def layer(path: Path, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **more}


async def open_root(graph: Graph, options: dict[str, Any], *, read_only: bool = False) -> Root:
    flags = Flags(read_only=read_only, discard_unmap=True)
    node = await open_options(graph, options, flags)
    taken = Permission.CONSISTENT_READ | (0 if read_only else Permission.WRITE | Permission.RESIZE)
    try:
        return Root(node, "test", taken)
    except BaseException:
        await graph.release(node)
        raise


def filtered(path: Path, **more: Any) -> dict[str, Any]:
    return {"driver": "copy-on-read", "file": layer(path), **more}


async def own_runs(root: Root) -> list[tuple[int, int]]:
    """What the top layer holds, joined."""
    child = root.node.children["file"].node
    found: list[tuple[int, int]] = []
    async for run in runs(child, 0, SIZE):
        if run.depth == 0 and run.present:
            if found and found[-1][1] == run.offset:
                found[-1] = (found[-1][0], run.end)
            else:
                found.append((run.offset, run.end))
    return found


def test_copies_whole_clusters_that_were_read(chain: tuple[Path, bytearray]) -> None:
    path, data = chain

    async def go() -> None:
        root = await open_root(Graph(REGISTRY), filtered(path))
        assert await root.read(CLUSTER + 5, 10) == data[CLUSTER + 5 : CLUSTER + 15]
        assert await own_runs(root) == [(CLUSTER, 2 * CLUSTER)]
        assert await root.read(5 * CLUSTER - 1, 2) == data[5 * CLUSTER - 1 : 5 * CLUSTER + 1]
        assert await own_runs(root) == [(CLUSTER, 2 * CLUSTER), (4 * CLUSTER, 6 * CLUSTER)]
        assert await root.read(0, SIZE) == data
        assert await own_runs(root) == [(0, SIZE)]
        await root.close()

    asyncio.run(go())
    top_only = asyncio.run(read_all(layer(path, backing=None)))
    assert top_only == data


async def read_all(options: dict[str, Any]) -> bytes:
    root = await open_root(Graph(REGISTRY), options, read_only=True)
    try:
        return await root.read(0, root.node.size)
    finally:
        await root.close()


def test_bottom_limits_what_is_copied(chain: tuple[Path, bytearray]) -> None:
    path, data = chain
    backing = layer(path.with_name("middle.qcow2"), **{"node-name": "middle"})

    async def go() -> None:
        options = {
            "driver": "copy-on-read",
            "bottom": "middle",
            "file": layer(path, backing=backing),
        }
        root = await open_root(Graph(REGISTRY), options)
        assert await root.read(0, SIZE) == data
        start = 100_000 // CLUSTER * CLUSTER
        assert await own_runs(root) == [(start, 8 * CLUSTER), (16 * CLUSTER, 18 * CLUSTER)]
        await root.close()

    asyncio.run(go())


def test_side_by_side_requests_lose_nothing(
    chain: tuple[Path, bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes and copies of the same clusters, interleaved at every access to a file."""
    path, data = chain
    chance = random.Random(7)

    def slowed(method: Callable[..., Any]) -> Callable[..., Any]:
        async def slow(*arguments: Any, **named: Any) -> Any:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            return await method(*arguments, **named)

        return slow

    monkeypatch.setattr(FileDriver, "read", slowed(FileDriver.read))
    monkeypatch.setattr(FileDriver, "write", slowed(FileDriver.write))

    async def go() -> None:
        root = await open_root(Graph(REGISTRY), filtered(path))
        for _ in range(12):
            cuts = sorted(chance.sample(range(SIZE), 25))
            requests = []
            for start, end in itertools.pairwise(cuts):
                end = min(end, start + chance.randrange(1, 3 * CLUSTER))
                kind = chance.choice(("read", "read", "write", "zero"))
                if kind == "read":
                    requests.append(expect(root, start, bytes(data[start:end])))
                elif kind == "write":
                    new = chance.randbytes(end - start)
                    data[start:end] = new
                    requests.append(root.write(start, new))
                else:
                    data[start:end] = bytes(end - start)
                    requests.append(root.write_zeroes(start, end - start))
            await asyncio.gather(*requests)
        await root.close()
        assert await read_all(layer(path)) == data

    async def expect(root: Root, offset: int, wanted: bytes) -> None:
        assert await root.read(offset, len(wanted)) == wanted

    asyncio.run(go())


@pytest.mark.parametrize(
    ("more", "read_only", "message"),
    [
        ({"bottom": "nobody"}, False, "nobody"),
        ({}, True, "read-only"),
        ({"top": "x"}, False, "top"),
    ],
)
def test_refused_options(
    chain: tuple[Path, bytearray], more: dict[str, Any], read_only: bool, message: str
) -> None:
    graph = Graph(REGISTRY)
    with pytest.raises(UsageError, match=message):
        asyncio.run(open_root(graph, filtered(chain[0], **more), read_only=read_only))
    assert graph.nodes == {}


def test_nobody_else_may_write_to_the_child(chain: tuple[Path, bytearray]) -> None:
    path, _ = chain

    async def go() -> None:
        graph = Graph(REGISTRY)
        root = await open_root(graph, filtered(path))
        with pytest.raises(BlockError):
            Root(root.node.children["file"].node, "another", Permission.WRITE)
        await root.close()
        assert graph.nodes == {}

    asyncio.run(go())
