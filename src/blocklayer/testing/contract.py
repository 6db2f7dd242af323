"""Contract tests: subclass one, say how your driver's disks are made and opened, and run pytest.

    class TestMyDriver(DiskContract):
        @pytest.fixture
        def target(self, tmp_path):
            return MyTarget(tmp_path / "disk")

``MyTarget`` is a ``Target``. ``DiskContract`` fits every driver that can be written,
``ReadOnlyContract`` those that cannot; ``FormatContract`` is for those with clusters, and
``ResizeContract`` comes beside any of them.

1. A test makes all disks it needs through ``target``, and closes what it opened.
2. Nothing is timed. Tests of concurrency put all requests on one loop at once; what they then
   accept is what the order of requests leaves open, and no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocklayer.errors import BlockError, LockedError, StorageError
from blocklayer.graph import resolve
from blocklayer.graph.extent import Kind
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.testing.model import Chain
from blocklayer.testing.strategies import Request, Shape, ranges, request_lists, sizes
from blocklayer.units import KIB, align_down, align_up

_anew = settings(
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # the target makes a new disk for every example
        HealthCheck.differing_executors,  # every contract class runs the tests it inherits
        HealthCheck.too_slow,
    ]
)


class Target(Protocol):
    """One place for a disk of the driver under test."""

    async def create(self, size: int) -> None:
        """Make a new disk of ``size`` bytes that reads as zeros, in place of the last one."""

    async def open(self, *, writable: bool = True) -> Root:
        """Take hold of the disk, with the permissions to write and resize if ``writable``."""


async def apply(root: Root, request: Request) -> None:
    """Send ``request``."""
    if request.kind == "write":
        await root.write(request.offset, request.data)
    elif request.kind == "compress":
        await root.write_compressed(request.offset, request.data)
    elif request.kind == "discard":
        await root.discard(request.offset, request.length)
    else:
        unmap = request.kind == "unmap"
        await root.write_zeroes(request.offset, request.length, unmap=unmap)


async def read_all(root: Root) -> bytes:
    """The whole disk, in one request."""
    return await root.read(0, root.node.size)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine on a loop of its own."""
    asyncio.run(coroutine)


class _Contract:
    cluster_size: ClassVar[int] = 512
    """What requests are drawn around."""
    granularity: ClassVar[int] = 1
    """What sizes of disks are multiples of."""
    persistent: ClassVar[bool] = True
    """What was written is there when the disk is opened again."""
    disk_size: ClassVar[int] = 64 * 1024
    """For tests that draw none."""
    kinds: ClassVar[tuple[str, ...]] = ("write", "write", "zero", "unmap", "discard")

    def shape(self, size: int) -> Shape:
        """A shape for drawing requests."""
        return Shape(size=size, cluster_size=self.cluster_size)

    def draw_shape(self, data: st.DataObject, limit: int | None = None) -> Shape:
        """A shape with a drawn size, of ``limit`` bytes at most (if a cluster is no larger)."""
        drawn = sizes(self.cluster_size, granularity=self.granularity, limit=limit)
        return self.shape(data.draw(drawn))

    def draw_requests(self, data: st.DataObject, shape: Shape) -> list[Request]:
        """Requests of the kinds that the driver takes."""
        drawn = data.draw(request_lists(shape, most=10))
        return [request for request in drawn if request.kind in self.kinds]


class ReadOnlyContract(_Contract):
    """For every driver: sizes, borders, block status."""

    @pytest.fixture
    def target(self) -> Target:
        """Where disks are made; override it."""
        pytest.fail("a contract class needs a fixture named 'target'")

    def test_a_new_disk_reads_as_zeros(self, target: Target) -> None:
        """All of it, and its size is the one asked for."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open(writable=False)
            assert root.node.size == self.disk_size
            assert await read_all(root) == bytes(self.disk_size)
            await root.close()

        run(main())

    def test_requests_outside_the_disk_fail(self, target: Target) -> None:
        """Before any effect, and the disk stays in use."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open(writable=False)
            size = root.node.size
            for offset, length in ((0, size + 1), (size, 1), (size + 1, 0), (-1, 1), (1 << 62, 1)):
                with pytest.raises(StorageError):
                    await root.read(offset, length)
            assert await root.read(size, 0) == b""
            await root.close()

        run(main())

    def test_nothing_is_written_without_the_permission(self, target: Target) -> None:
        """Whatever the request."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open(writable=False)
            for change in (
                root.write(0, b"x"),
                root.write_zeroes(0, self.disk_size),
                root.discard(0, self.disk_size),
                root.truncate(2 * self.disk_size),
            ):
                with pytest.raises(BlockError):
                    await change
            assert await read_all(root) == bytes(self.disk_size)
            await root.close()

        run(main())


class DiskContract(ReadOnlyContract):
    """For drivers that can be written: everything of a disk that its users rely on."""

    @_anew
    @given(data=st.data())
    def test_requests_do_to_the_disk_what_they_do_to_bytes(
        self, target: Target, data: st.DataObject
    ) -> None:
        """After each request, and once more when the disk is opened again."""
        shape = self.draw_shape(data)
        requests = self.draw_requests(data, shape)

        async def main() -> None:
            await target.create(shape.size)
            model = Chain(shape.size)
            root = await target.open()
            for request in requests:
                await apply(root, request)
                request.apply(model)
                model.settle(await read_all(root))
            await root.flush()
            await self._check_extents(root, model.visible())
            await root.close()
            if self.persistent:
                root = await target.open(writable=False)
                model.settle(await read_all(root))
                await self._check_extents(root, model.visible())
                await root.close()

        run(main())

    async def _check_extents(self, root: Root, content: bytes) -> None:
        offset = 0
        async for found in resolve.runs(root.node, 0, root.node.size):
            assert found.offset == offset
            assert 0 < found.length <= root.node.size - offset
            if found.kind is Kind.ZERO:
                assert not any(content[found.offset : found.end])
            offset = found.end
        assert offset == root.node.size

    @_anew
    @given(data=st.data())
    def test_reads_of_any_range_agree(self, target: Target, data: st.DataObject) -> None:
        """With what was written as a whole."""
        shape = self.draw_shape(data)
        wanted = data.draw(st.lists(ranges(shape), min_size=1, max_size=6))

        async def main() -> None:
            await target.create(shape.size)
            root = await target.open()
            content = Request("write", 0, shape.size, 7).data
            await root.write(0, content)
            for offset, length in wanted:
                assert await root.read(offset, length) == content[offset : offset + length]
            await root.close()

        run(main())

    @_anew
    @given(data=st.data())
    def test_requests_at_once_do_not_disturb_each_other(
        self, target: Target, data: st.DataObject
    ) -> None:
        """Each byte is what one of the requests that met it made of it; others are untouched."""
        # Every byte is judged by itself: a few clusters are enough.
        shape = self.draw_shape(data, 4 * KIB)
        before = self.draw_requests(data, shape)[:3]
        kinds = st.sampled_from(("write", "write", "zero", "read", "discard", "flush"))
        crowd = data.draw(st.lists(st.tuples(kinds, ranges(shape)), min_size=2, max_size=8))

        async def main() -> None:
            await target.create(shape.size)
            root = await target.open()
            for request in before:
                await apply(root, request)
            old = await read_all(root)
            pending = [_start(root, kind, place, n) for n, (kind, place) in enumerate(crowd, 1)]
            answers = await asyncio.gather(*pending)
            for (kind, (offset, _)), answer in zip(crowd, answers, strict=True):
                if kind == "read":
                    assert answer is not None
                    during = _outcomes(old, crowd, during=True)
                    assert all(value in during[at] for at, value in enumerate(answer, offset))
            new, after = await read_all(root), _outcomes(old, crowd)
            wrong = [at for at, value in enumerate(new) if value not in after[at]]
            assert not wrong, f"byte {wrong[0]:#x} is {new[wrong[0]]}, not {after[wrong[0]]}"
            await root.close()

        run(main())

    def test_neighbours_in_new_space_are_all_kept(self, target: Target) -> None:
        """Many small writes at once into space that nobody wrote to before."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open()
            step = max(37, self.cluster_size // 64)
            places = range(0, self.disk_size - 16, step)
            await asyncio.gather(*(root.write(at, bytes([at % 251 + 1]) * 16) for at in places))
            content = await read_all(root)
            for at in places:
                assert content[at : at + step] == bytes([at % 251 + 1]) * 16 + bytes(step - 16)
            await root.close()

        run(main())

    def test_requests_outside_the_disk_change_nothing(self, target: Target) -> None:
        """Not even the part of them that lies within."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open()
            size = root.node.size
            for change in (
                root.write(size - 1, b"xy"),
                root.write(size, b"x"),
                root.write(-1, b"xy"),
                root.write_zeroes(size - 1, 2),
                root.discard(size - 1, 2),
            ):
                with pytest.raises(StorageError):
                    await change
            await root.write(size, b"")
            await root.write_zeroes(size, 0)
            await root.discard(size, 0)
            assert await read_all(root) == bytes(size)
            await root.close()

        run(main())

    def test_a_reader_without_permissions_does_not_write(self, target: Target) -> None:
        """Beside a writer, on the same node."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open()
            reader = Root(root.node, "a reader", Permission.CONSISTENT_READ)
            await root.write(0, b"x")
            assert await reader.read(0, 1) == b"x"
            with pytest.raises(LockedError):
                await reader.write(0, b"y")
            await reader.close()
            assert await root.read(0, 1) == b"x"
            await root.close()

        run(main())


def _start(
    root: Root, kind: str, place: tuple[int, int], fill: int
) -> Coroutine[Any, Any, bytes | None]:
    offset, length = place
    if kind == "write":
        return root.write(offset, bytes([fill]) * length)
    if kind == "zero":
        return root.write_zeroes(offset, length)
    if kind == "discard":
        return root.discard(offset, length)
    return root.read(offset, length) if kind == "read" else root.flush()


def _outcomes(
    old: bytes, crowd: list[tuple[str, tuple[int, int]]], *, during: bool = False
) -> list[set[int]]:
    """The values each byte may have after, or while, all requests of ``crowd`` run at once."""
    allowed: list[set[int]] = [set() for _ in old]
    replaced = bytearray(len(old))
    for fill, (kind, (offset, length)) in enumerate(crowd, 1):
        if kind not in ("write", "zero", "discard"):
            continue
        for at in range(offset, offset + length):
            allowed[at].add(fill if kind == "write" else 0)
            replaced[at] |= kind != "discard"
    for at, value in enumerate(old):
        if during or not replaced[at]:
            allowed[at].add(value)
    return allowed


class ResizeContract(_Contract):
    """For drivers whose disks can change their size."""

    @_anew
    @given(data=st.data())
    def test_resizing(self, target: Target, data: st.DataObject) -> None:
        """What is cut off is gone, what is added reads as zeros, the rest stays."""
        shape = self.draw_shape(data)
        steps = data.draw(
            st.lists(sizes(self.cluster_size, granularity=self.granularity), max_size=4)
        )

        async def main() -> None:
            await target.create(shape.size)
            model = Chain(shape.size)
            root = await target.open()
            for size in (shape.size, *steps):
                await root.truncate(size, shrink=True)
                model.resize(size)
                model.settle(await read_all(root))
                request = Request("write", 0, size, 7)
                await apply(root, request)
                request.apply(model)
            model.settle(await read_all(root))
            await root.close()
            if self.persistent:
                root = await target.open(writable=False)
                model.settle(await read_all(root))
                await root.close()

        run(main())

    def test_shrinking_must_be_allowed(self, target: Target) -> None:
        """A tail is never lost by accident."""

        async def main() -> None:
            await target.create(self.disk_size)
            root = await target.open()
            await root.write(self.disk_size - 1, b"x")
            with pytest.raises(BlockError):
                await root.truncate(self.disk_size // 2)
            assert (await read_all(root))[-1:] == b"x"
            await root.close()

        run(main())


class FormatContract(DiskContract):
    """For formats with clusters; set ``cluster_size`` to the target's."""

    def test_a_write_touches_whole_clusters_only_inside(self, target: Target) -> None:
        """Around each border of clusters, over old data."""

        async def main() -> None:
            cluster = self.cluster_size
            size = align_up(4 * cluster, self.granularity)
            for start in (cluster - 1, cluster, cluster + 1):
                for end in (3 * cluster - 1, 3 * cluster, 3 * cluster + 1):
                    await target.create(size)
                    root = await target.open()
                    first = align_down(start, cluster)
                    await root.write(first, b"o" * (3 * cluster))
                    await root.discard(first, cluster)
                    expected = bytearray(await read_all(root))
                    await root.write(start, b"n" * (end - start))
                    expected[start:end] = b"n" * (end - start)
                    assert await read_all(root) == expected
                    await root.close()

        run(main())
