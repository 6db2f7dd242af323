"""Backups."""

from __future__ import annotations

from blocklayer.daemon import backups
from blocklayer.daemon.backups import BlockdevBackup, DriveBackup
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor


@COMMANDS.command("blockdev-backup")
async def blockdev_backup(monitor: Monitor, arguments: BlockdevBackup) -> None:
    """Copy what a node holds at this moment to another node, while it stays in use."""
    await backups.blockdev_backup(monitor.server.daemon, arguments)


@COMMANDS.command("drive-backup", features=("deprecated",))
async def drive_backup(monitor: Monitor, arguments: DriveBackup) -> None:
    """Copy what a node holds at this moment to a file, while it stays in use."""
    await backups.drive_backup(monitor.server.daemon, arguments)
