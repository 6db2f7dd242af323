"""The choke point and the roots in front of it, on the toy format: bytes, borders and races."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.errors import BlockError, LockedError, StorageError, UnsupportedError
from blocklayer.graph import io, resolve
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.filename import storage_of
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.root import Root, drained
from graph.toys import SHELF, ToyFormat, ToyStorage, new_graph, open_root, run, toy_image

UNIT = 512


@pytest.fixture(autouse=True)
def _empty_shelf() -> Iterator[None]:
    SHELF.reset()
    yield
    assert SHELF.open == []


def toy(node: Node) -> ToyFormat:
    return cast(ToyFormat, node.driver)


def storage(node: Node) -> ToyStorage:
    return cast(ToyStorage, storage_of(node).driver)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


LAYERS = st.lists(
    st.tuples(
        st.integers(1, 5 * UNIT),
        st.dictionaries(
            st.integers(0, 4), st.none() | st.binary(min_size=UNIT, max_size=UNIT), max_size=5
        ),
    ),
    min_size=1,
    max_size=4,
)
WRITES = st.lists(st.tuples(st.integers(0, 5 * UNIT), st.integers(0, 3 * UNIT)), max_size=5)


@settings(max_examples=100)
@given(LAYERS, WRITES)
def test_chains_read_and_write_like_bytes(
    layers: list[tuple[int, dict[int, bytes | None]]], writes: list[tuple[int, int]]
) -> None:
    SHELF.reset()
    below = b""
    for number, (size, clusters) in enumerate(layers):
        expected = bytearray(below[:size].ljust(size, b"\0"))
        clusters = {index: data for index, data in clusters.items() if index * UNIT < size}
        for index, data in clusters.items():
            place = slice(index * UNIT, min(size, (index + 1) * UNIT))
            expected[place] = (data or bytes(UNIT))[: place.stop - place.start]
        backing = str(number - 1) if number else None
        toy_image(str(number), size, clusters, backing=backing)
        below = bytes(expected)

    async def main() -> None:
        root = await open_root(new_graph(), f"shelf:{len(layers) - 1}")
        disk = bytearray(below)
        assert await root.read(0, root.node.size) == disk
        for fill, (offset, length) in enumerate(writes):
            offset = min(offset, len(disk))
            length = min(length, len(disk) - offset)
            data = bytes([fill + 1]) * length
            await root.write(offset, data)
            disk[offset : offset + length] = data
            assert await root.read(0, len(disk)) == disk
        runs = [run async for run in resolve.runs(root.node, 0, len(disk))]
        assert sum(run.length for run in runs) == len(disk)
        for one in runs:
            if one.kind is Kind.ZERO:
                assert not any(disk[one.offset : one.end])
        await root.close()

    run(main())


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1025), (1024, 1), (1025, 0), (-1, 1), (0, -1), (1 << 63, 1)]
)
def test_requests_outside_the_disk_fail_before_any_effect(offset: int, length: int) -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", 1024))
        writes = len(storage(root.node).writes)
        with pytest.raises(StorageError):
            await root.read(offset, length)
        for change in (root.write_zeroes, root.discard):
            with pytest.raises(StorageError):
                await change(offset, length)
        if length >= 0:
            with pytest.raises(StorageError):
                await root.write(offset, bytes(length))
        assert len(storage(root.node).writes) == writes
        await root.close()

    run(main())


def test_nothing_is_written_to_a_read_only_disk() -> None:
    async def main() -> None:
        image = toy_image("a", 1024)
        before = bytes(SHELF[image])
        root = await open_root(new_graph(), image, writable=False)
        for change in (
            root.write(0, b"x"),
            root.write_zeroes(0, 512),
            root.discard(0, 512),
            root.write_compressed(0, bytes(512)),
            root.truncate(512, shrink=True),
        ):
            with pytest.raises(BlockError):
                await change
        assert SHELF[image] == before
        assert root.graph.epochs.passed(root.graph.epochs.current)
        await root.close()

    run(main())


def test_poisoned_nodes_read_and_refuse_writes_with_the_reason() -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", 1024, {0: b"data"}))
        root.node.poison("a table could not be written")
        assert (await root.read(0, 4)) == b"data"
        with pytest.raises(StorageError, match="a table could not be written"):
            await root.write(0, b"x")
        await root.close()

    run(main())


def test_copy_on_write_fills_the_rest_from_below() -> None:
    async def main() -> None:
        toy_image("base", 700, {0: b"b" * UNIT, 1: b"c" * UNIT})
        root = await open_root(new_graph(), toy_image("top", 1024, backing="base"))
        await root.write(600, b"x")
        assert await root.read(0, 1024) == b"b" * 512 + b"c" * 88 + b"x" + b"c" * 99 + bytes(324)
        assert set(toy(root.node).clusters) == {1}
        await root.close()

    run(main())


def test_writes_into_one_new_cluster_are_all_kept() -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", 4 * UNIT))
        gate = storage(root.node).write_gate = asyncio.Event()
        writes = [asyncio.ensure_future(root.write(at, bytes([at % 250 + 1]) * 50))
                  for at in range(0, 2000, 50)]  # fmt: skip
        await settle()
        assert not any(write.done() for write in writes)
        gate.set()
        await asyncio.gather(*writes)
        data = await root.read(0, 2000)
        assert all(data[at] == at % 250 + 1 for at in range(0, 2000, 50))
        await root.close()

    run(main())


@pytest.mark.parametrize("first", ["write", "zero"])
def test_zeroing_part_of_a_cluster_keeps_a_write_beside_it(first: str) -> None:
    """The rest of the cluster reads as zeros when both begin, and no longer when one has ended."""

    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", UNIT))
        gate = storage(root.node).write_gate = asyncio.Event()
        steps = [lambda: root.write(256, b"x" * 10), lambda: root.write_zeroes(0, 100)]
        tasks = [
            asyncio.ensure_future(step()) for step in (steps if first == "write" else steps[::-1])
        ]
        await settle()
        gate.set()
        await asyncio.gather(*tasks)
        assert await root.read(0, UNIT) == bytes(256) + b"x" * 10 + bytes(UNIT - 266)
        await root.close()

    run(main())


def test_zeroing_hides_what_lies_below() -> None:
    async def main() -> None:
        toy_image("base", 4 * UNIT, dict.fromkeys(range(4), b"b" * UNIT))
        root = await open_root(new_graph(), toy_image("top", 4 * UNIT, backing="base"))
        await root.write_zeroes(100, 3 * UNIT)
        expected = b"b" * 100 + bytes(3 * UNIT) + b"b" * (UNIT - 100)
        assert await root.read(0, 4 * UNIT) == expected
        with pytest.raises(UnsupportedError):
            await root.write_zeroes(3 * UNIT + 200, 10, fallback=False)
        assert await root.read(0, 4 * UNIT) == expected
        await root.close()

    run(main())


def test_zeros_written_are_detected_where_asked() -> None:
    async def main() -> None:
        flags = Flags(read_only=False, detect_zeroes="on")
        root = await open_root(new_graph(), toy_image("a", 4 * UNIT), flags=flags)
        await root.write(0, bytes(2 * UNIT))
        await root.write(2 * UNIT, bytes(UNIT - 1) + b"x")
        clusters = toy(root.node).clusters
        assert (clusters[0], clusters[1], clusters[2] is None) == (None, None, False)
        await root.close()

    run(main())


def test_failed_allocation_is_given_back_and_nothing_changed() -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", UNIT))
        driver = storage(root.node)
        driver.write = _fail  # type: ignore[method-assign, assignment]
        with pytest.raises(StorageError, match="No space"):
            await root.write(0, b"x")
        del driver.write
        assert toy(root.node).aborted == 1
        assert toy(root.node).clusters == {}
        assert root.node.claims.held == []
        await root.write(0, b"x")
        assert await root.read(0, 1) == b"x"
        await root.close()

    run(main())


async def _fail(offset: int, buffers: object) -> None:
    raise StorageError("No space left on device", 28)


def test_what_was_resolved_is_forgotten_when_a_layer_below_changes() -> None:
    async def main() -> None:
        toy_image("base", UNIT)
        toy_image("middle", UNIT, backing="base")
        root = await open_root(new_graph(), toy_image("top", UNIT, backing="middle"))
        assert await root.read(0, 4) == bytes(4)
        assert root.node.runs
        base = root.node.chain()[-1]
        place = len(storage(base).bytes)
        storage(base).bytes.extend(b"base".ljust(UNIT, b"\0"))
        assert await root.read(0, 4) == bytes(4)
        toy(base).clusters[0] = place
        base.mapping_changed()
        assert await root.read(0, 4) == b"base"
        await root.close()

    run(main())


def test_a_run_resolved_while_the_mapping_moved_is_not_kept() -> None:
    async def main() -> None:
        root = await open_root(new_graph(), toy_image("a", UNIT))
        driver = toy(root.node)
        plain = driver.map

        async def slow(offset: int, length: int) -> Extent:
            extent = await plain(offset, length)
            await asyncio.sleep(0)
            return extent

        driver.map = slow  # type: ignore[method-assign]
        read = asyncio.ensure_future(root.read(0, 4))
        await asyncio.sleep(0)
        await driver.commit(await driver.allocate(0, UNIT))
        await storage(root.node).write(driver.clusters[0] or 0, [b"new!"])
        await read
        assert await root.read(0, 4) == b"new!"
        await root.close()

    run(main())


def test_drained_sections_wait_and_hold_back() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", UNIT))
        other = await open_root(graph, toy_image("b", UNIT))
        gate = storage(root.node).write_gate = asyncio.Event()
        inside = asyncio.ensure_future(root.write(0, b"1"))
        await settle()
        entered, leave = asyncio.Event(), asyncio.Event()

        async def section() -> None:
            async with drained(graph, storage_of(root.node)), drained(graph, root.node):
                entered.set()
                await leave.wait()

        task = asyncio.ensure_future(section())
        await settle()
        assert not entered.is_set()
        outside = asyncio.ensure_future(root.write(1, b"2"))
        gate.set()
        await inside
        await settle()
        assert entered.is_set()
        assert not outside.done()
        await other.write(0, b"not drained")
        leave.set()
        await outside
        await task
        assert await root.read(0, 2) == b"12"
        assert root.in_flight == 0
        await root.close()
        await other.close()

    run(main())


def test_a_drain_that_is_cancelled_lets_requests_in_again() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", UNIT))
        gate = storage(root.node).write_gate = asyncio.Event()
        inside = asyncio.ensure_future(root.write(0, b"1"))
        await settle()

        async def section() -> None:
            async with drained(graph):
                pytest.fail("a request is still inside")

        task = asyncio.ensure_future(section())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await inside
        await root.write(0, b"2")
        await root.close()

    run(main())


def test_a_root_does_only_what_it_took_permission_for() -> None:
    async def main() -> None:
        graph = new_graph()
        root = await open_root(graph, toy_image("a", UNIT))
        reader = Root(root.node, "a reader", 1)
        assert await reader.read(0, 1) == b"\0"
        for change in (reader.write(0, b"x"), reader.truncate(0, shrink=True)):
            with pytest.raises(LockedError, match="a reader"):
                await change
        await reader.close()
        await root.close()

    run(main())


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100_000, (2 << 20) + 5])
def test_zeros_are_told_from_data(length: int) -> None:
    assert io.is_zero(bytes(length))
    if length:
        assert not io.is_zero(bytes(length - 1) + b"x")
        assert not io.is_zero(b"x" + bytes(length - 1))
    assert len(io.zeros(length)) == length
