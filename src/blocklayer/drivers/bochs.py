"""Bochs' growing disks, read only: extents with a bitmap each, found through a catalog."""

from __future__ import annotations

from typing import ClassVar

from blocklayer.codec import bochs
from blocklayer.drivers.blocks import FileOptions
from blocklayer.drivers.packed import ReadOnlyFormatDriver
from blocklayer.drivers.tables import PAGE_SIZE, TableCache
from blocklayer.errors import CorruptionError, FormatError
from blocklayer.graph import io
from blocklayer.graph.extent import Extent, Kind
from blocklayer.units import SECTOR

_PAGE_WORDS = PAGE_SIZE // 4
_BITMAP_PIECE = 512
"""Bytes of a bitmap that are looked at at once."""


class BochsDriver(ReadOnlyFormatDriver):
    """One growing disk."""

    NAME: ClassVar[str] = "bochs"
    Options = FileOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """The magic stands at the start."""
        return 100 if head.startswith(bochs.MAGIC) else 0

    async def open(self) -> None:
        """Read and judge the header; the catalog is read when it is needed."""
        self.require_read_only()
        storage = self._storage = await self.open_file()
        data = await io.read(storage, 0, min(bochs.HEADER_SIZE, storage.size))
        disk = self._disk = bochs.decode_header(data)
        if disk.data_offset > storage.size:
            raise FormatError(f"The catalog of '{storage.filename}' ends past the end of the file")
        self._catalog = TableCache(storage, "I", "little")

    @property
    def size(self) -> int:
        """The disk's size."""
        return self._disk.size

    async def map(self, offset: int, length: int) -> Extent:
        """The run of sectors from ``offset`` on that are all here, or all not."""
        disk = self._disk
        number, within = divmod(offset, disk.extent_size)
        length = min(length, disk.extent_size - within)
        first = number - number % _PAGE_WORDS
        count = min(_PAGE_WORDS, disk.entries - first)
        entry = (await self._catalog.load(disk.catalog_offset + 4 * first, count)).entries[
            number - first
        ]
        if entry == bochs.UNALLOCATED:
            return Extent(offset, length, Kind.ZERO)
        place = disk.place(entry)
        if place + disk.bitmap_size > self._storage.size:
            raise CorruptionError(
                f"Extent {number} of '{self._storage.filename}' at {place:#x} is past the end of "
                "the file"
            )
        return await self._map_sectors(place, offset, within, length)

    async def _map_sectors(self, place: int, offset: int, within: int, length: int) -> Extent:
        disk = self._disk
        sector, inside = divmod(within, SECTOR)
        start = sector // 8
        bits = await io.read(
            self._storage, place + start, min(_BITMAP_PIECE, disk.bitmap_size - start)
        )
        end = min(8 * len(bits), -(-(inside + length) // SECTOR) + sector % 8)
        at = sector % 8
        here, stop = _bit(bits, at), at + 1
        while stop < end and _bit(bits, stop) == here:
            stop += 1
        length = min(length, (stop - at) * SECTOR - inside)
        if not here:
            return Extent(offset, length, Kind.ZERO)
        host_offset = place + disk.bitmap_size + within
        return Extent(offset, length, Kind.DATA, host_offset, self.node.children["file"])


def _bit(bits: bytes, index: int) -> int:
    return bits[index >> 3] >> (index & 7) & 1
