"""Stream-optimised extents: compressed grains, one after another, each written as a whole.

1. A grain's compressed bytes are bounded before they are read, and what they give before it is
   given room.
2. Grains are appended in the order they are written, without gaps; tables name them afterwards.
"""

from __future__ import annotations

import asyncio

from blocklayer.codec.vmdk.sparse import UNALLOCATED, GrainMarker, Header, pack_grain
from blocklayer.drivers.vmdk.extents import SparseExtent
from blocklayer.errors import CorruptionError, UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.child import Child
from blocklayer.graph.driver import Buffer
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.node import Node
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR, align_down, align_up

_LEVEL = 1


def pack_grain_data(data: Buffer, grain_size: int) -> bytes:
    """A grain (``data``, then zeros) compressed. In any thread."""
    from isal import isal_zlib

    packed: bytes = isal_zlib.compress(bytes(data).ljust(grain_size, b"\0"), _LEVEL)
    return packed


def _decompress(data: bytes, size: int) -> bytes:
    from isal import isal_zlib
    from isal.igzip_lib import IsalError

    try:
        plain: bytes = isal_zlib.decompressobj().decompress(data, size)
    except IsalError as error:  # type: ignore[misc]  # its stub says that it is no class
        raise CorruptionError(f"it cannot be decompressed ({error})") from None
    return plain


class CompressedExtent(SparseExtent):
    """A sparse extent whose grains are compressed; ``node`` is the disk it is part of."""

    def __init__(self, node: Node, start: int, child: Child, header: Header, type: str) -> None:
        super().__init__(start, child, header, type)
        self._node = node
        self._turn = asyncio.Lock()
        self._last: tuple[int, bytes] | None = None
        """The grain that was read last, and its data: streams are read in pieces."""

    async def map(self, offset: int, length: int) -> Extent:
        """A disk open for writing wants to see every request."""
        if not self._node.flags.read_only:
            return Extent(
                offset, length, Kind.OPAQUE, child=self.child, writable=True, compressed=True
            )
        return await super().map(offset, length)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Never asked: what is writable here takes its data itself."""
        raise UnsupportedError(f"'{self.storage.filename}' takes whole grains only")

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from guest ``offset``, grain by grain."""
        done = 0
        while done < len(view):
            within = offset + done - self.start
            start = within % self.grain_size
            length = min(len(view) - done, self.grain_size - start)
            data = await self._grain(within - start)
            view[done : done + length] = data[start : start + length]
            done += length

    async def _grain(self, within: int) -> bytes:
        """The plain bytes of the grain that begins at ``within``."""
        table = await self.table(within)
        entry = UNALLOCATED
        if table is not None:
            entry = table.entries[within % self._table_span // self.grain_size]
        if self._kind(entry) is Kind.UNALLOCATED:
            return await self._below(within)
        if self._kind(entry) is Kind.ZERO:
            return bytes(self.grain_size)
        last = self._last
        if last is not None and last[0] == entry:
            return last[1]
        try:
            data = await self._unpack(within, self.place(within // self.grain_size, entry))
        except CorruptionError as error:
            raise CorruptionError(
                f"Grain {within // self.grain_size} of '{self.storage.filename}' at "
                f"{entry * SECTOR:#x}: {error}"
            ) from None
        self._last = (entry, data)
        return data

    async def _below(self, within: int) -> bytes:
        """What the guest sees where this layer has nothing."""
        data = bytearray(self.grain_size)
        backing, offset = self._node.backing, self.start + within
        if backing is not None and offset < backing.size:
            length = min(self.grain_size, backing.size - offset)
            await io.read_into(backing, offset, memoryview(data)[:length])
        return bytes(data)

    async def _unpack(self, within: int, place: int) -> bytes:
        limit = 2 * self.grain_size
        # Marker and grain at once: hardly any grain is larger than what it gives.
        packed = await self._read(place, self.grain_size + SECTOR)
        if self.header.markers:
            marker = GrainMarker.unpack(packed)
            if marker.sector * SECTOR != within:
                raise CorruptionError(f"its marker says that it belongs to {marker.sector:#x}")
            if not 0 < marker.size <= limit:
                raise CorruptionError(f"its marker says {marker.size:#x} bytes")
            end = GrainMarker.SIZE + marker.size
            if end > len(packed):
                packed = await self._read(place, end)
            packed = packed[GrainMarker.SIZE : end]
        data = await offload(_decompress, packed, self.grain_size)
        needed = min(self.grain_size, self.size - within)
        if len(data) < needed:
            raise CorruptionError(f"it gives {len(data):#x} bytes instead of {needed:#x}")
        return data.ljust(self.grain_size, b"\0")

    async def _read(self, place: int, length: int) -> bytes:
        return await io.read(self.storage, place, min(length, self.storage.size - place))

    async def write(self, offset: int, data: Buffer) -> None:
        """Store ``data``: the grains that it covers in part are read, changed and appended."""
        view = memoryview(data)
        async with self._turn:
            done = 0
            while done < len(view):
                within = offset + done - self.start
                start = within % self.grain_size
                length = min(len(view) - done, self.grain_size - start)
                piece = bytes(view[done : done + length])
                first = align_down(within, self.grain_size)
                if length < min(self.grain_size, self.size - first):
                    whole = bytearray(await self._grain(first))
                    whole[start : start + length] = piece
                    piece = bytes(whole)
                await self._append(first, piece)
                done += length

    async def _append(self, within: int, data: bytes) -> None:
        table = await self.need_table(within)
        stored = table.entries[within % self._table_span // self.grain_size] != UNALLOCATED
        if not stored and self._node.backing is None and io.is_zero(data):
            return
        await self._place(within, await offload(self.pack, data))

    def pack(self, data: Buffer) -> bytes:
        """A grain, or the extent's tail, compressed. In any thread."""
        return pack_grain_data(data, self.grain_size)

    async def write_packed(self, offset: int, packed: bytes) -> None:
        """Append what ``pack`` made of the grain at guest ``offset``."""
        async with self._turn:
            await self.need_table(offset - self.start)
            await self._place(offset - self.start, packed)

    async def _place(self, within: int, packed: bytes) -> None:
        if self.header.markers:
            packed = pack_grain(within // SECTOR, packed)
        packed = packed.ljust(align_up(len(packed), SECTOR), b"\0")
        place, _ = await self.space.take(len(packed))
        try:
            await io.write(self.storage, place, packed)
        except BaseException:
            self.space.give_back(place, len(packed))
            raise
        await self.set_entry(within, place // SECTOR)
        self._last = None
