"""Snapshots, external and internal."""

from __future__ import annotations

from blocklayer.daemon import snapshots
from blocklayer.daemon.snapshots import (
    BlockdevSnapshot,
    BlockdevSnapshotDeleteInternal,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
)
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor


@COMMANDS.command("blockdev-snapshot", features=("allow-write-only-overlay",))
async def blockdev_snapshot(monitor: Monitor, arguments: BlockdevSnapshot) -> None:
    """Let a node that is there already become the overlay of another."""
    await snapshots.blockdev_snapshot(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(monitor: Monitor, arguments: BlockdevSnapshotSync) -> None:
    """Make an overlay, and let it take the place of a node."""
    await snapshots.blockdev_snapshot_sync(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(
    monitor: Monitor, arguments: BlockdevSnapshotInternal
) -> None:
    """Keep the state of a disk in its image."""
    await snapshots.blockdev_snapshot_internal_sync(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    monitor: Monitor, arguments: BlockdevSnapshotDeleteInternal
) -> SnapshotInfo:
    """Drop a state that an image keeps; returns what was known of it."""
    return await snapshots.blockdev_snapshot_delete_internal_sync(monitor.server.daemon, arguments)
