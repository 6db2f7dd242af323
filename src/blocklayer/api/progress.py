"""How far a long operation is: the numbers that callers and ``--progress=json`` get.

1. Reports come at most ten times a second, but the last one, which says that all is done, comes.
2. ``done`` never falls from one report to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

_INTERVAL_S = 0.1


class Progress(msgspec.Struct, frozen=True):
    """One report. ``done`` and ``total`` in bytes (clusters for ``amend``, requests for ``bench``).

    ``rate`` is per second, on average so far; ``eta`` in seconds, None while it cannot be told.
    """

    done: int
    total: int
    percent: float
    rate: int
    eta: float | None


class Meter:
    """Makes reports of what a job says of itself, and hands them to ``report``."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._start_s = time.monotonic()
        self._reported_s = self._start_s - _INTERVAL_S
        self._done = -1

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` are finished."""
        done = max(self._done, min(done, total))
        now_s = time.monotonic()
        due = now_s - self._reported_s >= _INTERVAL_S or done == total
        if done == self._done or not due:
            return
        self._done, self._reported_s = done, now_s
        taken_s = now_s - self._start_s
        rate = int(done / taken_s) if taken_s else 0
        self._report(
            Progress(
                done=done,
                total=total,
                percent=round(100 * done / total, 2) if total else 100.0,
                rate=rate,
                eta=round((total - done) / rate, 1) if rate else None,
            )
        )
