"""Apple's disk images (UDIF), read only: chunks that are plain, packed, or zeros.

1. A chunk's bytes, packed and plain, are bounded before they are read.
2. What no chunk covers reads as zeros.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import ClassVar, Final

from blocklayer.codec import dmg
from blocklayer.drivers import unpacking
from blocklayer.drivers.blocks import FileOptions
from blocklayer.drivers.packed import Kept, ReadOnlyFormatDriver
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR

_UNPACKERS: Final = {
    dmg.ZLIB: unpacking.unpack_zlib,
    dmg.BZIP2: unpacking.unpack_bzip2,
    dmg.LZFSE: unpacking.unpack_lzfse,
    dmg.LZMA: unpacking.unpack_lzma,
}


class DmgDriver(ReadOnlyFormatDriver):
    """One UDIF image."""

    NAME: ClassVar[str] = "dmg"
    Options = FileOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Only the file's end tells; a name that says so decides where nothing else does."""
        return 2 if filename.endswith(".dmg") else 0

    async def open(self) -> None:
        """Read the trailer, and all tables of chunks."""
        self.require_read_only()
        storage = self._storage = await self.open_file()
        size = storage.size
        tail = min(size, dmg.TAIL_SIZE)
        data = await io.read(storage, size - tail, tail)
        trailer = dmg.decode_trailer(data, size)
        self._size = trailer.sectors * SECTOR
        if trailer.list_length:
            data = await io.read(storage, trailer.list_offset, trailer.list_length)
            tables = await offload(dmg.tables_of_plist, data)
        elif trailer.fork_length:
            data = await io.read(storage, trailer.fork_offset, trailer.fork_length)
            tables = dmg.tables_of_fork(data)
        else:
            raise FormatError(f"'{storage.filename}' has neither property list nor resource fork")
        self._chunks = await offload(dmg.decode_chunks, tables, trailer.data_offset, size)
        self._kept = Kept()

    @property
    def size(self) -> int:
        """What the trailer says, whatever chunks there are."""
        return self._size

    async def map(self, offset: int, length: int) -> Extent:
        """The chunk at ``offset``, or the gap."""
        chunks = self._chunks
        number = bisect_right(chunks.starts, offset) - 1
        if number < 0 or offset >= chunks.ends[number]:
            if number + 1 < len(chunks.starts):
                length = min(length, chunks.starts[number + 1] - offset)
            return Extent(offset, length, Kind.ZERO)
        length = min(length, chunks.ends[number] - offset)
        kind, child = chunks.kinds[number], self.node.children["file"]
        if kind == dmg.ZERO:
            return Extent(offset, length, Kind.ZERO)
        if kind == dmg.RAW:
            place = chunks.places[number] + offset - chunks.starts[number]
            return Extent(offset, length, Kind.DATA, place, child)
        return Extent(offset, length, Kind.OPAQUE, child=child, compressed=True)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Unpack the chunk that ``view`` lies in."""
        number = bisect_right(self._chunks.starts, offset) - 1
        data = self._kept.get(number)
        if data is None:
            data = await self._unpack(number)
            self._kept.put(number, data)
        within = offset - self._chunks.starts[number]
        view[:] = data[within : within + len(view)]

    async def _unpack(self, number: int) -> bytes:
        chunks = self._chunks
        start, place = chunks.starts[number], chunks.places[number]
        packed = await io.read(self._storage, place, chunks.lengths[number])
        what = f"The chunk at {start:#x} of '{self._storage.filename}', stored at {place:#x}"
        try:
            unpack = _UNPACKERS[chunks.kinds[number]]
            return await offload(unpack, packed, chunks.ends[number] - start)
        except ValueError as error:
            raise CorruptionError(f"{what}, cannot be unpacked: {error}") from None
        except UnsupportedError as error:
            raise error.reworded(f"{what}, cannot be read: {error}") from None
