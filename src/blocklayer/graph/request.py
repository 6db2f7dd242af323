"""Requests in flight: which ranges are being changed, and which old space may still be in use.

1. ``Claims``: of two claims on ranges that meet, the later waits for the earlier; so waiting
   follows arrival and cannot deadlock.
2. ``Epochs``: space noted as freed in epoch ``e`` is out of use once every request that began in
   ``e`` or before has ended. This is what lets reads and plain writes go without claims: the space
   that they reach stays theirs until they end, even if the mapping moves on.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Claim:
    """An exclusive hold on ``[start, end)``; use with ``async with``."""

    __slots__ = ("_claims", "_waiters", "end", "released", "start")

    def __init__(self, claims: Claims, start: int, end: int) -> None:
        self._claims = claims
        self._waiters: list[asyncio.Future[None]] = []
        self.start = start
        self.end = end
        self.released = False

    async def __aenter__(self) -> Claim:
        earlier = [held for held in self._claims.held if self.meets(held)]
        self._claims.held.append(self)
        try:
            # The latest first: when it goes, most of those that it waited for are gone as well.
            for held in reversed(earlier):
                if not held.released:
                    await held.gone()
        except BaseException:
            self._release()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def meets(self, other: Claim) -> bool:
        """Whether the two ranges share a byte."""
        return self.start < other.end and other.start < self.end

    async def gone(self) -> None:
        """Wait until this claim is released."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _release(self) -> None:
        self.released = True
        self._claims.held.remove(self)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Claims:
    """The ranges of one node that are being changed."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: list[Claim] = []

    def claim(self, start: int, end: int) -> Claim:
        """A claim on ``[start, end)``, to be entered."""
        return Claim(self, start, end)


class Epochs:
    """Counts requests in flight by the epoch they began in."""

    __slots__ = ("_active", "current")

    def __init__(self) -> None:
        self.current = 0
        self._active: dict[int, int] = {}

    def enter(self) -> int:
        """A request begins; hand the answer to ``leave`` when it ends."""
        epoch = self.current
        self._active[epoch] = self._active.get(epoch, 0) + 1
        return epoch

    def leave(self, epoch: int) -> None:
        """A request that ``enter`` gave ``epoch`` has ended."""
        left = self._active[epoch] - 1
        if left:
            self._active[epoch] = left
        else:
            del self._active[epoch]

    def retire(self) -> int:
        """Begin a new epoch; the answer is the one to note beside what was freed."""
        self.current += 1
        return self.current - 1

    def passed(self, epoch: int) -> bool:
        """Whether every request that began in ``epoch`` or before has ended."""
        # Few epochs are ever active at once: one a free, while requests are in flight.
        return all(active > epoch for active in self._active)
