"""Dirty bitmaps: their algebra against sets of bytes, and that nothing written goes unheard."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.errors import BlockError, LockedError, StorageError, UsageError
from blocklayer.graph import bitmaps
from blocklayer.graph.dirty_bitmap import MAX_BITS, DirtyBitmap
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.crashing import CrashingDisk, registry
from blocklayer.testing.strategies import Shape, request_lists
from proof.chains import run
from proof.crashes import new_image, take

KIB = 1024
SIZE = 20 * KIB + 300


async def opened(size: int = SIZE, **options: Any) -> Root:
    disk = CrashingDisk()
    disk.pages.write(0, bytes(size))
    disk.settle()
    node = await open_image(
        Graph(registry()),
        {"driver": "raw", "file": {"driver": "crashing", "filename": disk.name}, **options},
        flags=Flags(read_only=False, discard_unmap=True),
    )
    taken = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
    return Root(node, "a test", int(taken))


def covered(bitmap: DirtyBitmap) -> set[int]:
    """The sectors that the bitmap's runs touch."""
    return {
        sector
        for offset, length in bitmap.runs()
        for sector in range(offset // 512, (offset + length + 511) // 512)
    }


def granules(sectors: set[int], granularity: int, size: int) -> set[int]:
    """All sectors of the granules that ``sectors`` are in."""
    per = granularity // 512
    whole = {
        first + at for sector in sectors for first in [sector // per * per] for at in range(per)
    }
    return {sector for sector in whole if sector * 512 < size}


KINDS = ("write", "write", "write", "clear", "enable", "disable", "freeze", "abdicate", "reclaim")
KINDS += ("merge", "resize", "set", "reset", "undo")
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.integers(0, 40), st.integers(1, 12)),
    max_size=20,
)


class Model:
    """What one bitmap must hold, as a set of sectors."""

    def __init__(self, granularity: int) -> None:
        self.granularity = granularity
        self.dirty: set[int] = set()
        self.successor: set[int] | None = None
        self.enabled = True

    def write(self, sectors: set[int], size: int) -> None:
        if self.enabled:
            whole = granules(sectors, self.granularity, size)
            if self.successor is None:
                self.dirty |= whole
            else:
                self.successor |= whole


@settings(deadline=None, max_examples=150)
@given(OPERATIONS)
def test_algebra(operations: list[tuple[str, int, int, int]]) -> None:
    async def main() -> None:
        root = await opened()
        node = root.node
        models = [Model(512), Model(1024), Model(4096)]
        made = [
            bitmaps.add(node, f"b{index}", granularity=model.granularity)
            for index, model in enumerate(models)
        ]
        for kind, which, at, count in operations:
            await step(root, made, models, kind, which, at, count)
            for bitmap, model in zip(made, models, strict=True):
                assert covered(bitmap) == model.dirty, (kind, which, at, count)
                assert bitmap.busy == (model.successor is not None)
                assert bitmap.info().recording == model.enabled
                number = len({sector * 512 // model.granularity for sector in model.dirty})
                assert bitmap.count == number * model.granularity
        await root.close()

    run(main())


async def step(
    root: Root, made: list[DirtyBitmap], models: list[Model], kind: str, which: int, at: int, n: int
) -> None:
    size = root.node.size
    bitmap, model = made[which], models[which]
    first = min(at, max(0, size // 512 - 1))
    sectors = {sector for sector in range(first, first + n) if (sector + 1) * 512 <= size}
    place = first * 512, len(sectors) * 512
    if kind == "write":
        await root.write(place[0], b"x" * place[1])
        for each in models:
            each.write(sectors, size)
        return
    if kind == "resize":
        if any(each.busy for each in made):
            with pytest.raises(LockedError):
                await root.truncate(5000, shrink=True)
            return
        new = (at + 1) * 512
        await root.truncate(new, shrink=True)
        for each in models:
            each.dirty = {sector for sector in each.dirty if sector * 512 < new}
            each.dirty = granules(each.dirty, each.granularity, new)
            if new > size and each.enabled:
                grown = set(range(size // 512, (new + 511) // 512))
                each.dirty |= granules(grown, each.granularity, new)
        return
    if kind in ("abdicate", "reclaim"):
        if model.successor is None:
            return
        if kind == "abdicate":
            bitmap.abdicate()
            model.dirty = model.successor
        else:
            bitmap.reclaim()
            model.dirty |= model.successor
        model.successor = None
        return
    if kind in ("set", "reset"):
        if kind == "set":
            bitmap.set_dirty(*place)
            model.dirty |= granules(sectors, model.granularity, size)
        else:
            bitmap.reset_dirty(*place)
            model.dirty -= {
                sector
                for sector in sectors
                if granules({sector}, model.granularity, size) <= sectors
            }
        return
    if model.successor is not None:
        with pytest.raises(LockedError, match="in use by another operation"):
            await change(bitmap, made, models, kind, which)
        return
    await change(bitmap, made, models, kind, which)


async def change(
    bitmap: DirtyBitmap, made: list[DirtyBitmap], models: list[Model], kind: str, which: int
) -> None:
    model, size = models[which], bitmap.node.size
    if kind == "clear":
        bitmap.clear()
        model.dirty = set()
    elif kind == "undo":
        bitmap.restore(bitmap.clear())
    elif kind == "enable":
        bitmap.enable()
        model.enabled = True
    elif kind == "disable":
        bitmap.disable()
        model.enabled = False
    elif kind == "freeze":
        bitmap.freeze()
        model.successor = set()
    else:
        others = [index for index in range(3) if index != which]
        before = bitmap.bits.copy()
        if any(models[index].successor is not None for index in others):
            with pytest.raises(LockedError):
                bitmap.merge(*[made[index] for index in others])
            assert bitmap.bits.data == before.data
            bitmap.check()
            return
        backup = bitmap.merge(*[made[index] for index in others])
        assert backup.data == before.data
        for index in others:
            model.dirty |= granules(models[index].dirty, model.granularity, size)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_nothing_written_goes_unheard(data: st.DataObject) -> None:
    """Whatever requests do, failing ones included, what they changed is dirty."""
    requests = data.draw(request_lists(Shape(size=40 * KIB, cluster_size=512), most=12))
    fails = data.draw(st.integers(0, 12))

    async def main() -> None:
        disk = await new_image(40 * KIB)
        root = await take(disk)
        await root.write(0, b"o" * 9 * KIB)
        bitmap = bitmaps.add(root.node, "b", granularity=512)
        before = await read_all(root)
        for number, request in enumerate(requests):
            if number == fails:
                disk.fail(2, errno.EIO, kinds=("write", "zero", "discard"))
            with suppress(BlockError):
                await apply(root, request)
            after = await read_all(root)
            dirty = covered(bitmap)
            for sector in range(80):
                part = slice(sector * 512, sector * 512 + 512)
                assert sector in dirty or before[part] == after[part], (sector, request)
        with suppress(BlockError):
            await root.close()

    run(main())


def test_a_failed_write_counts_as_a_change() -> None:
    async def main() -> None:
        disk = await new_image(40 * KIB)
        root = await take(disk)
        await root.write(0, b"x" * 512)
        bitmap = bitmaps.add(root.node, "b", granularity=512)
        disk.fail(1, errno.EIO)
        with pytest.raises(StorageError):
            await root.write(0, b"y" * 512)
        assert list(bitmap.runs()) == [(0, 512)]
        await root.close()

    run(main())


def test_nodes_below_can_be_watched_as_well() -> None:
    async def main() -> None:
        disk = await new_image(40 * KIB)
        root = await take(disk)
        storage = root.node.children["file"].node
        bitmap = bitmaps.add(storage, "below", granularity=512)
        await root.write(0, b"x" * 5000)
        await root.flush()
        assert bitmap.count >= 5000
        await root.close()

    run(main())


def test_what_is_refused() -> None:
    async def main() -> None:
        root = await opened()
        node = root.node
        bitmap = bitmaps.add(node, "b")
        assert bitmap.granularity == 64 * KIB
        for name, granularity, message in (
            ("", 512, "name cannot be empty"),
            ("b", 512, "already exists: b"),
            ("x" * 1024, 512, "name too long"),
            ("c", 1000, "power of 2"),
            ("c", 256, "power of 2"),
            ("c", 1 << 32, "power of 2"),
        ):
            with pytest.raises(UsageError, match=message):
                bitmaps.add(node, name, granularity=granularity)
        with pytest.raises(BlockError, match="Can't store persistent bitmaps"):
            bitmaps.add(node, "c", persistent=True)
        with pytest.raises(StorageError, match="Dirty bitmap 'c' not found") as failure:
            bitmaps.find(node, "c")
        assert failure.value.errno == errno.ENOENT
        other = await opened(SIZE + 512)
        longer = bitmaps.add(other.node, "b")
        with pytest.raises(UsageError, match="different sizes"):
            bitmap.merge(longer)
        bitmap.users += 1
        for act in (bitmap.clear, bitmap.enable, bitmap.disable, bitmap.freeze):
            with pytest.raises(LockedError, match="in use by another operation"):
                act()
        with pytest.raises(LockedError):
            await bitmaps.remove(bitmap)
        bitmap.users -= 1
        await bitmaps.remove(bitmap)
        assert not node.watchers
        assert not node.dirty_bitmaps
        await root.close()
        await other.close()

    run(main())


def test_a_bitmap_takes_no_more_memory_than_an_image_could_hold() -> None:
    async def main() -> None:
        node = await open_image(
            Graph(registry()), {"driver": "null-co", "size": (MAX_BITS + 1) * 512}
        )
        with pytest.raises(UsageError, match="Use larger granularity"):
            bitmaps.add(node, "b", granularity=512)
        assert bitmaps.add(node, "b", granularity=1 << 31).count == 0

    run(main())
