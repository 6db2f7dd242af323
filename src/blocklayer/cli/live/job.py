"""`blk live blockjob`: how far the job of a disk is, and how it goes on."""

from __future__ import annotations

from typing import Annotated, Any

from blocklayer.cli import console
from blocklayer.cli.live.following import Job, job_id
from blocklayer.cli.live.verb import Done, Verb, bandwidth
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client
from blocklayer.units import MIB

_KINDS = ("commit", "pull", "copy", "backup")
_TITLES = {"commit": "Block Commit", "stream": "Block Pull", "mirror": "Block Copy",
           "backup": "Backup"}  # fmt: skip


class BlockJob(Verb):
    """Show, limit, pivot or cancel the job of a disk

    Without DISK all jobs are shown.
    """

    OPERANDS = (
        ("[DISK]", "the disk, as it was named to start the job; or the job's id"),
        ("[RATE]", "the new limit, as with --bandwidth RATE"),
    )
    EXAMPLE = ("disk0 --pivot", "the job is ready: its target becomes the disk")

    info: Annotated[bool, Option("show it (what happens without any other option)")] = False
    raw: Annotated[bool, Option("show it as the daemon tells it")] = False
    abort: Annotated[
        bool, Option("cancel the job; one that is ready leaves a copy of this moment")
    ] = False
    async_: Annotated[bool, Option("with --abort, --pivot: do not wait until it is over")] = False
    pivot: Annotated[bool, Option("the job is ready: make its target the disk")] = False
    bandwidth: Annotated[
        str | None, Option("the new limit: MiB/s, or bytes with a suffix; 0: none", value="RATE")
    ] = None
    bytes: Annotated[bool, Option("rates are in bytes a second")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        if len(operands) > 1:
            self.bandwidth = operands[1]
        wanted = [self.abort, self.pivot, self.bandwidth is not None, self.info or self.raw]
        if sum(wanted) > 1:
            raise CommandLineError("--abort, --pivot, --bandwidth and --info exclude each other")
        jobs = await client.execute("query-block-jobs")
        if not operands:
            if any(wanted[:3]):
                raise CommandLineError("Expecting DISK")
            return self._show(jobs)
        name = operands[0]
        names = (name, *(job_id(kind, name) for kind in _KINDS))
        jobs = [job for job in jobs if job["device"] in names]
        if not any(wanted[:3]):
            return self._show(jobs, name)
        if not jobs:
            raise UsageError(f"'{name}' has no job")
        if len(jobs) > 1:
            ids = ", ".join(job["device"] for job in jobs)
            raise UsageError(f"'{name}' has several jobs, name one by its id: {ids}")
        return await self._change(client, name, jobs[0])

    async def _change(self, client: Client, disk: str, job: dict[str, Any]) -> int:
        identifier = job["device"]
        if self.bandwidth is not None:
            speed = bandwidth(self.bandwidth, self.bytes)
            await client.execute("block-job-set-speed", {"device": identifier, "speed": speed})
            self.tell(Done(disk=disk, job=identifier, status="limited"))
            return 0
        if self.pivot and not job["ready"]:
            raise UsageError(
                f"job '{identifier}' is not ready to pivot yet: {_percent(job):.1f} % are copied"
            )
        async with Job(client, identifier) as following:
            if self.pivot:
                await following.complete()
            else:
                await following.stop()
            following.keep()
            if not self.async_:
                await following.ends()
        status = "pivoted" if self.pivot else ("finished" if job["ready"] else "cancelled")
        self.tell(Done(disk=disk, job=identifier, status=status), f"Job '{identifier}' {status}")
        return 0

    def _show(self, jobs: list[dict[str, Any]], disk: str | None = None) -> int:
        if self.raw or self.output == "json":
            from blocklayer.cli.json_text import pretty

            console.say(pretty(jobs))
            return 0
        if not jobs:
            console.say(f"No current block job for {disk}" if disk else "No block jobs")
        for job in jobs:
            said = f"{_TITLES.get(job['type'], job['type'])}: [{_percent(job):5.1f} %]"
            if disk is None:
                said = f"{job['device']}: {said}"
            if job["speed"]:
                limit = f"{job['speed']} bytes/s"
                if not self.bytes:
                    limit += f" ({job['speed'] / MIB:.3f} MiB/s)"
                said += f"    Bandwidth limit: {limit}"
            if job.get("ready"):
                said += "    ready"
            elif job["status"] not in ("running", "created"):
                said += f"    {job['status']}"
            console.say(said)
        return 0


def _percent(job: dict[str, Any]) -> float:
    return float(100 * job["offset"] / job["len"]) if job["len"] else 100.0
