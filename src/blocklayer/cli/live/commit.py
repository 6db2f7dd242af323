"""`blk live blockcommit`: layers of a disk in use, moved down into one below them.

1. Bitmaps that only the upper layers have are merged into the base before the job takes effect, so
   that incremental backups go on. (What the base has recorded stays; the commit's own writes are
   recorded there as well, which may claim too much and never too little.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from blocklayer.cli.live.disks import Disk, Layer
from blocklayer.cli.live.following import Job, JobVerb, job_id
from blocklayer.cli.live.images import check_deletable, drop_layers
from blocklayer.cli.live.verb import DISK, Done, find_disk
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client


class BlockCommit(JobVerb):
    """Move what upper layers hold down into a layer below, while the disk is used

    Without --base and --top the whole chain is merged into its lowest layer. Layers are named
    by node, by file name, or as DISK[DEPTH]. The active layer is committed in two steps: copy,
    then --pivot (the base becomes the active layer) or --keep-overlay (the disk stays where it is).
    """

    OPERANDS = (DISK, ("[RATE]", "the same as --bandwidth RATE"))
    EXAMPLE = ("disk0 --active --pivot", "disk0 consists of its lowest layer alone, up to date")

    base: Annotated[
        str | None, Option("the layer that takes the data (default: the lowest)", value="LAYER")
    ] = None
    top: Annotated[
        str | None,
        Option("the uppermost layer to move (default: the active one)", value="LAYER"),
    ] = None
    shallow: Annotated[bool, Option("the base is the layer just below the top")] = False
    active: Annotated[bool, Option("the active layer is meant to be moved")] = False
    pivot: Annotated[
        bool, Option("move the active layer, wait, and make the base the active layer")
    ] = False
    keep_overlay: Annotated[
        bool, Option("move the active layer, wait, and leave the disk on its overlay")
    ] = False
    delete: Annotated[bool, Option("delete the files of layers that are merged (waits)")] = False
    keep_relative: Annotated[
        bool, Option("write the base's name as it stands in the lowest layer moved")
    ] = False

    @property
    def waits(self) -> bool:
        """The second step needs somebody who waits for the first; so does deleting."""
        return super().waits or self.pivot or self.keep_overlay or self.delete

    async def act(self, client: Client, operands: list[str]) -> int:
        if self.pivot and self.keep_overlay:
            raise CommandLineError("--pivot and --keep-overlay exclude each other")
        if self.base is not None and self.shallow:
            raise CommandLineError("--base and --shallow exclude each other")
        if len(operands) > 1:
            self.bandwidth = operands[1]
        disk = await find_disk(client, operands[0])
        top, base = self._range(disk)
        if top == 0 and not (self.active or self.pivot or self.keep_overlay):
            raise UsageError(
                f"commit of '{disk.name}' active layer '{disk.active.node}' requires --active "
                "(with --pivot or --keep-overlay)"
            )
        if top > 0 and (self.pivot or self.keep_overlay):
            raise UsageError(
                f"'{disk.layers[top].node}' is not the active layer of '{disk.name}': "
                "--pivot and --keep-overlay do not apply"
            )
        if self.delete:
            check_deletable(disk.layers[top:base])
        identifier = job_id("commit", disk.name)
        arguments: dict[str, Any] = {
            "job-id": identifier,
            "device": disk.active.node,
            "top-node": disk.layers[top].node,
            "base-node": disk.layers[base].node,
            "speed": self.speed,
            "auto-dismiss": not self.waits,
            "auto-finalize": not self.waits,
        }
        if self.keep_relative and top > 0:
            arguments["backing-file"] = await _name_in_header(client, disk.layers[base - 1])
        await client.execute("block-commit", arguments)
        if not self.waits:
            self.tell(
                Done(disk=disk.name, job=identifier, status="started"), "Block commit started"
            )
            return 0
        return await self._finish(client, disk, top, base, identifier)

    def _range(self, disk: Disk) -> tuple[int, int]:
        """Depths of the top and the base. Raises UsageError."""
        top = 0 if self.top is None else disk.layer(self.top, "top")
        base = len(disk.layers) - 1
        if self.shallow:
            base = top + 1
        elif self.base is not None:
            base = disk.layer(self.base, "base")
        if top >= len(disk.layers) - 1:
            raise UsageError(f"'{disk.layers[top].node}' has nothing below it to commit to")
        if base <= top:
            raise UsageError(
                f"the base '{disk.layers[base].node}' is not below the top "
                f"'{disk.layers[top].node}'; {disk.described()}"
            )
        return top, base

    async def _finish(self, client: Client, disk: Disk, top: int, base: int, job_id: str) -> int:
        moved, target = disk.layers[top:base], disk.layers[base]

        async with Job(client, job_id) as job:

            async def work(told: Callable[[int, int], None]) -> str:
                status = await job.reaches("ready", "pending", told=told)
                if not self.keep_overlay:
                    await _carry_bitmaps(client, moved, target)
                if status == "ready":
                    if not (self.pivot or self.keep_overlay):
                        job.keep()
                        return "ready"
                    await (job.complete() if self.pivot else job.stop())
                    status = await job.reaches("pending", told=told)
                if status == "pending":
                    await job.finalize()
                    await job.reaches(told=told)
                return "finished"

            status = await self.followed(job, work)
        deleted: list[str] = []
        if status == "finished" and not self.keep_overlay:
            deleted = await drop_layers(client, moved, delete=self.delete)
        self._tell(disk, top, base, status, job_id, deleted)
        return 0

    def _tell(
        self, disk: Disk, top: int, base: int, status: str, job_id: str, deleted: list[str]
    ) -> None:
        active = disk.layers[base if self.pivot else 0].node
        if status == "ready":
            self.tell(
                Done(disk=disk.name, job=job_id, status="ready", active=active),
                f"Now in synchronized phase; 'blockjob {disk.name} --pivot' or '--abort' ends it",
            )
            return
        said = {True: "pivoted", False: "kept" if self.keep_overlay else "finished"}[self.pivot]
        lines = {
            "pivoted": f"Successfully pivoted: '{active}' is the active layer of '{disk.name}'",
            "kept": f"Commit complete, '{active}' kept as the active layer of '{disk.name}'",
            "finished": f"Commit complete: '{disk.layers[base].node}' holds what was above it",
        }
        self.tell(
            Done(disk=disk.name, status=said, active=active),
            lines[said],
            *(f"Deleted '{path}'" for path in deleted),
        )


async def _name_in_header(client: Client, overlay: Layer) -> str:
    """The backing file as the image of ``overlay`` has it written."""
    for node in await client.execute("query-named-block-nodes", {"flat": True}):
        if node["node-name"] == overlay.node:
            return str(node["image"].get("backing-filename", ""))
    raise UsageError(f"node '{overlay.node}' has gone")


async def _carry_bitmaps(client: Client, moved: list[Layer], base: Layer) -> None:
    """Give the base the bitmaps that only the layers above it have."""
    there = {bitmap["name"] for bitmap in base.bitmaps}
    actions: list[dict[str, Any]] = []
    for layer in moved:
        for bitmap in layer.bitmaps:
            name = bitmap.get("name")
            if not name or bitmap.get("inconsistent") or name in there:
                continue
            sources = [
                {"node": other.node, "name": name}
                for other in moved
                if any(found.get("name") == name for found in other.bitmaps)
            ]
            there.add(name)
            added = {
                "node": base.node, "name": name, "granularity": bitmap["granularity"],
                "persistent": bitmap["persistent"], "disabled": not bitmap["recording"],
            }  # fmt: skip
            merged = {"node": base.node, "target": name, "bitmaps": sources}
            actions += [
                {"type": "block-dirty-bitmap-add", "data": added},
                {"type": "block-dirty-bitmap-merge", "data": merged},
            ]
    if actions:
        await client.execute("transaction", {"actions": actions})
