"""Zeroing, discarding and emptying: changes of the mapping that move no data.

1. What a range read before never shows again: a discarded cluster reads as zeros, or, where there
   is nothing below to hide, as an unallocated one does. Only ``empty`` lets lower layers through.
2. Ranges are whole clusters; the last one may end at the end of the disk.
3. In a raw data file the zeros themselves are put, and no entry changes: whatever reaches stable
   storage first, the file and the image tell the same.
4. Space in a data file is given back as zeros, by the request itself: the same guest cluster may
   take it again at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.drivers.qcow2.frees import Reason
from blocklayer.errors import UnsupportedError

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.writing import Writer

_HELD = OFFSET_MASK | COMPRESSED | COPIED


def _zero_kept(entry: int) -> int:
    """Reads as zeros; space of its own stays, compressed data does not."""
    return ZERO if entry & COMPRESSED else entry | ZERO


def _zero_freed(entry: int) -> int:
    return ZERO


def _unallocated(entry: int) -> int:
    return 0


def _zero_freed_if_held(entry: int) -> int:
    return ZERO if entry & _HELD else entry


def _zero_kept_if_held(entry: int) -> int:
    return _zero_kept(entry) if entry & _HELD else entry


class Zeroer:
    """Drops guest data of one image."""

    def __init__(self, image: Image, mapping: Mapping, writer: Writer) -> None:
        self._image = image
        self._mapping = mapping
        self._writer = writer
        self._bits = image.geometry.cluster_bits
        self._version = image.header.version

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make whole clusters read as zeros; see ``Driver.zero``."""
        if self._version < 3:
            await self._unallocate(offset, length)
            return
        if self._image.data_file_raw:
            await self._image.data.zero(offset, length, unmap=unmap)
            return
        freed = unmap and not self._image.settings.discard_no_unref
        change = _zero_freed if freed else _zero_kept
        if freed:
            await self._free_data(offset, length)
        await self._change(offset, length, change, Reason.REQUEST)

    async def _free_data(self, offset: int, length: int) -> None:
        """Give back a range that is to read as zeros, if it lies in a data file."""
        image = self._image
        if image.geometry.data_file and image.settings.discard_request:
            await image.data.free(offset, length)

    async def _unallocate(self, offset: int, length: int) -> None:
        """All that version 2, which has no zero clusters, can do, and only over no backing file."""
        if self._hides():
            raise UnsupportedError(
                f"'{self._image.node.filename}' has no zero clusters (version 2) to hide "
                "its backing file with"
            )
        await self._change(offset, length, _unallocated, Reason.REQUEST, sparse=True)

    def _hides(self) -> bool:
        """Whether something below would show through an unallocated cluster."""
        return self._image.node.backing is not None or bool(self._image.header.backing_file)

    async def discard(self, offset: int, length: int) -> None:
        """Give the space of whole clusters back; see ``Driver.discard``."""
        hides = self._hides()
        if self._version < 3:
            await self._unallocate(offset, length)
        elif self._image.data_file_raw:
            await self._free_data(offset, length)
        elif self._image.settings.discard_no_unref:
            await self._discard_kept(offset, length)
        else:
            await self._free_data(offset, length)
            change = _zero_freed if hides else _zero_freed_if_held
            await self._change(offset, length, change, Reason.REQUEST, sparse=not hides)

    async def _discard_kept(self, offset: int, length: int) -> None:
        """Zero the clusters but keep their places, and hand the space in them down."""
        end = offset + length
        places: list[tuple[int, int]] = []
        at = offset
        while at < end:
            extent = await self._mapping.map(at, end - at)
            if extent.writable and extent.host_offset is not None:
                places.append((extent.host_offset, extent.length))
            at += extent.length
        hides = self._hides()
        change = _zero_kept if hides else _zero_kept_if_held
        await self._change(offset, length, change, Reason.REQUEST, sparse=not hides)
        if self._image.settings.discard_request:
            for place, size in places:
                await self._image.data.discard(place, size)

    async def drop(self, offset: int, length: int) -> None:
        """Let whole clusters be unallocated, whatever shows through then."""
        await self._change(offset, length, _unallocated, Reason.ALWAYS, sparse=True)

    async def _change(
        self,
        offset: int,
        length: int,
        change: Callable[[int], int],
        reason: Reason,
        *,
        sparse: bool = False,
    ) -> None:
        """Replace the entries of the range; ``sparse``: none are needed where no table is."""
        image, bits = self._image, self._bits
        cache = image.slices
        cluster, end = offset >> bits, (offset + length + (1 << bits) - 1) >> bits
        while cluster < end:
            # The lock is given up between slices: a large range must not stop everybody else.
            async with image.lock:
                await self._writer.begin()
                table = cluster >> image.geometry.l2_bits
                if sparse and not image.l2_table(table):
                    cluster = (table + 1) << image.geometry.l2_bits
                    continue
                count = min(end - cluster, cache.entries - (cluster & cache.mask))
                found = await cache.get(cluster >> cache.bits)
                index = cluster & cache.mask
                old = (
                    found.entries[index : index + count] if found else array("Q", bytes(8 * count))
                )
                new = _mapped(change, old)
                if new != old:
                    await self._writer.ensure_table(table)
                    found, index = await self._writer.entries(cluster)
                    self._writer.publish(found, index, cluster, new, reason)
                cluster += count

    async def empty(self) -> None:
        """Drop all that this layer holds, tables included."""
        image = self._image
        if image.data_file_raw:
            raise UnsupportedError(
                f"'{image.node.filename}' cannot be emptied: its data file is raw, and nothing "
                "shows through it"
            )
        for l1_index in range(len(image.l1)):
            if not image.l1[l1_index]:
                continue
            async with image.lock:
                await self._writer.begin()
                await self.drop_table(l1_index, Reason.SNAPSHOT)
        async with image.lock:
            await flushing.flush(image)
        image.trim = True

    async def drop_table(self, l1_index: int, reason: Reason) -> None:
        """Give up an L2 table and all that it holds. Needs the lock."""
        image = self._image
        geometry = image.geometry
        table = image.l2_table(l1_index)
        if not table:
            return
        runs = [(table >> self._bits, 1)]
        first = l1_index << geometry.l2_bits
        cache = image.slices
        for key in range(first >> cache.bits, (first + geometry.l2_entries) >> cache.bits):
            found = await cache.get(key)
            assert found is not None
            runs += self._mapping.references(found.entries, key << cache.bits)
        # From here on nothing can fail: the table goes as a whole.
        image.set_l1(l1_index, 0)
        image.slices.forget(l1_index)
        image.overlap.remove(overlap.ACTIVE_L2, table, geometry.cluster_size)
        image.node.mapping_changed()
        image.frees.add(runs, reason)


def _mapped(change: Callable[[int], int], old: array[int]) -> array[int]:
    if old.count(old[0]) == len(old):
        return array("Q", (change(old[0]),)) * len(old)
    return array("Q", map(change, old))
