"""`blk live blockcopy`: a disk in use copied to a file or over NBD, and moved there if wanted.

With an NBD destination and --pivot this is live storage migration in one command.

1. A target that this made is closed and deleted when the copy does not come about.
2. The copy is whole only once the job was ready: what is called off before that is no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from blocklayer.cli.live.disks import Disk
from blocklayer.cli.live.following import Job, JobVerb, job_id
from blocklayer.cli.live.images import Images, drop_layers, file_options, remove_node
from blocklayer.cli.live.nbd import is_uri, nbd_options
from blocklayer.cli.live.verb import DISK, Done, absolute, find_disk
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client
from blocklayer.units import parse_size


class BlockCopy(JobVerb):
    """Copy a disk to another place while it is used, and move the disk there if wanted

    DEST is a file, which is made, or a URI such as nbd://host/export of another daemon. Copied is
    first what is there, then what is written meanwhile, until both are the same; from then on the
    disk can be moved (--pivot) or the copy kept as it is at that moment (--finish).
    """

    OPERANDS = (
        DISK,
        ("DEST", "the file to make, or the URI of an NBD export"),
        ("[FORMAT]", "format of the copy (default: the disk's own; raw for NBD)"),
    )
    EXAMPLE = ("disk0 nbd://host-b/disk0 --pivot", "disk0 moves to host-b while it is in use")

    shallow: Annotated[
        bool, Option("copy the active layer only; the copy shares the layers below")
    ] = False
    reuse_external: Annotated[bool, Option("DEST exists and is used as it is")] = False
    blockdev: Annotated[bool, Option("DEST is a block device (used as it is)")] = False
    granularity: Annotated[
        str | None, Option("how finely changes are tracked, a power of two", value="SIZE")
    ] = None
    buf_size: Annotated[str | None, Option("memory for data in flight", value="SIZE")] = None
    synchronous_writes: Annotated[
        bool, Option("every write goes to both at once, so that the copy surely catches up")
    ] = False
    pivot: Annotated[bool, Option("wait, then make the copy the disk")] = False
    finish: Annotated[bool, Option("wait, then end with a copy of that moment")] = False

    @property
    def waits(self) -> bool:
        return super().waits or self.pivot or self.finish

    async def act(self, client: Client, operands: list[str]) -> int:
        if self.pivot and self.finish:
            raise CommandLineError("--pivot and --finish exclude each other")
        disk = await find_disk(client, operands[0])
        arguments = self._arguments(disk)
        images = Images(client)
        try:
            target = await self._target(images, disk, *operands[1:])
            await client.execute("blockdev-mirror", {**arguments, "target": target})
        except BaseException:
            await images.undo()
            raise
        if not self.waits:
            self.tell(
                Done(disk=disk.name, job=arguments["job-id"], status="started"),
                f"Block copy started; 'blockjob {disk.name}' shows how far it is",
            )
            return 0
        try:
            async with Job(client, arguments["job-id"]) as job:
                status = await self.followed(job, self._work(job))
        except BaseException:
            await images.undo()
            raise
        await self._tell(client, disk, target, status)
        return 0

    def _arguments(self, disk: Disk) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "job-id": job_id("copy", disk.name),
            "device": disk.active.node,
            "sync": "top" if self.shallow else "full",
            "speed": self.speed,
            "auto-dismiss": not self.waits,
        }
        if self.synchronous_writes:
            arguments["copy-mode"] = "write-blocking"
        if self.granularity is not None:
            arguments["granularity"] = parse_size(self.granularity, what="granularity")
        if self.buf_size is not None:
            arguments["buf-size"] = parse_size(self.buf_size, what="buffer size")
        return arguments

    async def _target(
        self, images: Images, disk: Disk, destination: str, driver: str | None = None
    ) -> str:
        """The node that takes the copy."""
        name = f"{disk.name}-copy"
        backing = disk.layers[1] if self.shallow and len(disk.layers) > 1 else None
        if is_uri(destination):
            storage = nbd_options(destination)
            if driver in (None, "raw") and backing is None:
                return await images.add(name, storage)
        elif self.blockdev:
            storage = {"driver": "host_device", "filename": absolute(destination)}
        else:
            storage = file_options(absolute(destination))
            if not self.reuse_external:
                driver = driver or disk.active.driver
                await images.create(
                    absolute(destination), driver, disk.active.size, backing=backing
                )
        driver = driver or ("raw" if self.blockdev else disk.active.driver)
        if backing is not None and driver == "raw":
            raise UsageError("a raw image shares no layers: --shallow needs another FORMAT")
        options: dict[str, Any] = {"driver": driver, "file": storage}
        if driver != "raw":
            options["backing"] = backing.node if backing else None
        return await images.add(name, options)

    def _work(self, job: Job) -> Callable[[Callable[[int, int], None]], Any]:
        async def work(told: Callable[[int, int], None]) -> str:
            if await job.reaches("ready", told=told) != "ready":
                return "finished"
            if self.pivot:
                await job.complete()
            elif self.finish:
                await job.stop()
            else:
                job.keep()
                return "ready"
            await job.reaches(told=told)
            return "pivoted" if self.pivot else "finished"

        return work

    async def _tell(self, client: Client, disk: Disk, target: str, status: str) -> None:
        job, active = None, disk.active.node
        if status == "pivoted":
            active = target
            await drop_layers(client, disk.layers[: 1 if self.shallow else None], delete=False)
            line = f"Successfully pivoted: '{target}' is the active layer of '{disk.name}'"
        elif status == "finished":
            await remove_node(client, target)
            line = f"Successfully copied '{disk.name}'"
        else:
            job = job_id("copy", disk.name)
            line = f"Now in mirroring phase; 'blockjob {disk.name} --pivot' or '--abort' ends it"
        self.tell(Done(disk=disk.name, job=job, status=status, active=active), line)
