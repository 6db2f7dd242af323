"""Guest data that is kept encrypted, sector by sector: reads and writes of any bytes.

1. Writes that cover a sector in part read it first; of two writes that meet in a sector, the later
   waits for the earlier, so that neither brings back what the other has overwritten.
2. Long runs are encrypted and decrypted off the loop. Nobody's data is encrypted in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from blocklayer.graph.request import Claims
from blocklayer.graph.waiting import offload
from blocklayer.units import KIB, SECTOR, align_down, align_up

if TYPE_CHECKING:
    from blocklayer.drivers.crypto.cipher import SectorCipher
    from blocklayer.graph.driver import Buffer

T = TypeVar("T")
AnyBuffer = TypeVar("AnyBuffer", bound="Buffer")

_SHORT: Final = 8 * KIB
"""Up to here handing over to a thread takes longer than the work."""


class Storage(Protocol):
    """Where the encrypted bytes are."""

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Store ``buffers``, one after the other."""


class Sealed:
    """Encrypted space of one image.

    Places are told twice: ``host_offset`` in ``storage``, and ``position``, which gives a sector
    its number (the same offset again, or the guest's, as the format wants it).
    """

    def __init__(self, storage: Storage, cipher: SectorCipher) -> None:
        self._storage = storage
        self._cipher = cipher
        self._claims = Claims()

    def seal(self, position: int, data: Buffer) -> Buffer:
        """What must be stored for whole sectors of ``data``. In any thread."""
        return self._cipher.encrypt(position // SECTOR, data)

    async def read(self, host_offset: int, position: int, view: memoryview) -> None:
        """Fill ``view`` with what is stored there, decrypted."""
        head = position % SECTOR
        length = align_up(head + len(view), SECTOR)
        stored = view if length == len(view) else memoryview(bytearray(length))
        await self._storage.read_into(host_offset - head, stored)
        await self._work(self._cipher.decrypt, position - head, stored)
        if stored is not view:
            view[:] = stored[head : head + len(view)]

    async def write(self, host_offset: int, position: int, data: Buffer) -> None:
        """Store ``data``, encrypted, with what shares its first and last sectors."""
        start, end = position, position + len(memoryview(data))
        first, last = align_down(start, SECTOR), align_up(end, SECTOR)
        distance = host_offset - position
        async with self._claims.claim(first, last):
            if (first, last) != (start, end):
                whole = bytearray(last - first)
                for at in sorted({first, last - SECTOR}):
                    edge = memoryview(whole)[at - first : at - first + SECTOR]
                    await self.read(at + distance, at, edge)
                whole[start - first : end - first] = data
                data = whole
            stored = await self._work(self._cipher.encrypt, first, data)
            await self._storage.write(first + distance, stored)

    @staticmethod
    async def _work(function: Callable[[int, AnyBuffer], T], position: int, data: AnyBuffer) -> T:
        if len(data) <= _SHORT:
            return function(position // SECTOR, data)
        return await offload(function, position // SECTOR, data)
