"""Dirty bitmaps at run time: added, removed, cleared, switched, merged, on their own or together.

1. Each takes effect with nobody inside the node: in a transaction, at the instant of all the rest.
2. A bitmap that a transaction removes is busy until it is gone, and its name is taken until then.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType

from blocklayer.daemon import actions
from blocklayer.daemon.actions import Action
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import UsageError
from blocklayer.graph import bitmaps
from blocklayer.graph.bits import Bits
from blocklayer.graph.dirty_bitmap import DirtyBitmap, check_granularity
from blocklayer.graph.node import Node

UInt32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class BlockDirtyBitmap(actions.Options):
    """A bitmap, by its node's name (or a device's) and its own."""

    node: str
    name: str


class BlockDirtyBitmapAdd(actions.Options):
    """A new bitmap; ``granularity`` in bytes. ``persistent``: kept in the image; ``disabled``: does
    not record.
    """

    node: str
    name: str
    granularity: UInt32 | UnsetType = UNSET
    persistent: bool = False
    disabled: bool = False


class BlockDirtyBitmapMerge(actions.Options):
    """``target`` of ``node`` takes up the ``bitmaps``: of the same node by name, or of any."""

    node: str
    target: str
    bitmaps: list[str | BlockDirtyBitmap]


def _node(daemon: Daemon, name: str) -> Node:
    try:
        return daemon.find(name)
    except UsageError:
        raise UsageError(f"Node '{name}' not found") from None


def find(daemon: Daemon, node: str, name: str) -> DirtyBitmap:
    """The bitmap ``name`` of ``node``. Raises UsageError, or StorageError (ENOENT)."""
    return bitmaps.find(_node(daemon, node), name)


class Add(Action):
    """``block-dirty-bitmap-add``."""

    NAME = "block-dirty-bitmap-add"
    Options = BlockDirtyBitmapAdd
    options: BlockDirtyBitmapAdd
    _made: DirtyBitmap | None = None

    async def prepare(self) -> None:
        """Find the node."""
        self.nodes = [self.pin(self.daemon.find(self.options.node))]

    async def change(self) -> None:
        """Add it: from here on it hears of writes."""
        options = self.options
        granularity = None if options.granularity is UNSET else options.granularity
        if granularity is not None:
            check_granularity(granularity)
        self._made = bitmaps.add(
            self.nodes[0], options.name, granularity=granularity, persistent=options.persistent,
            enabled=not options.disabled,
        )  # fmt: skip

    async def undo(self) -> None:
        """Nothing of it is in the image yet."""
        if self._made is not None:
            bitmaps.detach(self._made)


class _OfOne(Action):
    """What is done to one bitmap that is there."""

    Options = BlockDirtyBitmap
    options: BlockDirtyBitmap

    async def prepare(self) -> None:
        """Find the node."""
        self.nodes = [self.pin(_node(self.daemon, self.options.node))]

    def _find(self) -> DirtyBitmap:
        return bitmaps.find(self.nodes[0], self.options.name)


class Remove(_OfOne):
    """``block-dirty-bitmap-remove``."""

    NAME = "block-dirty-bitmap-remove"
    _gone: DirtyBitmap | None = None
    _committed = False

    async def change(self) -> None:
        """Keep everybody off it."""
        bitmap = self._find()
        bitmaps.check_removable(bitmap)
        bitmap.users += 1
        self._gone = bitmap

    def commit(self) -> None:
        """Nobody can find it any more."""
        assert self._gone is not None
        bitmaps.detach(self._gone)
        self._committed = True

    async def undo(self) -> None:
        """It stays."""
        if self._gone is not None:
            self._gone.users -= 1

    async def clean(self) -> None:
        """Take it out of its image. Until then, or if that fails, it is marked there as in use, and
        of no use to anybody.
        """
        # An image that became read-only meanwhile has stored what bitmaps there are.
        if self._gone is not None and self._committed and not self._gone.node.read_only:
            await bitmaps.erase(self._gone)


class Clear(_OfOne):
    """``block-dirty-bitmap-clear``."""

    NAME = "block-dirty-bitmap-clear"
    _before: tuple[DirtyBitmap, Bits] | None = None

    async def change(self) -> None:
        """Nothing is dirty."""
        bitmap = self._find()
        bitmap.check()
        await bitmap.load()
        self._before = bitmap, bitmap.clear()

    async def undo(self) -> None:
        """What was dirty is dirty."""
        if self._before is not None:
            bitmap, bits = self._before
            bitmap.restore(bits)


class _Switch(_OfOne):
    enables: ClassVar[bool]
    _before: tuple[DirtyBitmap, bool] | None = None

    async def change(self) -> None:
        """From here on it records, or does not."""
        bitmap = self._find()
        was = bitmap.enabled
        _switch(bitmap, self.enables)
        self._before = bitmap, was

    async def undo(self) -> None:
        """As it was."""
        if self._before is not None:
            _switch(*self._before)


def _switch(bitmap: DirtyBitmap, enabled: bool) -> None:
    if enabled:
        bitmap.enable()
    else:
        bitmap.disable()


class Enable(_Switch):
    """``block-dirty-bitmap-enable``."""

    NAME = "block-dirty-bitmap-enable"
    enables = True


class Disable(_Switch):
    """``block-dirty-bitmap-disable``."""

    NAME = "block-dirty-bitmap-disable"
    enables = False


class Merge(Action):
    """``block-dirty-bitmap-merge``."""

    NAME = "block-dirty-bitmap-merge"
    Options = BlockDirtyBitmapMerge
    options: BlockDirtyBitmapMerge
    _before: tuple[DirtyBitmap, Bits] | None = None

    async def prepare(self) -> None:
        """Find the nodes; the bitmaps may be made by actions before this one."""
        names = [self.options.node]
        names += [each.node for each in self.options.bitmaps if not isinstance(each, str)]
        self.nodes = [self.pin(_node(self.daemon, name)) for name in dict.fromkeys(names)]

    async def change(self) -> None:
        """Add all of them at once."""
        target = find(self.daemon, self.options.node, self.options.target)
        sources = [
            find(self.daemon, self.options.node, each)
            if isinstance(each, str)
            else find(self.daemon, each.node, each.name)
            for each in self.options.bitmaps
        ]
        target.check()
        await bitmaps.load((target, *sources))
        self._before = target, target.merge(*sources)

    async def undo(self) -> None:
        """What was dirty is dirty, and no more."""
        if self._before is not None:
            bitmap, bits = self._before
            bitmap.restore(bits)


async def block_dirty_bitmap_add(daemon: Daemon, options: BlockDirtyBitmapAdd) -> None:
    """A new bitmap."""
    await actions.carry_out(daemon, [Add(daemon, options)])


async def block_dirty_bitmap_remove(daemon: Daemon, options: BlockDirtyBitmap) -> None:
    """Drop a bitmap, from its image as well."""
    await actions.carry_out(daemon, [Remove(daemon, options)])


async def block_dirty_bitmap_clear(daemon: Daemon, options: BlockDirtyBitmap) -> None:
    """Nothing is dirty any more."""
    await actions.carry_out(daemon, [Clear(daemon, options)])


async def block_dirty_bitmap_enable(daemon: Daemon, options: BlockDirtyBitmap) -> None:
    """Record what is written."""
    await actions.carry_out(daemon, [Enable(daemon, options)])


async def block_dirty_bitmap_disable(daemon: Daemon, options: BlockDirtyBitmap) -> None:
    """Record no more."""
    await actions.carry_out(daemon, [Disable(daemon, options)])


async def block_dirty_bitmap_merge(daemon: Daemon, options: BlockDirtyBitmapMerge) -> None:
    """Add what other bitmaps have."""
    await actions.carry_out(daemon, [Merge(daemon, options)])


async def sha256(daemon: Daemon, options: BlockDirtyBitmap) -> str:
    """The hash of a bitmap's bits, for tests."""
    bitmap = find(daemon, options.node, options.name)
    await bitmap.load()
    return bitmap.sha256()
