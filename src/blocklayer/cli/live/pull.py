"""`blk live blockpull`: what lower layers hold, copied up into the active one of a disk in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from blocklayer.cli.live.following import Job, JobVerb, job_id
from blocklayer.cli.live.images import check_deletable, drop_layers
from blocklayer.cli.live.verb import DISK, Done, find_disk
from blocklayer.cli.options import Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client


class BlockPull(JobVerb):
    """Copy what the layers below hold up into the active one, while the disk is used

    Afterwards the active layer needs none of them (or, with --base, only that one and those below
    it). Called off, it reads as before and can be started again.
    """

    OPERANDS = (DISK, ("[RATE]", "the same as --bandwidth RATE"))
    EXAMPLE = ("disk0 --wait --verbose", "the active layer of disk0 no longer has a backing file")

    base: Annotated[
        str | None,
        Option("the layer that stays below, by node, file name or DISK[DEPTH]", value="LAYER"),
    ] = None
    delete: Annotated[bool, Option("delete the files of layers that are merged (waits)")] = False

    @property
    def waits(self) -> bool:
        return super().waits or self.delete

    async def act(self, client: Client, operands: list[str]) -> int:
        if len(operands) > 1:
            self.bandwidth = operands[1]
        disk = await find_disk(client, operands[0])
        base = len(disk.layers) if self.base is None else disk.layer(self.base, "base")
        if base == 0:
            raise UsageError(f"the base '{disk.active.node}' is the active layer itself")
        if self.delete:
            check_deletable(disk.layers[1:base])
        identifier = job_id("pull", disk.name)
        arguments: dict[str, Any] = {
            "job-id": identifier,
            "device": disk.active.node,
            "speed": self.speed,
            "auto-dismiss": not self.waits,
        }
        if base < len(disk.layers):
            arguments["base-node"] = disk.layers[base].node
        await client.execute("block-stream", arguments)
        if not self.waits:
            self.tell(Done(disk=disk.name, job=identifier, status="started"), "Block pull started")
            return 0
        async with Job(client, identifier) as job:

            async def work(told: Callable[[int, int], None]) -> str:
                return await job.reaches(told=told)

            await self.followed(job, work)
        deleted = await drop_layers(client, disk.layers[1:base], delete=self.delete)
        self.tell(
            Done(disk=disk.name, status="finished", active=disk.active.node),
            "Pull complete",
            *(f"Deleted '{path}'" for path in deleted),
        )
        return 0
