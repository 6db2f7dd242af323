"""What operations answer: one declaration for Python callers and for ``--output=json``.

Encoded, names are in kebab-case and what does not apply is left out. Sizes are in bytes. The
results of ``info``, ``check``, ``map`` and ``measure`` are declared beside what makes them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from blocklayer.graph.driver import SnapshotInfo


class Result(msgspec.Struct, kw_only=True, frozen=True, rename="kebab", omit_defaults=True):
    """Base of all results here."""


class Created(Result, kw_only=True, frozen=True):
    """A new image (``create``)."""

    filename: str
    format: str
    virtual_size: int | None = None
    options: dict[str, Any]
    """Every option of the format that has a value, named as in ``-o``."""


class Resized(Result, kw_only=True, frozen=True):
    """A disk's new size (``resize``)."""

    filename: str
    format: str
    old_size: int
    virtual_size: int


class Converted(Result, kw_only=True, frozen=True):
    """A target that holds what its sources did (``convert``, ``dd``)."""

    filename: str
    format: str
    virtual_size: int
    bytes_covered: int
    """Bytes of the target that were written or are known to read as zeros."""
    actual_size: int | None = None
    """Host storage that the target uses."""


class Committed(Result, kw_only=True, frozen=True):
    """What the layers above hold, written into a base (``commit``)."""

    filename: str
    base: str
    virtual_size: int
    """Of the base, afterwards."""
    bytes_committed: int
    emptied: bool
    """Whether the top was emptied."""


class Rebased(Result, kw_only=True, frozen=True):
    """An overlay with another backing file (``rebase``)."""

    filename: str
    backing_filename: str | None = None
    backing_filename_format: str | None = None
    bytes_copied: int
    """What had to be written into the overlay, so that it reads as before."""


class Compared(Result, kw_only=True, frozen=True):
    """Whether two disks hold the same (``compare``)."""

    identical: bool
    difference: Literal["size", "status", "content"] | None = None
    """What differs; ``size`` and ``status`` (what is allocated) with strict comparison only."""
    offset: int | None = None
    """Where content or status first differ."""
    sizes_differ: bool


class SnapshotChanged(Result, kw_only=True, frozen=True):
    """An internal snapshot that was created, applied or deleted (``snapshot``)."""

    filename: str
    action: Literal["create", "apply", "delete"]
    snapshot: SnapshotInfo


class Amended(Result, kw_only=True, frozen=True):
    """What an image was made to be (``amend``)."""

    filename: str
    format: str
    options: dict[str, Any]
    """The options given."""


class Benched(Result, kw_only=True, frozen=True):
    """How long requests took (``bench``)."""

    filename: str
    write: bool
    count: int
    buffer_size: int
    depth: int
    offset: int
    step_size: int
    flush_interval: int
    seconds: float
    requests_per_second: float
    bytes_per_second: float
