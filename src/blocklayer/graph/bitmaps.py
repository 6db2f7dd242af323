"""The dirty bitmaps of a node: added, found, removed, merged across nodes.

1. Everything that can be refused is refused before anything has changed.
2. A persistent bitmap is in its image, marked as in use, from its first store on; removing it takes
   it out of the image at once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.dirty_bitmap import (
    MAX_NAME_SIZE,
    BlockDirtyInfo,
    DirtyBitmap,
    check_granularity,
)
from blocklayer.graph.node import Node
from blocklayer.units import KIB

_LEAST_DEFAULT: Final = 4 * KIB
_MOST_DEFAULT: Final = 64 * KIB


def default_granularity(node: Node) -> int:
    """The cluster size, within limits; 64 KiB where there are no clusters."""
    info = node.driver.info()
    cluster_size = info.cluster_size if info else 0
    return min(max(cluster_size or _MOST_DEFAULT, _LEAST_DEFAULT), _MOST_DEFAULT)


def add(
    node: Node,
    name: str,
    *,
    granularity: int | None = None,
    persistent: bool = False,
    enabled: bool = True,
) -> DirtyBitmap:
    """A new bitmap, nothing in it dirty. Raises UsageError or UnsupportedError."""
    granularity = granularity or default_granularity(node)
    if not name:
        raise UsageError("Bitmap name cannot be empty")
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_SIZE:
        raise UsageError(f"Bitmap name too long: {name}")
    if name in node.dirty_bitmaps:
        raise UsageError(f"Bitmap already exists: {name}")
    check_granularity(granularity)
    if persistent:
        node.check_writable()
        node.driver.check_bitmap_storable(name, granularity)
    bitmap = DirtyBitmap(node, name, granularity, enabled=enabled, persistent=persistent)
    bitmap.modified = True
    attach(bitmap)
    return bitmap


def attach(bitmap: DirtyBitmap) -> None:
    """Let a bitmap that has a name be listed, and hear of writes."""
    assert bitmap.name
    bitmap.node.dirty_bitmaps[bitmap.name] = bitmap
    bitmap.node.watch(bitmap)


def find(node: Node, name: str) -> DirtyBitmap:
    """The bitmap called ``name``. Raises StorageError (ENOENT)."""
    found = node.dirty_bitmaps.get(name)
    if found is None:
        raise StorageError(f"Dirty bitmap '{name}' not found", errno.ENOENT)
    return found


async def remove(bitmap: DirtyBitmap) -> None:
    """Drop a bitmap, from its image as well. One that is inconsistent may be dropped, too.

    A transaction does it in steps: ``check_removable``, ``detach``, and ``erase`` when all else has
    worked.
    """
    check_removable(bitmap)
    await erase(bitmap)
    detach(bitmap)


def check_removable(bitmap: DirtyBitmap) -> None:
    """Raise LockedError, UsageError or StorageError unless ``remove`` may drop it."""
    if not bitmap.inconsistent:
        bitmap.check()
    if bitmap.persistent:
        bitmap.node.check_writable()


async def erase(bitmap: DirtyBitmap) -> None:
    """Take a bitmap out of its image, if it may be there."""
    assert bitmap.name
    if bitmap.persistent:
        await bitmap.node.driver.remove_stored_bitmap(bitmap.name)


def detach(bitmap: DirtyBitmap) -> None:
    """Take a bitmap off its node; its image is left alone."""
    assert bitmap.name
    del bitmap.node.dirty_bitmaps[bitmap.name]
    bitmap.node.unwatch(bitmap)


async def load(bitmaps: Iterable[DirtyBitmap]) -> None:
    """Read the bits of those that were not read yet."""
    for bitmap in bitmaps:
        if not bitmap.inconsistent:
            await bitmap.load()


async def listed(node: Node) -> list[BlockDirtyInfo]:
    """What is known of all bitmaps, newest first, as ``query-named-block-nodes`` has it."""
    await load(node.dirty_bitmaps.values())
    return [bitmap.info() for bitmap in reversed(node.dirty_bitmaps.values())]
