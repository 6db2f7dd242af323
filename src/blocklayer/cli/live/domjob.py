"""`blk live domjobinfo`, `domjobabort`: the backups under way."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from blocklayer.cli.live.backup import backup_name, end_backup
from blocklayer.cli.live.verb import Verb
from blocklayer.cli.options import Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client
from blocklayer.units import format_size


class BackupJob(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a backup is, in bytes."""

    job: str
    status: str
    processed: int
    total: int
    error: str | None = None


class DomJobInfo(Verb):
    """Show the backups under way, and those that have ended and were not yet cleared away"""

    async def act(self, client: Client, operands: list[str]) -> int:
        jobs = [
            BackupJob(
                entry["id"], entry["status"], entry["current-progress"], entry["total-progress"],
                entry.get("error"),
            )
            for entry in await _backups(client)
        ]  # fmt: skip
        lines = [
            f"{job.job}: {job.status}, {format_size(job.processed)} of {format_size(job.total)}"
            + (f" ({job.error})" if job.error else "")
            for job in jobs
        ]
        self.tell(jobs, *(lines or ["No backup"]))
        return 0


class DomJobAbort(Verb):
    """End backups: stop serving those that are pulled, cancel those that are pushed

    What a finished one has left open is closed. Files stay.
    """

    OPERANDS = (("[DISK…]", "the disks whose backups end (default: all)"),)

    stop_server: Annotated[bool, Option("stop the NBD server, with all it serves")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        names = {entry["id"] for entry in await _backups(client)}
        if operands:
            asked = {backup_name(disk) for disk in operands}
            if asked - names:
                raise UsageError(f"There is no backup '{sorted(asked - names)[0]}'")
            names = asked
        ended = await end_backup(client, names)
        if self.stop_server:
            await client.execute("nbd-server-stop")
        self.tell({"ended": ended}, *(f"Backup '{name}' ended" for name in ended))
        return 0


async def _backups(client: Client) -> list[dict[str, Any]]:
    return [
        entry
        for entry in await client.execute("query-jobs")
        if entry["type"] == "backup" and entry["id"].startswith("backup-")
    ]
