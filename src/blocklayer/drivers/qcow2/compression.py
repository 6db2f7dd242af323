"""Compressed clusters: unpacking them for reads, packing and placing them for writes.

1. Packing runs in threads, placing in the order of the guest's clusters. What does not get smaller
   is stored plain.
2. The last few unpacked clusters are kept, by their L2 entry; they are forgotten when any
   compressed cluster is written or given up, since its host space may then hold other data.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2.entries import COMPRESSED, decode_compressed, encode_compressed
from blocklayer.codec.qcow2.header import COMPRESSION_ZSTD
from blocklayer.drivers.qcow2.packing import pack_cluster, packing_level, unpack_cluster
from blocklayer.errors import CorruptionError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer
from blocklayer.graph.waiting import in_place, offload

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.writing import Writer

_KEPT_MAX: Final = 4
_IN_FLIGHT_MAX: Final = 4
"""Clusters packed at once."""
_UNPACKED_AT_ONCE: Final = 32
"""Clusters of one request unpacked by one visit to a thread."""


class _Part(msgspec.Struct, gc=False):
    """A piece of a request: what is to be unpacked, and where to."""

    guest: int
    inside: int
    view: memoryview
    entry: int
    generation: int
    place: int
    length: int
    packed: memoryview = memoryview(b"")


class Compressor:
    """Compressed clusters of one image."""

    def __init__(self, image: Image, mapping: Mapping, writer: Writer) -> None:
        self._image = image
        self._mapping = mapping
        self._writer = writer
        self._size = image.geometry.cluster_size
        self._bits = image.geometry.cluster_bits
        self._zstd = image.header.compression_type == COMPRESSION_ZSTD
        self._type = "zstd" if self._zstd else "zlib"
        self._kept: dict[int, bytes] = {}
        self._kept_generation = -1

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, which lies within compressed clusters."""
        done, total = 0, len(view)
        parts: list[_Part] = []
        while done < total:
            at = offset + done
            inside = at & (self._size - 1)
            length = min(self._size - inside, total - done)
            part = await self._part(at - inside, inside, view[done : done + length])
            if part is not None:
                parts.append(part)
            done += length
            if len(parts) == _UNPACKED_AT_ONCE or (parts and done == total):
                await self._unpack(parts)
                parts = []

    async def _part(self, guest: int, inside: int, view: memoryview) -> _Part | None:
        """What must be unpacked to fill ``view`` from cluster ``guest``; None if it is filled."""
        image = self._image
        cache = image.slices
        number = guest >> self._bits
        found = await cache.get(number >> cache.bits)
        entry = found.entries[number & cache.mask] if found else 0
        if not entry & COMPRESSED:
            # Rewritten since the request looked: let it have what is there now.
            await io.read_into(image.node, guest + inside, view)
            return None
        generation = image.node.generation
        if self._kept_generation != generation:
            self._kept.clear()
            self._kept_generation = generation
        kept = self._kept.get(entry)
        if kept is not None:
            view[:] = kept[inside : inside + len(view)]
            return None
        place, length = decode_compressed(entry, image.geometry)
        return _Part(guest, inside, view, entry, generation, place, length)

    async def _load(self, parts: list[_Part]) -> None:
        """Read what is to be unpacked; neighbours at once."""
        first = 0
        while first < len(parts):
            start = parts[first].place
            end, last = start + parts[first].length, first + 1
            # The length is that of all sectors touched: the next one begins within the last.
            while last < len(parts) and start <= parts[last].place <= end:
                end = max(end, parts[last].place + parts[last].length)
                last += 1
            data = memoryview(await self._image.storage.read(start, end - start))
            for part in parts[first:last]:
                part.packed = data[part.place - start :][: part.length]
            first = last

    async def _unpack(self, parts: list[_Part]) -> None:
        """Unpack ``parts`` into their views; keep the last, which the next request may go on in."""
        await self._load(parts)
        last = await offload(self._unpack_all, parts)
        part = parts[-1]
        if part.generation == self._image.node.generation == self._kept_generation:
            while len(self._kept) >= _KEPT_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[part.entry] = last

    def _unpack_all(self, parts: list[_Part]) -> bytes:
        data = b""
        for part in parts:
            try:
                data = unpack_cluster(part.packed, self._size, zstd=self._zstd)
            except ValueError as error:
                raise CorruptionError(
                    f"'{self._image.node.filename}': compressed cluster of guest offset "
                    f"{part.guest:#x} at host offset {part.place:#x} cannot be unpacked: {error}"
                ) from None
            part.view[:] = data[part.inside : part.inside + len(part.view)]
        return data

    async def write(self, offset: int, data: Buffer) -> None:
        """Store whole clusters from ``offset`` on, each compressed if that makes it smaller."""
        view = memoryview(data).cast("B")
        parts = [view[at : at + self._size] for at in range(0, len(view), self._size)]
        if in_place():
            for number, part in enumerate(parts):
                await self._place(offset + number * self._size, part, self.pack(part))
            return
        packing: list[asyncio.Task[bytes | None]] = []
        try:
            for number, part in enumerate(parts):
                packing += [
                    asyncio.create_task(offload(self.pack, ahead))
                    for ahead in parts[number + len(packing) : number + _IN_FLIGHT_MAX]
                ]
                packed = await packing[0]
                del packing[0]
                await self._place(offset + number * self._size, part, packed)
        finally:
            for task in packing:
                task.cancel()
            await asyncio.gather(*packing, return_exceptions=True)

    def pack(self, part: Buffer, level: int | None = None) -> bytes | None:
        """The cluster compressed, or None if that gains nothing. In any thread."""
        level = packing_level(self._type, level)
        return pack_cluster(part, self._size, zstd=self._zstd, level=level)

    async def _place(self, offset: int, part: memoryview, packed: bytes | None) -> None:
        if packed is None:
            await self._writer.write_cluster(offset, bytes(part) + bytes(self._size - len(part)))
        else:
            await self.write_packed(offset, (packed,))

    async def write_packed(self, offset: int, parts: Sequence[bytes]) -> None:
        """Store what ``pack`` made of the clusters from ``offset`` on."""
        image, allocator = self._image, self._image.refcounts.allocator
        guest, shown = offset >> self._bits, 0
        places: list[int] = []
        async with image.lock:
            await self._writer.begin()
            try:
                while len(places) < len(parts):
                    places.append(await allocator.allocate_bytes(len(parts[len(places)])))
                # Stored under the lock: neighbours in one sector must not be written at once.
                await self._store(places, parts)
                while shown < len(parts):
                    await self._writer.ensure_table((guest + shown) >> image.geometry.l2_bits)
                    found, index = await self._writer.entries(guest + shown)
                    end = min(shown + len(found.entries) - index, len(parts))
                    entries = array("Q")
                    for place, packed in zip(places[shown:end], parts[shown:end], strict=True):
                        entries.append(encode_compressed(place, len(packed), image.geometry))
                    self._writer.publish(found, index, guest + shown, entries)
                    shown = end
            except BaseException:
                for place, packed in zip(places[shown:], parts[shown:], strict=False):
                    await allocator.release_bytes(place, len(packed))
                raise

    async def _store(self, places: Sequence[int], parts: Sequence[bytes]) -> None:
        """Write ``parts``, those that meet at once."""
        first = 0
        for last, place in enumerate(places):
            end = place + len(parts[last])
            if last + 1 == len(places) or places[last + 1] != end:
                await self._image.storage.write(places[first], *parts[first : last + 1])
                first = last + 1
