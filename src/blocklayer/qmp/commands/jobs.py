"""Jobs: begun, watched, paused, slowed, cancelled, completed and forgotten."""

from __future__ import annotations

from typing import Annotated, Any, Final, get_args

import msgspec

from blocklayer.daemon import job_control, making, mirrors, operations
from blocklayer.daemon.job_control import BlockJobInfo, JobInfo
from blocklayer.daemon.mirrors import BlockdevMirror, DriveMirror
from blocklayer.daemon.operations import BlockCommit, BlockStream
from blocklayer.drivers import REGISTRY
from blocklayer.graph.events import JobType
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments
from blocklayer.qmp.shapes import UNSTABLE, Variants


class JobId(Arguments):
    """A job."""

    id: str


class JobDevice(Arguments):
    """A block job, under the name of a device."""

    device: str


class BlockJobSetSpeed(Arguments):
    """How fast a block job may be, in bytes per second; 0: no limit."""

    device: str
    speed: int


class BlockJobCancel(Arguments):
    """A block job; ``force``: without a result, also where there could be one."""

    device: str
    force: bool = False


class _BlockJobChange(msgspec.Struct, rename="kebab", kw_only=True):
    id: str
    type: JobType


class _MirrorChange(_BlockJobChange, kw_only=True):
    copy_mode: job_control.CopyMode


def _changes() -> dict[str, type[msgspec.Struct]]:
    return {
        name: _MirrorChange if name == "mirror" else _BlockJobChange for name in get_args(JobType)
    }


_CHANGE: Final = Variants(
    name="BlockJobChangeOptions", tag="type", common=_BlockJobChange, structs=_changes
)


class _Driver(msgspec.Struct):
    driver: str


def _creations() -> dict[str, type[msgspec.Struct]]:
    return {
        name: making.create_options(REGISTRY, name)
        for name, entry in REGISTRY.table.items()
        if not entry.internal
    }


_CREATION: Final = Variants(
    name="BlockdevCreateOptions", tag="driver", common=_Driver, structs=_creations
)


class BlockdevCreate(Arguments):
    """What to make."""

    job_id: str
    options: Annotated[dict[str, Any], _CREATION]


class BlockdevAmend(Arguments):
    """What to change of which image."""

    job_id: str
    node_name: str
    options: dict[str, Any]
    force: Annotated[bool, UNSTABLE] = False


class SnapshotJob(Arguments):
    """A snapshot of several disks; ``vmstate`` names one of them, there being no machine."""

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]


class SnapshotDelete(Arguments):
    """A snapshot of several disks."""

    job_id: str
    tag: str
    devices: list[str]


@COMMANDS.command("block-stream")
async def block_stream(monitor: Monitor, arguments: BlockStream) -> None:
    """Copy what layers below a node hold into it, while it stays in use."""
    await operations.block_stream(monitor.server.daemon, arguments)


@COMMANDS.command("block-commit")
async def block_commit(monitor: Monitor, arguments: BlockCommit) -> None:
    """Copy what layers hold into a lower one, while the disk stays in use."""
    await operations.block_commit(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-mirror")
async def blockdev_mirror(monitor: Monitor, arguments: BlockdevMirror) -> None:
    """Keep another node the same as one in use, until told to move to it."""
    await mirrors.blockdev_mirror(monitor.server.daemon, arguments)


@COMMANDS.command("drive-mirror")
async def drive_mirror(monitor: Monitor, arguments: DriveMirror) -> None:
    """Keep a file the same as a node in use, until told to move to it."""
    await mirrors.drive_mirror(monitor.server.daemon, arguments)


@COMMANDS.command("blockdev-create")
async def blockdev_create(monitor: Monitor, arguments: BlockdevCreate) -> None:
    """Make an image, or the file for one."""
    await making.blockdev_create(monitor.server.daemon, arguments.job_id, arguments.options)


@COMMANDS.command("x-blockdev-amend", features=("unstable",))
async def x_blockdev_amend(monitor: Monitor, arguments: BlockdevAmend) -> None:
    """Change what an image is."""
    await making.blockdev_amend(
        monitor.server.daemon, arguments.job_id, arguments.node_name, arguments.options
    )


@COMMANDS.command("snapshot-save")
async def snapshot_save(monitor: Monitor, arguments: SnapshotJob) -> None:
    """Take an internal snapshot of several disks at one moment."""
    making.check_vmstate(arguments.vmstate, arguments.devices)
    making.snapshot_save(monitor.server.daemon, arguments.job_id, arguments.tag, arguments.devices)


@COMMANDS.command("snapshot-load")
async def snapshot_load(monitor: Monitor, arguments: SnapshotJob) -> None:
    """Let several disks go back to an internal snapshot."""
    making.check_vmstate(arguments.vmstate, arguments.devices)
    making.snapshot_load(monitor.server.daemon, arguments.job_id, arguments.tag, arguments.devices)


@COMMANDS.command("snapshot-delete")
async def snapshot_delete(monitor: Monitor, arguments: SnapshotDelete) -> None:
    """Delete an internal snapshot of several disks."""
    making.snapshot_delete(
        monitor.server.daemon, arguments.job_id, arguments.tag, arguments.devices
    )


@COMMANDS.command("query-jobs")
async def query_jobs(monitor: Monitor) -> list[JobInfo]:
    """All jobs."""
    return job_control.query_jobs(monitor.server.daemon)


@COMMANDS.command("query-block-jobs")
async def query_block_jobs(monitor: Monitor) -> list[BlockJobInfo]:
    """All block jobs."""
    return job_control.query_block_jobs(monitor.server.daemon)


@COMMANDS.command("job-pause")
async def job_pause(monitor: Monitor, arguments: JobId) -> None:
    """Let a job stand still."""
    job_control.find(monitor.server.daemon, arguments.id).pause()


@COMMANDS.command("job-resume")
async def job_resume(monitor: Monitor, arguments: JobId) -> None:
    """Let a paused job go on."""
    job_control.find(monitor.server.daemon, arguments.id).resume()


@COMMANDS.command("job-cancel")
async def job_cancel(monitor: Monitor, arguments: JobId) -> None:
    """Give a job up."""
    job_control.find(monitor.server.daemon, arguments.id).cancel()


@COMMANDS.command("job-complete")
async def job_complete(monitor: Monitor, arguments: JobId) -> None:
    """Let a ready job end, with its full effect."""
    job_control.find(monitor.server.daemon, arguments.id).complete()


@COMMANDS.command("job-finalize")
async def job_finalize(monitor: Monitor, arguments: JobId) -> None:
    """Let a pending job take effect."""
    await job_control.find(monitor.server.daemon, arguments.id).finalize()


@COMMANDS.command("job-dismiss")
async def job_dismiss(monitor: Monitor, arguments: JobId) -> None:
    """Forget a concluded job."""
    job_control.find(monitor.server.daemon, arguments.id).dismiss()


@COMMANDS.command("block-job-set-speed")
async def block_job_set_speed(monitor: Monitor, arguments: BlockJobSetSpeed) -> None:
    """Limit a block job."""
    job_control.block_job_set_speed(monitor.server.daemon, arguments.device, arguments.speed)


@COMMANDS.command("block-job-cancel")
async def block_job_cancel(monitor: Monitor, arguments: BlockJobCancel) -> None:
    """Give a block job up; a ready mirror leaves a copy of this moment."""
    job_control.block_job_cancel(monitor.server.daemon, arguments.device, force=arguments.force)


@COMMANDS.command("block-job-pause")
async def block_job_pause(monitor: Monitor, arguments: JobDevice) -> None:
    """Let a block job stand still."""
    job_control.find_block_job(monitor.server.daemon, arguments.device).pause()


@COMMANDS.command("block-job-resume")
async def block_job_resume(monitor: Monitor, arguments: JobDevice) -> None:
    """Let a paused block job go on."""
    job_control.find_block_job(monitor.server.daemon, arguments.device).resume()


@COMMANDS.command("block-job-complete")
async def block_job_complete(monitor: Monitor, arguments: JobDevice) -> None:
    """Let a ready block job end, with its full effect."""
    job_control.find_block_job(monitor.server.daemon, arguments.device).complete()


@COMMANDS.command("block-job-finalize")
async def block_job_finalize(monitor: Monitor, arguments: JobId) -> None:
    """Let a pending block job take effect."""
    await job_control.find_block_job(monitor.server.daemon, arguments.id).finalize()


@COMMANDS.command("block-job-dismiss")
async def block_job_dismiss(monitor: Monitor, arguments: JobId) -> None:
    """Forget a concluded block job."""
    job_control.find_block_job(monitor.server.daemon, arguments.id).dismiss()


@COMMANDS.command("block-job-change")
async def block_job_change(monitor: Monitor, arguments: Annotated[dict[str, Any], _CHANGE]) -> None:
    """Change how a block job works."""
    job_control.block_job_change(monitor.server.daemon, arguments["id"], arguments.get("copy-mode"))
