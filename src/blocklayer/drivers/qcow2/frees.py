"""Clusters given up: when their refcounts drop, and when the host gets the space back.

1. A reference is dropped only after the metadata without it is on stable storage, and once no
   request can still be using the space (R1, R2). Until then the cluster is not free, so nothing
   reuses it.
2. After a crash in between, the cluster is leaked, never doubly used.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.units import GIB

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image

_RUNS_MAX: Final = 4096
_LENGTH_MAX: Final = GIB


class Reason(enum.Enum):
    """Why a reference is dropped; decides whether freed space is handed down as a discard."""

    REQUEST = "discard request"
    SNAPSHOT = "snapshot deleted"
    OTHER = "other"
    ALWAYS = "always"


class _Drop(msgspec.Struct, gc=False):
    """One reference less to each of ``count`` clusters."""

    first: int
    count: int
    reason: Reason
    epoch: int


class Frees:
    """References that are to be dropped."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._pending: list[_Drop] = []
        """Dropped in memory only."""
        self._ready: list[_Drop] = []
        """Dropped on stable storage."""
        self._clusters = 0

    def add(self, runs: list[tuple[int, int]], reason: Reason) -> None:
        """The mapping in memory no longer refers to these (first cluster, count) runs."""
        epoch = self._image.node.graph.epochs.retire()
        for first, count in runs:
            self._pending.append(_Drop(first, count, reason, epoch))
            self._clusters += count

    @property
    def many(self) -> bool:
        """So much waits that a flush is worth its price."""
        length = self._clusters << self._image.geometry.cluster_bits
        return len(self._pending) > _RUNS_MAX or length > _LENGTH_MAX

    def settled(self) -> None:
        """All metadata in memory is on stable storage."""
        self._ready += self._pending
        self._pending.clear()
        self._clusters = 0

    async def apply(self, *, force: bool = False) -> None:
        """Drop what may be dropped; ``force``: no request is in flight. Needs the image's lock."""
        if not self._ready:
            return
        passed = self._image.node.graph.epochs.passed
        drops, self._ready = self._ready, []
        zeroed: list[tuple[int, int]] = []
        try:
            while drops:
                drop = drops[-1]
                if force or passed(drop.epoch):
                    await self._drop(drop, zeroed)
                else:
                    self._ready.append(drop)
                drops.pop()
        finally:
            self._ready += drops
        await self._discard(zeroed)

    async def _drop(self, drop: _Drop, zeroed: list[tuple[int, int]]) -> None:
        discards = self._passes_down(drop.reason)
        while drop.count:
            done, freed = await self._image.refcounts.decrease(drop.first, drop.count)
            # Noted block by block: if reading the next one fails, a second try goes on from there.
            drop.first += done
            drop.count -= done
            if discards:
                zeroed += freed

    def _passes_down(self, reason: Reason) -> bool:
        settings = self._image.settings
        return {
            Reason.REQUEST: settings.discard_request,
            Reason.SNAPSHOT: settings.discard_snapshot,
            Reason.OTHER: settings.discard_other,
            Reason.ALWAYS: True,
        }[reason]

    async def _discard(self, runs: list[tuple[int, int]]) -> None:
        bits = self._image.geometry.cluster_bits
        runs.sort()
        position = 0
        while position < len(runs):
            first, count = runs[position]
            position += 1
            while position < len(runs) and runs[position][0] == first + count:
                count += runs[position][1]
                position += 1
            await self._image.storage.discard(first << bits, count << bits)
