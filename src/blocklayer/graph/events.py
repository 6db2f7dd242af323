"""Events: what a graph tells whoever listens, by the names and members that QMP gives them.

``Graph.notify`` hands an event to every listener at once, between two ``await``s: a listener takes
note, and does nothing that can wait or fail.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """Base of all events; the members of a derived class are the event's data."""

    NAME: ClassVar[str]


class BlockImageCorrupted(Event, frozen=True, kw_only=True):
    """A driver found metadata that contradicts itself; ``offset`` and ``size`` in bytes."""

    NAME = "BLOCK_IMAGE_CORRUPTED"

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool


class BlockWriteThreshold(Event, frozen=True, kw_only=True):
    """A write reached past the registered offset; sent once."""

    NAME = "BLOCK_WRITE_THRESHOLD"

    node_name: str
    amount_exceeded: int
    write_threshold: int


class JobStatusChange(Event, frozen=True, kw_only=True):
    """A job has another status."""

    NAME = "JOB_STATUS_CHANGE"

    id: str
    status: str


class BlockJobEvent(Event, frozen=True, kw_only=True):
    """What the events of a block job have in common; ``device`` is the job's id."""

    type: str
    device: str
    len: int
    offset: int
    speed: int


class BlockJobCompleted(BlockJobEvent, frozen=True, kw_only=True):
    """The job has ended, well or with ``error``."""

    NAME = "BLOCK_JOB_COMPLETED"

    error: str | None = None


class BlockJobCancelled(BlockJobEvent, frozen=True, kw_only=True):
    """The job was given up before it was complete."""

    NAME = "BLOCK_JOB_CANCELLED"


class BlockJobReady(BlockJobEvent, frozen=True, kw_only=True):
    """The job has caught up, and can be completed."""

    NAME = "BLOCK_JOB_READY"


class BlockJobPending(Event, frozen=True, kw_only=True):
    """The job waits to be finalized."""

    NAME = "BLOCK_JOB_PENDING"

    type: str
    id: str


class BlockJobError(Event, frozen=True, kw_only=True):
    """A request of the job failed, and ``action`` was taken."""

    NAME = "BLOCK_JOB_ERROR"

    device: str
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]
