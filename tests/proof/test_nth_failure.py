"""The Nth request to the disk fails, for N = 1, 2, 3 … until an operation gets through untouched.

Whatever fails: the error reaches whoever asked (R6); reads go on and show old or new; a retry
works, or writes are refused with a reason (R4); and the file, opened again, has no corruption.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from blocklayer.errors import BlockError, StorageError
from blocklayer.graph.create import create_image
from blocklayer.graph.driver import BackingReference
from blocklayer.graph.graph import Graph
from blocklayer.graph.root import Root
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.crashing import CrashingDisk
from blocklayer.testing.model import Chain, Versions, difference
from blocklayer.testing.strategies import Request
from proof.chains import run
from proof.crashes import REGISTRY, check, driver_of, new_image, raw_disk, take

KIB = 1024
CLUSTER = 512
SIZE = 40 * KIB
TRIES_MAX = 400

Operation = Callable[[Root], Awaitable[None]]
Effect = Callable[[Chain, int], None]
"""What an operation does to the model, given the bytes of a cluster."""
BEST_EFFORT = frozenset(("discard",))
"""Giving host space back may fail silently: nobody asked whether it is given back."""


def requests(*wanted: tuple[str, int, int]) -> tuple[Operation, Effect]:
    """The operation that sends these requests and flushes, and what it does to the model.

    Compressed ones are rounded out to whole clusters.
    """

    def sent(unit: int, size: int) -> Iterator[Request]:
        for kind, offset, length in wanted:
            if kind == "compress":
                offset -= offset % unit
                length = min(unit, size - offset)
            yield Request(kind, offset, length, 0x5A)

    async def operation(root: Root) -> None:
        for request in sent(driver_of(root).allocation_unit, root.node.size):
            await apply(root, request)
        await root.flush()

    def model(chain: Chain, unit: int) -> None:
        for request in sent(unit, chain.size):
            # The space is given back, and then it reads as zeros (the whole clusters of it).
            kind = "zero" if request.kind == "discard" else request.kind
            Request(kind, request.offset, request.length, request.fill).apply(chain)

    return operation, model


def resize(size: int) -> tuple[Operation, Effect]:
    """Change the size, and flush."""

    async def operation(root: Root) -> None:
        await root.truncate(size, shrink=True)
        await root.flush()

    return operation, lambda chain, unit: chain.resize(size)


async def forget_backing(root: Root) -> None:
    await driver_of(root).change_backing(BackingReference("crashing:elsewhere", "raw"))
    await driver_of(root).change_backing(None)


OPERATIONS: dict[str, tuple[Operation, Effect]] = {
    "write new clusters": requests(("write", 30 * KIB + 100, 5 * CLUSTER)),
    "write in place": requests(("write", 100, 2 * CLUSTER)),
    "write parts of clusters": requests(("write", 20 * KIB + 10, 20), ("write", 39 * KIB, 30)),
    "write far apart": requests(*(("write", at * KIB, 10) for at in range(0, 40, 5))),
    "zero": requests(("zero", 50, 6 * CLUSTER)),
    "zero and unmap": requests(("unmap", 0, 8 * CLUSTER)),
    "discard": requests(("discard", 0, 8 * CLUSTER)),
    "discard and write": requests(("discard", 0, 8 * CLUSTER), ("write", 30 * KIB, 8 * CLUSTER)),
    "compress": requests(("compress", 30 * KIB, CLUSTER), ("compress", 31 * KIB, CLUSTER)),
    "overwrite compressed": requests(("write", 25 * KIB + 10, CLUSTER)),
    "grow": resize(60 * KIB),
    "grow the L1 table": resize(2300 * KIB),
    "shrink": resize(10 * KIB + CLUSTER),
}

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide refcounts": {"refcount_bits": 64},
    "lazy refcounts": {"lazy_refcounts": True},
    "extended L2": {"cluster_size": 16 * KIB, "extended_l2": True},
}


async def prepared(**options: Any) -> tuple[CrashingDisk, CrashingDisk]:
    """An image with data, zeros and compressed clusters over a base, and the base."""
    base = raw_disk(Request("write", 0, 25 * KIB, 0xBB).data)
    disk = await new_image(SIZE, base=base, **options)
    root = await take(disk)
    await root.write(0, b"\x11" * (10 * CLUSTER))
    unit = driver_of(root).allocation_unit
    for cluster in {50 * CLUSTER // unit, 51 * CLUSTER // unit}:
        await root.write_compressed(cluster * unit, b"\x22" * unit)
    await root.write_zeroes(15 * KIB, 2 * KIB)
    await root.close()
    disk.settle()
    return disk, base


async def fail_once(
    start: CrashingDisk, name: str, nth: int, error: int, *, partial: int, poisons: bool
) -> bool:
    """Run the operation with its `nth` request failing; the answer is whether none failed."""
    operation, effect = OPERATIONS[name]
    disk = start.snapshot()
    disk.poisons = poisons
    root = await take(disk)
    old = await read_all(root)
    model = Chain(len(old))
    model.write(0, old)
    effect(model, driver_of(root).allocation_unit)
    new = model.visible()
    versions = Versions(old)
    versions.begin(new)
    story = f"{name}, request {nth} fails"
    disk.fail(nth, error, partial=partial)
    raised = await outcome(operation(root))
    failed = disk.failures
    disk.fail(0)
    if raised is None and not failed:
        content = await read_all(root)
        assert content == new, difference(content, new)
        await root.close()
        return True
    assert failed, f"{story}: {raised}"
    assert raised is not None, f"{story}, and nobody was told"
    assert raised.errno in (error, errno.EIO), f"{story}: {raised}"
    expect(versions, await read_all(root), story)
    await retry(root, operation, new, story)
    try:
        await root.close()
    except BlockError:
        assert root.graph.nodes == {}, story
    await reopened(disk, versions, story)
    return False


async def outcome(awaitable: Awaitable[None]) -> StorageError | None:
    try:
        await awaitable
    except StorageError as error:
        return error
    return None


def expect(versions: Versions, content: bytes, story: str) -> None:
    problem = versions.explain(content, unit=1)
    assert problem is None, f"{story}: {problem}"


async def retry(root: Root, operation: Operation, new: bytes, story: str) -> None:
    """Works, or is refused for a reason while reads go on."""
    refused = await outcome(operation(root))
    content = await read_all(root)
    if refused is None:
        assert content == new, f"{story}: after a retry: {difference(content, new)}"
        return
    assert "refused" in str(refused), f"{story}: {refused}"
    poisoned = [node for node in root.graph.nodes.values() if node.poisoned]
    assert poisoned, f"{story}: {refused}"


async def reopened(disk: CrashingDisk, versions: Versions, story: str) -> None:
    """What is on the disk now is an image without corruption."""
    root = await take(disk.snapshot())
    expect(versions, await read_all(root), f"{story}: opened again")
    found = await check(root)
    assert not found.corruptions, f"{story}: opened again: {found.messages}"
    assert not found.check_errors, f"{story}: opened again: {found.messages}"
    await root.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, shape: str, error: int) -> None:
    async def main() -> None:
        disk, base = await prepared(**SHAPES[shape])
        full = error == errno.ENOSPC
        for nth in range(1, TRIES_MAX):
            partial = CLUSTER if full else 0
            if await fail_once(disk, name, nth, error, partial=partial, poisons=not full):
                assert nth > 1
                break
        else:
            pytest.fail("it never got through")
        assert base.position == 0, "the backing file was written to"

    run(main())


def test_opening() -> None:
    """An error while opening leaves nothing open, and the next try works."""

    async def main() -> None:
        disk, _base = await prepared(lazy_refcounts=True)
        for nth in range(1, TRIES_MAX):
            disk.fail(nth)
            try:
                root = await take(disk)
            except StorageError:
                disk.fail(0)
                continue
            assert disk.failures == 0
            disk.fail(0)
            await root.close()
            assert nth > 2
            return
        pytest.fail("it never got through")

    run(main())


async def create_small(disk: CrashingDisk) -> None:
    graph = Graph(REGISTRY)
    await create_image(graph, disk.name, "qcow2", {"cluster_size": 512}, size=SIZE)


def test_creating() -> None:
    """An error while creating surfaces, and what is left is no image or a valid one."""

    async def main() -> None:
        for nth in range(1, TRIES_MAX):
            disk = CrashingDisk()
            disk.fail(nth, errno.ENOSPC)
            raised = await outcome(create_small(disk))
            failed = disk.failures
            disk.fail(0)
            if raised is None:
                assert not failed
                assert nth > 2
                return
            assert raised.errno == errno.ENOSPC
            try:
                root = await take(disk)
            except BlockError:
                continue
            assert await read_all(root) == bytes(SIZE)
            assert not (await check(root)).corruptions
            await root.close()
        pytest.fail("it never got through")

    run(main())


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", ["make_empty", "change_backing", "repair"])
def test_maintenance(name: str, error: int) -> None:
    """Operations on the whole image: old or new, never between."""

    async def operation(root: Root) -> None:
        if name == "make_empty":
            await driver_of(root).make_empty()
        elif name == "change_backing":
            await forget_backing(root)
        else:
            found = await check(root, "leaks", "errors")
            if found.check_errors:
                # Told in the result, not raised.
                raise StorageError("\n".join(found.messages), error)
        await root.flush()

    async def main() -> None:
        start, base = await prepared()
        for nth in range(1, TRIES_MAX):
            disk = start.snapshot()
            root = await take(disk)
            old = await read_all(root)
            disk.fail(nth, error)
            raised = await outcome(operation(root))
            failed = disk.failures
            disk.fail(0)
            if not failed:
                assert raised is None
                await root.close()
                return
            assert raised is not None, f"{name}, request {nth} fails, and nobody was told"
            await read_all(root)
            try:
                await root.close()
            except BlockError:
                assert root.graph.nodes == {}
            root = await take(disk.snapshot(), backing={"driver": "raw", "file": file_of(base)})
            versions = Versions(old)
            versions.begin((b"".join([await base_content(base)]) + bytes(SIZE))[:SIZE])
            expect(versions, await read_all(root), f"{name}, request {nth} fails")
            found = await check(root)
            assert not found.corruptions, f"{name}, request {nth} fails: {found.messages}"
            await root.close()
        pytest.fail("it never got through")

    run(main())


def file_of(disk: CrashingDisk) -> dict[str, Any]:
    return {"driver": "crashing", "filename": disk.name}


async def base_content(disk: CrashingDisk) -> bytes:
    content = bytearray(disk.pages.size)
    disk.pages.read_into(0, memoryview(content))
    return bytes(content)
