"""Jobs by id: watched, paused, slowed, cancelled, completed and forgotten, in QEMU's words.

1. ``find`` knows every job; ``find_block_job`` only block jobs: others are not active.
2. A verb that a job does not take in its present state changes nothing.
"""

from __future__ import annotations

from typing import Literal, TypeGuard

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import UsageError
from blocklayer.graph.events import JobStatus, JobType
from blocklayer.jobs.job import Job
from blocklayer.jobs.mirror import Mirror

CopyMode = Literal["background", "write-blocking"]


class DeviceNotActiveError(UsageError):
    """No block job has that id."""

    error_class = "DeviceNotActive"


class JobInfo(msgspec.Struct, rename="kebab", kw_only=True):
    """One job, as ``query-jobs`` shows it; progress counts bytes, or what else the job counts."""

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | UnsetType = UNSET


class BlockJobInfo(msgspec.Struct, rename="kebab", kw_only=True):
    """One block job, as ``query-block-jobs`` shows it; ``speed`` in bytes per second."""

    type: JobType
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: Literal["ok", "failed", "nospace"]
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET
    actively_synced: bool | UnsetType = UNSET


def new_id(daemon: Daemon, given: str | None, device: str | None = None) -> str:
    """The id of a new job on ``device``: a device lends its name to it, a node does not."""
    if given is None:
        given = device if device is not None and device not in daemon.graph.nodes else ""
    return daemon.jobs.check_id(given)


def check_speed(bytes_per_s: int) -> int:
    """``bytes_per_s`` if a job can be held to it."""
    if bytes_per_s < 0:
        raise UsageError("Parameter 'speed' expects a non-negative value")
    return bytes_per_s


def find(daemon: Daemon, identifier: str) -> Job:
    """The job of that id."""
    job = daemon.jobs.find(identifier)
    if job is None:
        raise UsageError("Job not found")
    return job


def find_block_job(daemon: Daemon, identifier: str) -> Job:
    """The block job of that id."""
    job = daemon.jobs.find(identifier)
    if job is None or not job.is_block_job:
        raise DeviceNotActiveError(f"Block job '{identifier}' not found")
    return job


def query_jobs(daemon: Daemon) -> list[JobInfo]:
    """All jobs, the oldest first."""
    return [
        JobInfo(
            id=job.id,
            type=job.TYPE,
            status=job.status.value,
            current_progress=job.done,
            total_progress=job.total,
            error=_error(job),
        )
        for job in daemon.jobs
    ]


def query_block_jobs(daemon: Daemon) -> list[BlockJobInfo]:
    """All block jobs, the oldest first."""
    return [
        BlockJobInfo(
            type=job.TYPE,
            device=job.id,
            len=job.total,
            offset=job.done,
            busy=job.busy,
            paused=job.paused,
            speed=job.pace.bytes_per_s,
            io_status=job.io_status,
            ready=job.ready,
            status=job.status.value,
            auto_finalize=job.auto_finalize,
            auto_dismiss=job.auto_dismiss,
            error=_error(job),
            actively_synced=job.actively_synced if _is_mirror(job) else UNSET,
        )
        for job in daemon.jobs
        if job.is_block_job
    ]


def _error(job: Job) -> str | UnsetType:
    return UNSET if job.error is None else str(job.error)


def _is_mirror(job: Job) -> TypeGuard[Mirror]:
    return isinstance(job, Mirror) and job.TYPE == Mirror.TYPE


def block_job_cancel(daemon: Daemon, device: str, *, force: bool = False) -> None:
    """Give a job up. Without ``force`` a ready mirror ends with a copy of this moment."""
    job = find_block_job(daemon, device)
    if job.paused_by_user and not force:
        raise UsageError(f"The block job for device '{device}' is currently paused")
    job.cancel(force=force)


def block_job_set_speed(daemon: Daemon, device: str, speed: int) -> None:
    """Hold a job to ``speed`` bytes per second; 0: no limit."""
    find_block_job(daemon, device).set_speed(speed)


def block_job_change(daemon: Daemon, identifier: str, copy_mode: CopyMode | None) -> None:
    """Change a mirror's copy mode; None: nothing is to be changed."""
    job = find_block_job(daemon, identifier)
    job.check_verb("change")
    if not _is_mirror(job):
        raise UsageError("Job type does not support change")
    if copy_mode is not None and copy_mode != job.copy_mode:
        job.set_copy_mode(copy_mode)
