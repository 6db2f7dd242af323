"""Block accounting: how many requests of each kind a front end has made, how they ended, and how
long they took.

1. A histogram has one bin more than boundaries; a time that is a boundary is in the upper bin.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec

from blocklayer.errors import UsageError

Kind = Literal["rd", "wr", "unmap", "flush", "zone_append"]


class Counters(msgspec.Struct):
    """Requests of one kind. Times in nanoseconds."""

    bytes: int = 0
    operations: int = 0
    total_time_ns: int = 0
    merged: int = 0
    failed_operations: int = 0
    invalid_operations: int = 0


class Histogram:
    """How many requests took how long; ``boundaries`` in nanoseconds, growing, above 0."""

    def __init__(self, boundaries: Sequence[int]) -> None:
        """Raises UsageError."""
        if any(low >= high for low, high in pairwise((0, *boundaries))):
            raise UsageError("boundaries of a latency histogram must grow, and be above 0")
        self.boundaries = list(boundaries)
        self.bins = [0] * (len(boundaries) + 1)

    def add(self, time_ns: int) -> None:
        """A request took ``time_ns``."""
        self.bins[bisect_right(self.boundaries, time_ns)] += 1


class Accounting:
    """Counters by kind. ``failed`` and ``invalid`` say whether the times of such requests count."""

    def __init__(self, *, failed: bool = False, invalid: bool = False) -> None:
        self.failed, self.invalid = failed, invalid
        self.kinds: dict[Kind, Counters] = {
            kind: Counters() for kind in ("rd", "wr", "zone_append", "unmap", "flush")
        }
        self.highest_offset = 0
        """Where the last byte that was ever written ends."""
        self.histograms: dict[Kind, Histogram] = {}
        self._last_ns: int | None = None

    def done(self, kind: Kind, offset: int, length: int, began_ns: int) -> None:
        """A request that began at ``began_ns`` (``time.monotonic_ns``) has ended well."""
        now = time.monotonic_ns()
        counters = self.kinds[kind]
        counters.bytes += length
        counters.operations += 1
        counters.total_time_ns += now - began_ns
        if kind in self.histograms:
            self.histograms[kind].add(now - began_ns)
        if kind == "wr" and offset + length > self.highest_offset:
            self.highest_offset = offset + length
        self._last_ns = now

    def failure(self, kind: Kind, began_ns: int) -> None:
        """A request has failed."""
        now = time.monotonic_ns()
        counters = self.kinds[kind]
        counters.failed_operations += 1
        if kind in self.histograms:
            self.histograms[kind].add(now - began_ns)
        if self.failed:
            counters.total_time_ns += now - began_ns
            self._last_ns = now

    def refusal(self, kind: Kind) -> None:
        """A request was invalid: nothing was done."""
        self.kinds[kind].invalid_operations += 1
        if self.invalid:
            self._last_ns = time.monotonic_ns()

    @property
    def idle_time_ns(self) -> int | None:
        """Since the last request ended; None if there was none."""
        return None if self._last_ns is None else time.monotonic_ns() - self._last_ns

    def totals(self) -> dict[str, Any]:
        """Members of ``BlockDeviceStats``."""
        found: dict[str, Any] = {"wr_highest_offset": self.highest_offset}
        for kind, counters in self.kinds.items():
            if kind != "flush":
                found[f"{kind}_bytes"] = counters.bytes
                found[f"{kind}_merged"] = counters.merged
            found[f"{kind}_operations"] = counters.operations
            found[f"{kind}_total_time_ns"] = counters.total_time_ns
            found[f"failed_{kind}_operations"] = counters.failed_operations
            found[f"invalid_{kind}_operations"] = counters.invalid_operations
        return found
