"""`blk live backup-begin`: disks in use as they were at one instant, pushed to files or pulled.

1. All disks of one call have the same point in time, that of the call: one transaction begins it.
2. Push: the daemon writes the backup. Pull: the daemon serves the point in time over NBD, and keeps
   it up by saving what the guest is about to overwrite, until ``domjobabort``.
3. An incremental backup holds what changed since a checkpoint, in whatever layer it was recorded.
4. What belongs to a backup is called ``backup-DISK``: job, node, export and bitmap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from blocklayer.cli.live.checkpoint import added, layers_with
from blocklayer.cli.live.disks import Disk, Disks
from blocklayer.cli.live.following import Job, JobVerb, job_id
from blocklayer.cli.live.images import Images, file_options
from blocklayer.cli.live.nbd import export_uri, legacy_address, server_address
from blocklayer.cli.live.verb import absolute, pairs
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.errors import BlockError, UsageError
from blocklayer.qmp.client import Client, CommandFailed

_SPEC: Final = frozenset(("backup", "target", "scratch", "driver", "exportname"))
_NODE_NAME_MAX: Final = 31


class BackupDisk(msgspec.Struct, frozen=True, omit_defaults=True):
    """The backup of one disk: where it is written to, or where it can be read."""

    disk: str
    file: str
    uri: str | None = None
    bitmap: str | None = None
    """What to ask the server for as ``qemu:dirty-bitmap:BITMAP``: what changed."""


class BackupBegun(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``backup-begin`` began, or with --wait has done."""

    mode: str
    status: str
    disks: list[BackupDisk]
    checkpoint: str | None = None


class BackupBegin(JobVerb):
    """Back up disks while they are used, as they are now

    Push mode (the default) writes each disk to a file. Pull mode serves each disk over NBD as it
    is now, for a backup program to read, until `domjobabort`. All disks have the same instant.
    """

    EXAMPLE = (
        "--incremental monday --checkpoint tuesday --diskspec vda,target=/b/vda.tuesday --wait",
        "what changed on vda since monday; changes since now are recorded as tuesday",
    )

    mode: Annotated[
        str,
        Option("who moves the data (default push)", value="push|pull", choices=("push", "pull")),
    ] = "push"
    pull: Annotated[bool, Option("the same as --mode pull")] = False
    incremental: Annotated[
        str | None, Option("only what changed since this checkpoint", value="CHECKPOINT")
    ] = None
    checkpoint: Annotated[
        str | None, Option("record changes from this instant on under a name", value="NAME")
    ] = None
    server: Annotated[
        str | None,
        Option("pull: start an NBD server on unix:PATH or HOST:PORT", value="ADDRESS"),
    ] = None
    reuse_external: Annotated[bool, Option("the files exist; use them as they are")] = False
    diskspec: Annotated[
        list[str],
        Option(
            "a disk that takes part (default: all): target=PATH of the backup; driver=FORMAT of it "
            "(default qcow2); pull: scratch=PATH for what is saved, exportname=NAME; backup=no "
            "(repeatable)",
            value="DISK[,…]",
        ),
    ] = msgspec.field(default_factory=list)

    async def act(self, client: Client, operands: list[str]) -> int:
        pull = self.pull or self.mode == "pull"
        if self.server is not None and not pull:
            raise CommandLineError("--server is for --mode pull")
        chosen = self._chosen(await Disks.ask(client))
        begun = Begun(client, self.reuse_external)
        try:
            for disk, spec in chosen:
                await self._prepare(begun, disk, spec, pull)
            if self.checkpoint is not None:
                begun.actions += [added(disk.active, self.checkpoint) for disk, _ in chosen]
            await begun.start()
            if pull:
                await begun.serve(self.server, chosen)
            elif self.waits:
                await self._wait(client, begun)
        except BaseException:
            await begun.take_back(chosen, self.checkpoint)
            raise
        if self.waits and not pull:
            await begun.end()
        self._tell(begun, pull)
        return 0

    def _chosen(self, disks: Disks) -> list[tuple[Disk, dict[str, str]]]:
        specs = [pairs(text, _SPEC, "diskspec") for text in self.diskspec]
        specs = specs or [(disk.name, {}) for disk in disks if not disk.active.read_only]
        chosen = [(disks.find(name), spec) for name, spec in specs if spec.get("backup") != "no"]
        if not chosen:
            raise UsageError("No disk takes part in the backup")
        return chosen

    async def _prepare(self, begun: Begun, disk: Disk, spec: dict[str, str], pull: bool) -> None:
        """Make the target of one disk, and say what the transaction must do."""
        name, key = backup_name(disk.name), "scratch" if pull else "target"
        suffix = "scratch" if pull else str(int(time.time()))
        if key not in spec and not disk.active.filename.startswith("/"):
            raise UsageError(f"'{disk.name}' is no absolute path: say {key}=PATH in --diskspec")
        path = absolute(spec.get(key) or f"{disk.active.filename}.{suffix}")
        await begun.open(name, path, spec.get("driver", "qcow2"), disk, scratch=pull)
        data: dict[str, Any] = {
            "job-id": name, "device": disk.active.node, "target": name, "speed": self.speed,
            "sync": "none" if pull else "full", "auto-dismiss": False,
        }  # fmt: skip
        bitmap = None
        if self.incremental is not None:
            bitmap = name
            begun.actions += _merged(disk, self.incremental, name)
            if not pull:
                data |= {"sync": "bitmap", "bitmap": name, "bitmap-mode": "never"}
        begun.actions.append({"type": "blockdev-backup", "data": data})
        begun.jobs.append(name)
        exported = spec.get("exportname", disk.name)
        begun.disks.append((BackupDisk(disk.name, path, bitmap=bitmap), exported))

    async def _wait(self, client: Client, begun: Begun) -> None:
        totals: dict[str, tuple[int, int]] = {}
        for identifier in begun.jobs:
            async with Job(client, identifier) as job:

                async def work(told: Callable[[int, int], None], job: Job = job) -> str:
                    def sum_up(done: int, total: int) -> None:
                        totals[job.id] = (done, total)
                        told(*(sum(column) for column in zip(*totals.values(), strict=True)))

                    return await job.reaches(told=sum_up)

                await self.followed(job, work)

    def _tell(self, begun: Begun, pull: bool) -> None:
        status = "finished" if self.waits and not pull else "started"
        disks = [disk for disk, _ in begun.disks]
        lines = [f"Backup {status}"]
        for disk in disks:
            changed = f" (changes: qemu:dirty-bitmap:{disk.bitmap})" if disk.bitmap else ""
            lines.append(
                f"{disk.disk}: {disk.uri}{changed}" if disk.uri else f"{disk.disk}: {disk.file}"
            )
        if pull:
            lines.append("'domjobabort' ends it")
        result = BackupBegun("pull" if pull else "push", status, disks, self.checkpoint)
        self.tell(result, *lines)


class Begun:
    """One backup being begun: what was made for it, in order to take it back."""

    def __init__(self, client: Client, reuse: bool) -> None:
        self._client = client
        self._reuse = reuse
        self._images = Images(client)
        self.actions: list[dict[str, Any]] = []
        self.jobs: list[str] = []
        self.disks: list[tuple[BackupDisk, str]] = []
        self._server_started = False
        self._started = False

    async def open(self, name: str, path: str, driver: str, disk: Disk, *, scratch: bool) -> None:
        """Make and open the target called ``name``, or the scratch image over the disk."""
        if (await Disks.ask(self._client)).has_node(name):
            raise UsageError(f"'{disk.name}' has a backup already; 'domjobabort' ends it")
        if scratch and driver == "raw":
            raise UsageError("a scratch image shows the disk below it: it cannot be raw")
        if not self._reuse:
            await self._images.create(path, driver, disk.active.size)
        options: dict[str, Any] = {"driver": driver, "file": file_options(path)}
        if driver != "raw":
            options["backing"] = disk.active.node if scratch else None
        await self._images.add(name, options)

    async def start(self) -> None:
        """Begin, at one instant."""
        await self._client.execute("transaction", {"actions": self.actions})
        self._started = True

    async def serve(self, server: str | None, chosen: list[tuple[Disk, dict[str, str]]]) -> None:
        """Export every point in time; notes under which URI."""
        address = None
        if server is not None:
            address = server_address(server)
            try:
                await self._client.execute("nbd-server-start", {"addr": legacy_address(address)})
            except CommandFailed as error:
                if "already running" not in str(error):
                    raise
                raise UsageError(
                    "an NBD server is running already; without --server it is used"
                ) from None
            self._server_started = True
        for index, (backup, exported) in enumerate(self.disks):
            name = backup_name(backup.disk)
            options: dict[str, Any] = {
                "type": "nbd", "id": name, "node-name": name, "name": exported,
            }  # fmt: skip
            if backup.bitmap is not None:
                options["bitmaps"] = [{"node": chosen[index][0].active.node, "name": name}]
            try:
                await self._client.execute("block-export-add", options)
            except CommandFailed as error:
                if server is None and "not running" in str(error):
                    raise UsageError(
                        "no NBD server is running; start one with --server unix:PATH"
                    ) from None
                raise
            uri = export_uri(address, exported)
            self.disks[index] = (msgspec.structs.replace(backup, uri=uri), exported)

    async def end(self) -> None:
        """Close what the finished backup no longer needs; the files stay."""
        await end_backup(self._client, set(self.jobs))

    async def take_back(
        self, chosen: list[tuple[Disk, dict[str, str]]], checkpoint: str | None
    ) -> None:
        """Undo what was begun. The checkpoint goes as well: no backup holds its instant."""
        if self._started:
            await end_backup(self._client, set(self.jobs))
            for disk, _ in chosen if checkpoint is not None else ():
                try:
                    await self._client.execute(
                        "block-dirty-bitmap-remove", {"node": disk.active.node, "name": checkpoint}
                    )
                except BlockError:
                    # The error that brought us here says more.
                    pass
        if self._server_started:
            await self._client.execute("nbd-server-stop")
        await self._images.undo()


def backup_name(disk: str) -> str:
    """What everything is called that belongs to the backup of ``disk``."""
    return job_id("backup", disk)[:_NODE_NAME_MAX]


async def end_backup(client: Client, names: set[str]) -> list[str]:
    """End the backups of those names, finished or not, and close what is theirs; their jobs."""
    for export in await client.execute("query-block-exports"):
        if export["id"] in names and not export["shutting-down"]:
            await client.execute("block-export-del", {"id": export["id"], "mode": "hard"})
    ended: list[str] = []
    for entry in await client.execute("query-jobs"):
        if entry["id"] not in names:
            continue
        ended.append(entry["id"])
        async with Job(client, entry["id"]) as job:
            if entry["status"] != "concluded":
                await job.cancel(force=True)
            else:
                await client.execute("job-dismiss", {"id": job.id})
            job.keep()
    while any(e["id"] in names for e in await client.execute("query-block-exports")):
        await _moment()
    for node in await client.execute("query-named-block-nodes", {"flat": True}):
        if node["node-name"] in names:
            await client.execute("blockdev-del", {"node-name": node["node-name"]})
        for bitmap in node.get("dirty-bitmaps", ()):
            if bitmap.get("name") in names:
                await client.execute(
                    "block-dirty-bitmap-remove",
                    {"node": node["node-name"], "name": bitmap["name"]},
                )
    return ended


async def _moment() -> None:
    import asyncio

    await asyncio.sleep(0.02)


def _merged(disk: Disk, checkpoint: str, name: str) -> list[dict[str, Any]]:
    """A bitmap of what changed since ``checkpoint``, in all layers that recorded it."""
    layers = layers_with(disk, checkpoint)
    if not layers:
        raise UsageError(f"'{disk.name}' has no checkpoint '{checkpoint}'")
    sources = [{"node": layer.node, "name": checkpoint} for layer in layers]
    data = {"node": disk.active.node, "target": name, "bitmaps": sources}
    grain = next(b["granularity"] for b in layers[0].bitmaps if b.get("name") == checkpoint)
    begin = {"node": disk.active.node, "name": name, "disabled": True, "granularity": grain}
    return [
        {"type": "block-dirty-bitmap-add", "data": begin},
        {"type": "block-dirty-bitmap-merge", "data": data},
    ]
