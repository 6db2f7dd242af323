"""Dirty bitmaps."""

from __future__ import annotations

from blocklayer.daemon import bitmaps
from blocklayer.daemon.bitmaps import (
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
)
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Result


class BlockDirtyBitmapSha256(Result):
    """The hash of a bitmap's bits."""

    sha256: str


@COMMANDS.command("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(monitor: Monitor, arguments: BlockDirtyBitmapAdd) -> None:
    """Record from now on which parts of a node are written to."""
    await bitmaps.block_dirty_bitmap_add(monitor.server.daemon, arguments)


@COMMANDS.command("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(monitor: Monitor, arguments: BlockDirtyBitmap) -> None:
    """Drop a bitmap, from its image as well."""
    await bitmaps.block_dirty_bitmap_remove(monitor.server.daemon, arguments)


@COMMANDS.command("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(monitor: Monitor, arguments: BlockDirtyBitmap) -> None:
    """Forget what was written so far."""
    await bitmaps.block_dirty_bitmap_clear(monitor.server.daemon, arguments)


@COMMANDS.command("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(monitor: Monitor, arguments: BlockDirtyBitmap) -> None:
    """Let a bitmap record."""
    await bitmaps.block_dirty_bitmap_enable(monitor.server.daemon, arguments)


@COMMANDS.command("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(monitor: Monitor, arguments: BlockDirtyBitmap) -> None:
    """Let a bitmap stay as it is, whatever is written."""
    await bitmaps.block_dirty_bitmap_disable(monitor.server.daemon, arguments)


@COMMANDS.command("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(monitor: Monitor, arguments: BlockDirtyBitmapMerge) -> None:
    """Add what other bitmaps have to a bitmap."""
    await bitmaps.block_dirty_bitmap_merge(monitor.server.daemon, arguments)


@COMMANDS.command("x-debug-block-dirty-bitmap-sha256", features=("unstable",))
async def x_debug_block_dirty_bitmap_sha256(
    monitor: Monitor, arguments: BlockDirtyBitmap
) -> BlockDirtyBitmapSha256:
    """The hash of a bitmap's bits."""
    return BlockDirtyBitmapSha256(sha256=await bitmaps.sha256(monitor.server.daemon, arguments))
