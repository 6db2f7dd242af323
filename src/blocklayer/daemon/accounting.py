"""Block accounting: how many requests of each kind a front end has made, and how they ended."""

from __future__ import annotations

import time
from typing import Any, Literal

import msgspec

Kind = Literal["rd", "wr", "unmap", "flush", "zone_append"]


class Counters(msgspec.Struct):
    """Requests of one kind. Times in nanoseconds."""

    bytes: int = 0
    operations: int = 0
    total_time_ns: int = 0
    merged: int = 0
    failed_operations: int = 0
    invalid_operations: int = 0


class Accounting:
    """Counters by kind."""

    def __init__(self) -> None:
        self.kinds: dict[Kind, Counters] = {
            kind: Counters() for kind in ("rd", "wr", "zone_append", "unmap", "flush")
        }
        self.highest_offset = 0
        """Where the last byte that was ever written ends."""
        self._last_ns: int | None = None

    def done(self, kind: Kind, length: int, began_ns: int, *, failed: bool = False) -> None:
        """A request that began at ``began_ns`` (``time.monotonic_ns``) has ended."""
        now = time.monotonic_ns()
        counters = self.kinds[kind]
        if failed:
            counters.failed_operations += 1
        else:
            counters.bytes += length
            counters.operations += 1
        counters.total_time_ns += now - began_ns
        self._last_ns = now

    def wrote(self, end: int) -> None:
        """Bytes up to ``end`` were written."""
        self.highest_offset = max(self.highest_offset, end)

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
