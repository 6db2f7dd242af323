"""Zeroing, discarding and emptying: changes of the mapping that move no data.

1. What a range read before never shows again: a discarded cluster reads as zeros, or, where there
   is nothing below to hide, as an unallocated one does. Only ``empty`` lets lower layers through.
2. Ranges are whole clusters (subclusters, with extended L2 entries); the last one may end at the
   end of the disk.
3. In a raw data file the zeros themselves are put, and no entry changes: whatever reaches stable
   storage first, the file and the image tell the same.
4. Space in a data file is given back as zeros, by the request itself: the same guest cluster may
   take it again at once. That of cipher text is kept (``Image.frees_in_place``).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import msgspec

from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.drivers.qcow2.frees import Reason
from blocklayer.drivers.qcow2.slices import Slice
from blocklayer.errors import UnsupportedError

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.writing import Writer

_HELD = OFFSET_MASK | COMPRESSED | COPIED


class Change(msgspec.Struct, frozen=True):
    """What becomes of entries."""

    zero: bool
    """Zeros are read; otherwise what is below shows through."""
    frees: bool
    """Space that is the entry's own goes; otherwise it stays. Compressed data goes always."""
    held_only: bool = False
    """What holds no data stays as it is."""

    def entry(self, old: int) -> int:
        """The entry to replace ``old``, in an image with standard entries."""
        if self.held_only and not old & _HELD:
            return old
        zero = ZERO if self.zero else 0
        return zero if self.frees or old & COMPRESSED else old | zero


_ZERO_KEPT = Change(zero=True, frees=False)
_ZERO_FREED = Change(zero=True, frees=True)
_UNALLOCATED = Change(zero=False, frees=True)
_ZERO_FREED_IF_HELD = Change(zero=True, frees=True, held_only=True)
_ZERO_KEPT_IF_HELD = Change(zero=True, frees=False, held_only=True)


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
        change = _ZERO_FREED if freed else _ZERO_KEPT
        if freed:
            await self._free_data(offset, length)
        await self._change(offset, length, change, Reason.REQUEST)

    async def _free_data(self, offset: int, length: int) -> None:
        """Give back a range that is to read as zeros, if it lies in a data file."""
        image = self._image
        if image.geometry.data_file and image.frees_in_place:
            await image.data.free(offset, length)

    async def _unallocate(self, offset: int, length: int) -> None:
        """All that version 2, which has no zero clusters, can do, and only over no backing file."""
        if self._hides():
            raise UnsupportedError(
                f"'{self._image.node.filename}' has no zero clusters (version 2) to hide "
                "its backing file with"
            )
        await self._change(offset, length, _UNALLOCATED, Reason.REQUEST, sparse=True)

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
            change = _ZERO_FREED if hides else _ZERO_FREED_IF_HELD
            await self._change(offset, length, change, Reason.REQUEST, sparse=not hides)

    async def _discard_kept(self, offset: int, length: int) -> None:
        """Zero the clusters but keep their places, and hand the space in them down."""
        places = await self._places(offset, offset + length)
        hides = self._hides()
        change = _ZERO_KEPT if hides else _ZERO_KEPT_IF_HELD
        await self._change(offset, length, change, Reason.REQUEST, sparse=not hides)
        if self._image.frees_in_place:
            for place, size in places:
                await self._image.data.discard(place, size)

    async def _places(self, offset: int, end: int) -> list[tuple[int, int]]:
        """Host (offset, length) of what the range has of its own."""
        places: list[tuple[int, int]] = []
        while offset < end:
            extent = await self._mapping.map(offset, end - offset)
            if extent.writable and extent.host_offset is not None:
                places.append((extent.host_offset, extent.length))
            offset += extent.length
        return places

    async def drop(self, offset: int, length: int) -> None:
        """Let whole clusters be unallocated, whatever shows through then."""
        await self._change(offset, length, _UNALLOCATED, Reason.ALWAYS, sparse=True)

    async def _change(
        self,
        offset: int,
        length: int,
        change: Change,
        reason: Reason,
        *,
        sparse: bool = False,
    ) -> None:
        """Replace the entries of the range; ``sparse``: none are needed where no table is."""
        image, bits = self._image, self._bits
        cache = image.slices
        cluster, last = offset >> bits, (offset + length - 1) >> bits
        while cluster <= last:
            # The lock is given up between slices: a large range must not stop everybody else.
            async with image.lock:
                await self._writer.begin()
                table = cluster >> image.geometry.l2_bits
                if sparse and not image.l2_table(table):
                    cluster = (table + 1) << image.geometry.l2_bits
                    continue
                count = min(last + 1 - cluster, cache.entries - (cluster & cache.mask))
                found = await cache.get(cluster >> cache.bits)
                index = cluster & cache.mask
                old = found or Slice.empty(cache.entries, image.geometry)
                new, bitmaps = self._changed(change, old, cluster, count, offset, offset + length)
                if (new, bitmaps) != old.part(index, count):
                    await self._writer.ensure_table(table)
                    found, index = await self._writer.entries(cluster)
                    self._writer.publish(found, index, cluster, new, reason, bitmaps=bitmaps)
                cluster += count

    def _changed(
        self, change: Change, old: Slice, cluster: int, count: int, start: int, end: int
    ) -> tuple[array[int], array[int] | None]:
        """What to put in place of ``count`` entries from guest ``cluster`` on, and their bitmaps.

        ``[start, end)`` are the guest bytes that are to change.
        """
        index = cluster & self._image.slices.mask
        entries = old.entries[index : index + count]
        if entries.count(entries[0]) == count:
            return array("Q", (change.entry(entries[0]),)) * count, None
        return array("Q", map(change.entry, entries)), None

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
