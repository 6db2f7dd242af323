"""Pace: holds work to so many bytes per second, a limit that may change at any moment."""

from __future__ import annotations

import asyncio
from typing import Final

from blocklayer.units import KIB, align_down

_LEAST_PORTION: Final = 64 * KIB
_PORTIONS_A_SECOND: Final = 4
"""With a limit, portions are so small that about so many go in a second."""


class Pace:
    """A rate limit; ``bytes_per_s`` 0 means none."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._due_s = 0.0
        self._changed: asyncio.Event | None = None

    def set(self, bytes_per_s: int) -> None:
        """Change the limit: what waits is judged anew."""
        self.bytes_per_s = bytes_per_s
        self._due_s = 0.0
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def portion(self, most: int) -> int:
        """How many bytes to do at once: ``most``, or less under a limit."""
        if not self.bytes_per_s:
            return most
        wanted = align_down(self.bytes_per_s // _PORTIONS_A_SECOND, _LEAST_PORTION)
        return max(_LEAST_PORTION, min(most, wanted))

    def charge(self, length: int) -> None:
        """``length`` bytes have gone: what comes next has to wait for that."""
        if self.bytes_per_s:
            now_s = asyncio.get_running_loop().time()
            self._due_s = max(self._due_s, now_s) + length / self.bytes_per_s

    async def wait(self) -> None:
        """Wait until more may go."""
        while self.bytes_per_s:
            ahead_s = self._due_s - asyncio.get_running_loop().time()
            if ahead_s <= 0:
                return
            if self._changed is None:
                self._changed = asyncio.Event()
            try:
                await asyncio.wait_for(self._changed.wait(), ahead_s)
            except TimeoutError:
                pass
