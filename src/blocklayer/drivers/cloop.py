"""cloop images: zlib blocks of one size, read only.

1. A block's packed bytes are bounded before they are read, and what they give before it is given
   room.
"""

from __future__ import annotations

from typing import ClassVar

from blocklayer.codec import cloop
from blocklayer.drivers.blocks import FileOptions
from blocklayer.drivers.packed import Kept, ReadOnlyFormatDriver
from blocklayer.drivers.tables import PAGE_SIZE, TableCache
from blocklayer.drivers.unpacking import unpack_zlib
from blocklayer.errors import CorruptionError, FormatError
from blocklayer.graph import io
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.waiting import offload

_PAGE_WORDS = PAGE_SIZE // 8
_SLACK = 4096
"""Bytes by which a packed block of random data may be larger than twice its plain ones."""


class CloopDriver(ReadOnlyFormatDriver):
    """One cloop image."""

    NAME: ClassVar[str] = "cloop"
    Options = FileOptions

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """A shell script that says what it is."""
        return 2 if head.startswith(cloop.MAGIC) else 0

    async def open(self) -> None:
        """Read and judge the header; offsets are read when they are needed."""
        self.require_read_only()
        storage = self._storage = await self.open_file()
        end = cloop.HEADER_OFFSET + cloop.Header.SIZE
        data = await io.read(storage, 0, min(end, storage.size))
        header = self._header = cloop.decode_header(data)
        if header.table_offset + 8 * (header.blocks + 1) > storage.size:
            raise FormatError(f"The offsets of '{storage.filename}' end past the end of the file")
        self._table = TableCache(storage, "Q", "big")
        self._kept = Kept()

    @property
    def size(self) -> int:
        """All blocks."""
        return self._header.size

    async def map(self, offset: int, length: int) -> Extent:
        """Everything is compressed."""
        child = self.node.children["file"]
        return Extent(offset, length, Kind.OPAQUE, child=child, compressed=True)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Unpack block by block."""
        size, done = self._header.block_size, 0
        while done < len(view):
            number, within = divmod(offset + done, size)
            piece = view[done : done + size - within]
            data = self._kept.get(number)
            if data is None:
                data = await self._unpack(number)
                self._kept.put(number, data)
            piece[:] = data[within : within + len(piece)]
            done += len(piece)

    async def _offset(self, index: int) -> int:
        first = index - index % _PAGE_WORDS
        count = min(_PAGE_WORDS, self._header.blocks + 1 - first)
        part = await self._table.load(self._header.table_offset + 8 * first, count)
        return part.entries[index - first]

    async def _unpack(self, number: int) -> bytes:
        start, end = await self._offset(number), await self._offset(number + 1)
        size, storage = self._header.block_size, self._storage
        if not 0 < end - start <= 2 * size + _SLACK or end > storage.size:
            raise CorruptionError(
                f"Block {number} of '{storage.filename}' is said to be at {start:#x} to {end:#x}"
            )
        packed = await io.read(storage, start, end - start)
        try:
            return await offload(unpack_zlib, packed, size)
        except ValueError as error:
            raise CorruptionError(
                f"Block {number} of '{storage.filename}' at {start:#x} cannot be unpacked: {error}"
            ) from None
