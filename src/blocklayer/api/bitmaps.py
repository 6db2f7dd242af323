"""The dirty bitmaps of a disk: what has changed since they were added or cleared.

    disk.bitmaps.add("monday")              # kept in the image from now on
    ...                                           # writes
    for offset, length in await disk.bitmaps.dirty("monday"): ...

1. Errors are those of the storage daemon's commands; an unknown name is a StorageError (ENOENT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.graph import bitmaps
from blocklayer.graph.dirty_bitmap import BlockDirtyInfo

if TYPE_CHECKING:
    from blocklayer.api.disk import Disk
    from blocklayer.graph.root import Root


class Bitmaps:
    """The bitmaps of one disk, by name."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def names(self) -> list[str]:
        """All names, oldest first."""
        return [*self._root.node.dirty_bitmaps]

    async def query(self) -> list[BlockDirtyInfo]:
        """What is known of each, newest first."""
        return await bitmaps.listed(self._root.node)

    def add(
        self,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = True,
        enabled: bool = True,
    ) -> None:
        """A new bitmap; one bit stands for ``granularity`` bytes, a power of two.

        One that is not ``persistent`` is gone when the disk is closed.
        """
        bitmaps.add(
            self._root.node, name, granularity=granularity, persistent=persistent, enabled=enabled
        )

    async def remove(self, name: str) -> None:
        """Drop it, from the image as well."""
        await bitmaps.remove(bitmaps.find(self._root.node, name))

    def clear(self, name: str) -> None:
        """Nothing counts as changed so far."""
        bitmaps.find(self._root.node, name).clear()

    def enable(self, name: str) -> None:
        """Record what is written from now on."""
        bitmaps.find(self._root.node, name).enable()

    def disable(self, name: str) -> None:
        """Record no more."""
        bitmaps.find(self._root.node, name).disable()

    async def merge(self, name: str, *sources: str, of: Disk | None = None) -> None:
        """What any of ``sources``, bitmaps of this disk or ``of`` another, calls changed is so in
        ``name``; all of them or none.
        """
        target = bitmaps.find(self._root.node, name)
        where = self._root.node if of is None else of.root.node
        merged = [bitmaps.find(where, source) for source in sources]
        await bitmaps.load(merged)
        target.merge(*merged)

    async def dirty(
        self, name: str, offset: int = 0, length: int | None = None
    ) -> list[tuple[int, int]]:
        """The changed parts (offset, length) of the range, in order, in bytes."""
        found = bitmaps.find(self._root.node, name)
        found.check(busy=True, read_only=True)
        await found.load()
        return [*found.runs(offset, None if length is None else offset + length)]
