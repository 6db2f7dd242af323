"""The crashing disk itself: it must lose what a real disk may lose, and nothing else."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from blocklayer.errors import StorageError
from blocklayer.graph.create import create_image
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.root import Root
from blocklayer.testing.crashing import CrashingDisk, State, registry
from drivers.opening import READ, RESIZE

SECTOR = 512


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


async def user(disk: CrashingDisk, *, taken: int = RESIZE) -> Root:
    flags = Flags(read_only=taken == READ, discard_unmap=True)
    node = await open_image(Graph(registry()), disk.name, format="raw", flags=flags)
    return Root(node, "a test", taken)


async def blank(sectors: int) -> CrashingDisk:
    disk = CrashingDisk()
    await create_image(Graph(registry()), disk.name, "raw", {"size": sectors * SECTOR})
    disk.settle()
    return disk


def content(state: State) -> bytes:
    view = bytearray(state.pages.size)
    state.pages.read_into(0, memoryview(view))
    return bytes(view)


def letters(state: State) -> str:
    """One letter a sector; a dot for zeros."""
    data = content(state)
    return "".join(chr(data[at] or ord(".")) for at in range(0, len(data), SECTOR))


def test_what_was_not_flushed_may_be_lost_or_torn() -> None:
    async def main() -> None:
        disk = await blank(4)
        root = await user(disk)
        await root.write(0, b"a" * 2 * SECTOR)
        await root.flush()
        await root.write(SECTOR, b"b" * 2 * SECTOR)
        await root.write(3 * SECTOR, b"c" * SECTOR)
        await root.close()
        assert [event.kind for event in disk.log] == ["write", "flush", "write", "write"]
        assert {letters(state) for state in disk.states(0)} == {"...."}
        assert {letters(state) for state in disk.states(1)} == {"aa..", "....", "a...", ".a.."}
        assert {letters(state) for state in disk.states(2)} == {"aa.."}
        assert {letters(state) for state in disk.states()} == {
            *("abbc", "aa..", "abb."),
            *("aa.c", "ab.c", "aabc"),
        }
        mixtures = {letters(state) for state in disk.random_states(200, seed=1)}
        assert mixtures == {
            first + last for first in ("abb", "aa.", "ab.", "aab") for last in ("c", ".")
        }
        again = [str(state) for state in disk.random_states(20, seed=1)]
        assert again == [str(state) for state in disk.random_states(20, seed=1)]

    run(main())


def test_zeros_discards_and_sizes_are_lost_as_well() -> None:
    async def main() -> None:
        disk = await blank(2)
        root = await user(disk)
        await root.write(0, b"a" * 2 * SECTOR)
        await root.flush()
        disk.settle()
        await root.write_zeroes(0, SECTOR)
        await root.discard(SECTOR, SECTOR)
        await root.truncate(3 * SECTOR)
        seen = {letters(state) for state in disk.states()}
        assert {"...", "aa", "a..", ".a.", ".."} == seen
        await root.close()

    run(main())


def test_a_flush_covers_only_what_had_ended() -> None:
    """Two requests in flight together: the flush that began meanwhile promises nothing of them."""

    async def main() -> None:
        disk = await blank(1)
        disk.concurrent = True
        root = await user(disk)
        await asyncio.gather(root.write(0, b"a" * SECTOR), root.flush())
        assert {letters(state) for state in disk.states()} == {"a", "."}
        await root.flush()
        assert {letters(state) for state in disk.states()} == {"a"}
        await root.close()

    run(main())


def test_a_state_is_a_disk() -> None:
    async def main() -> None:
        disk = await blank(2)
        root = await user(disk)
        await root.write(0, b"a" * SECTOR)
        await root.close()
        after = next(disk.states()).disk()
        root = await user(after)
        assert await root.read(0, 1) == b"a"
        await root.write(0, b"b")
        await root.close()
        assert next(disk.states(1)).pages.size == 2 * SECTOR
        assert disk.position == after.position == 1

    run(main())


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_nth_request_fails(number: int) -> None:
    async def main() -> None:
        disk = await blank(4)
        root = await user(disk)
        disk.fail(3, number, kinds={"write", "flush"}, partial=100)
        await root.write(0, b"a" * SECTOR)
        await root.flush()
        await root.read(0, SECTOR)
        with pytest.raises(StorageError, match="write at 0x200 of 'crashing:") as caught:
            await root.write(SECTOR, b"b" * SECTOR)
        assert caught.value.errno == number
        assert disk.failures == 1
        assert await root.read(SECTOR, SECTOR) == b"b" * 100 + bytes(SECTOR - 100)
        await root.write(SECTOR, b"c" * SECTOR)
        await root.flush()
        assert {letters(state) for state in disk.states()} == {"ac.."}
        await root.close()

    run(main())


def test_all_requests_fail_from_the_nth_on() -> None:
    async def main() -> None:
        disk = await blank(4)
        root = await user(disk)
        disk.fail(2, kinds={"read"}, repeat=True)
        await root.read(0, 1)
        for _ in range(3):
            with pytest.raises(StorageError, match="read at 0x0"):
                await root.read(0, 1)
        assert disk.failures == 3
        disk.fail(0)
        assert await root.read(0, 1) == b"\0"
        await root.close()

    run(main())


@pytest.mark.parametrize("poisons", [True, False])
def test_a_failed_flush_makes_nothing_durable(poisons: bool) -> None:
    async def main() -> None:
        disk = await blank(1)
        disk.poisons = poisons
        root = await user(disk)
        await root.write(0, b"a" * SECTOR)
        disk.fail(1, kinds={"flush"})
        with pytest.raises(StorageError, match="flush"):
            await root.flush()
        assert {letters(state) for state in disk.states()} == {"a", "."}
        if poisons:
            with pytest.raises(StorageError, match="refused"):
                await root.write(0, b"b")
        else:
            await root.flush()
            assert {letters(state) for state in disk.states()} == {"a"}
        await root.close()

    run(main())
