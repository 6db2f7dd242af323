"""Events: what a graph tells whoever listens, by the names and members that QMP gives them.

``Graph.notify`` hands an event to every listener at once, between two ``await``s: a listener takes
note, and does nothing that can wait or fail. A rate limit is part of an event's declaration; who
sends events to clients keeps it (``qmp.events``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

UInt64 = Annotated[int, Meta(ge=0, le=2**64 - 1)]
JobType = Literal[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
]
JobStatus = Literal[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]
IoOperationType = Literal["read", "write"]
QuorumOpType = Literal["read", "write", "flush"]
BlockErrorAction = Literal["ignore", "report", "stop"]


class Event(msgspec.Struct, rename="kebab", kw_only=True):
    """One event's data; a class of it is the declaration. Members that are UNSET are left out."""

    NAME: ClassVar[str]
    INTERVAL_S: ClassVar[float] = 0.0
    """Seconds between two of a kind; 0: no limit."""
    KEY: ClassVar[tuple[str, ...]] = ()
    """The members whose values tell kinds apart."""

    def limited(self) -> bool:
        """Whether the limit holds for this one."""
        return True


class JobStatusChange(Event):
    """A job has a new status."""

    NAME: ClassVar[str] = "JOB_STATUS_CHANGE"
    id: str
    status: JobStatus


class BlockJobEvent(Event):
    """What events about a block job's course say."""

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


class BlockJobCompleted(BlockJobEvent):
    """A job has ended; ``error`` is there when it failed."""

    NAME: ClassVar[str] = "BLOCK_JOB_COMPLETED"
    error: str | UnsetType = UNSET


class BlockJobCancelled(BlockJobEvent):
    """A job was cancelled before it was complete."""

    NAME: ClassVar[str] = "BLOCK_JOB_CANCELLED"


class BlockJobReady(BlockJobEvent):
    """Source and target are the same: the job may be completed."""

    NAME: ClassVar[str] = "BLOCK_JOB_READY"


class BlockJobPending(Event):
    """A job waits for ``job-finalize``."""

    NAME: ClassVar[str] = "BLOCK_JOB_PENDING"
    type: JobType
    id: str


class BlockJobError(Event):
    """A job met an I/O error, and what it does about it."""

    NAME: ClassVar[str] = "BLOCK_JOB_ERROR"
    device: str
    operation: IoOperationType
    action: BlockErrorAction


class BlockIoError(Event, kw_only=True):
    """A request of a device failed. Once a second for each device, unless the device stops."""

    NAME: ClassVar[str] = "BLOCK_IO_ERROR"
    INTERVAL_S: ClassVar[float] = 1.0
    KEY: ClassVar[tuple[str, ...]] = ("qom_path",)
    qom_path: str
    device: str
    node_name: str | UnsetType = UNSET
    operation: IoOperationType
    action: BlockErrorAction
    nospace: bool | UnsetType = UNSET
    reason: str

    def limited(self) -> bool:
        """Whoever must act on a stop hears of it at once."""
        return self.action != "stop"


class BlockImageCorrupted(Event, kw_only=True):
    """An image's metadata is wrong; ``fatal``: it was marked, and is no longer used."""

    NAME: ClassVar[str] = "BLOCK_IMAGE_CORRUPTED"
    device: str
    node_name: str | UnsetType = UNSET
    msg: str
    offset: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    fatal: bool


class BlockWriteThreshold(Event):
    """A write went past the offset that was asked to be watched."""

    NAME: ClassVar[str] = "BLOCK_WRITE_THRESHOLD"
    node_name: str
    amount_exceeded: UInt64
    write_threshold: UInt64


class BlockExportDeleted(Event):
    """An export is gone, and its id free."""

    NAME: ClassVar[str] = "BLOCK_EXPORT_DELETED"
    id: str


class QuorumFailure(Event):
    """Too few children of a quorum agree, or carried a request out."""

    NAME: ClassVar[str] = "QUORUM_FAILURE"
    INTERVAL_S: ClassVar[float] = 1.0
    KEY: ClassVar[tuple[str, ...]] = ("reference",)
    reference: str
    sector_num: int
    sectors_count: int


class QuorumReportBad(Event, kw_only=True):
    """A child of a quorum failed, or was outvoted (then there is no ``error``)."""

    NAME: ClassVar[str] = "QUORUM_REPORT_BAD"
    INTERVAL_S: ClassVar[float] = 1.0
    KEY: ClassVar[tuple[str, ...]] = ("node_name",)
    type: QuorumOpType
    error: str | UnsetType = UNSET
    node_name: str
    sector_num: int
    sectors_count: int


class DeviceTrayMoved(Event):
    """A tray was opened or closed."""

    NAME: ClassVar[str] = "DEVICE_TRAY_MOVED"
    device: str
    id: str
    tray_open: bool


class DeviceDeleted(Event, kw_only=True):
    """A device is gone."""

    NAME: ClassVar[str] = "DEVICE_DELETED"
    device: str | UnsetType = UNSET
    path: str


class Stop(Event):
    """The machine is paused."""

    NAME: ClassVar[str] = "STOP"


class Resume(Event):
    """The machine goes on."""

    NAME: ClassVar[str] = "RESUME"


EVENTS: Final[tuple[type[Event], ...]] = (
    JobStatusChange,
    BlockImageCorrupted,
    BlockIoError,
    BlockJobCompleted,
    BlockJobCancelled,
    BlockJobError,
    BlockJobReady,
    BlockJobPending,
    BlockWriteThreshold,
    BlockExportDeleted,
    QuorumFailure,
    QuorumReportBad,
    DeviceTrayMoved,
    DeviceDeleted,
    Stop,
    Resume,
)
