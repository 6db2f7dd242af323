"""Resizing: larger and smaller disks, larger L1 tables, and space set aside in advance.

1. A larger size is in the header only after what it exposes reads as zeros; a smaller one before
   anything past it is dropped. A crash in between leaks, and changes no guest byte.
2. A data file is as long as the disk; the new part of a raw one is mapped, and reads as zeros in
   itself.
3. A new L1 table is complete and durable before the header names it, and the old one free only
   after.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.entries import COPIED, ZERO, store_table
from blocklayer.codec.qcow2.geometry import MAX_L1_TABLE_SIZE
from blocklayer.codec.qcow2.subclusters import ALLOCATED
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.drivers.qcow2.frees import Reason
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.extent import Kind
from blocklayer.units import MIB, SECTOR, align_down, align_up

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.writing import Writer
    from blocklayer.drivers.qcow2.zeroing import Zeroer

_CHUNK = 64 * MIB


class Resizer:
    """Changes the size of one image."""

    def __init__(self, image: Image, mapping: Mapping, writer: Writer, zeroer: Zeroer) -> None:
        self._image = image
        self._mapping = mapping
        self._writer = writer
        self._zeroer = zeroer
        self._bits = image.geometry.cluster_bits
        self._size = image.geometry.cluster_size
        self._unit = image.geometry.subcluster_size

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the disk's size; see ``Driver.truncate``."""
        image = self._image
        old = image.header.size
        if size % SECTOR:
            raise UsageError("The new size must be a multiple of 512")
        if size == old:
            return
        if not size and any(each.persistent for each in image.node.dirty_bitmaps.values()):
            raise UnsupportedError("Can't resize an image which has persistent bitmaps to 0 bytes")
        if image.snapshots and image.header.version < 3:
            raise UnsupportedError("Can't resize a v2 image which has snapshots")
        if size < old:
            if preallocation != "off":
                raise UnsupportedError("Preallocation can't be used for shrinking an image")
            if not shrink:
                raise UsageError(
                    f"Shrinking '{image.node.filename}' from {old} to {size} bytes loses what is "
                    "past the new end; it must be asked for"
                )
            await self._shrink(size)
        else:
            extended = image.geometry.extended_l2
            if preallocation != "off" and self._hides() and not extended:
                raise UnsupportedError(
                    "Preallocation of a grown area is not supported beside a backing file"
                )
            await self._grow(old, size, preallocation)

    def _hides(self) -> bool:
        return bool(self._image.header.backing_file) or self._image.node.backing is not None

    async def _grow(self, old: int, size: int, preallocation: str) -> None:
        image = self._image
        await self.reach(size)
        await self._drop_tables(image.geometry.l1_entries(old))
        if image.geometry.data_file:
            await self._grow_data_file(old, size, preallocation)
        if image.data_file_raw:
            await self.preallocate(align_down(old, self._size), size, "metadata")
        else:
            await self._clear_exposed(old, size)
            if preallocation != "off":
                await self.preallocate(align_up(old, self._size), size, preallocation)
        async with image.lock:
            await flushing.flush(image)
            await image.update_header(size=size)
            image.node.mapping_changed()

    async def reach(self, end: int) -> None:
        """Have an L1 table that can map everything before ``end``."""
        image = self._image
        needed = image.geometry.l1_entries(end)
        if needed * 8 > MAX_L1_TABLE_SIZE:
            raise UsageError(
                f"The image size is too large for cluster size {self._size} "
                f"(at most {image.geometry.max_size} bytes)"
            )
        async with image.lock:
            await self._writer.begin()
            if needed > len(image.l1):
                await self.grow_l1(needed)

    async def _drop_tables(self, kept: int) -> None:
        """Give up all L2 tables from index ``kept`` on: behind the disk lies VM state."""
        image = self._image
        for l1_index in range(kept, len(image.l1)):
            if image.l1[l1_index]:
                async with image.lock:
                    await self._writer.begin()
                    await self._zeroer.drop_table(l1_index, Reason.ALWAYS)

    async def _grow_data_file(self, old: int, size: int, preallocation: str) -> None:
        """Let the data file be as long as the disk, and in what it gains read as zeros."""
        data = self._image.data
        allocated = preallocation in ("falloc", "full")
        if data.size > old:
            await data.zero(old, size - old, unmap=not allocated)
        if data.size < size:
            await data.truncate(size, preallocation if allocated else "off")

    async def _clear_exposed(self, old: int, size: int) -> None:
        """Make ``[old, size)`` read as zeros: the rest of the last cluster, and what is below."""
        backing = self._image.node.backing
        exposes = backing is not None and backing.size > old
        start = align_down(old, self._unit)
        if start < old:
            await self._clear_tail(start, old, exposes)
        start = align_up(old, self._size)
        await self._clear_rest(align_up(old, self._unit), start, exposes)
        if backing is None or backing.size <= start:
            return
        end = min(align_up(size, self._size), align_up(backing.size, self._size))
        if self._image.header.version >= 3:
            await self._zeroer.zero(start, end - start, unmap=False)
            return
        while start < end:
            step = min(end - start, _CHUNK)
            await self._writer.write_cluster(start, io.zeros(step))
            start += step

    async def _clear_rest(self, start: int, end: int, exposes: bool) -> None:
        """Let the last cluster's subclusters past the old size read as zeros."""
        at = start
        while at < end:
            extent = await self._mapping.map(at, end - at)
            if extent.kind is not Kind.ZERO and (extent.kind is not Kind.UNALLOCATED or exposes):
                await self._zeroer.zero(start, end - start, unmap=False)
                return
            at += extent.length

    async def _clear_tail(self, start: int, old: int, exposes: bool) -> None:
        """Zero what the cluster (or subcluster) that the old size ends in holds past it."""
        extent = await self._mapping.map(start, self._unit)
        if extent.kind is Kind.ZERO or (extent.kind is Kind.UNALLOCATED and not exposes):
            return
        plain = self._image.encryption is None
        if plain and extent.writable and extent.host_offset is not None:
            inside = old - start
            await self._image.data.write(extent.host_offset + inside, io.zeros(self._unit - inside))
            return
        kept = await io.read(self._image.node, start, old - start)
        await self._writer.write_cluster(start, kept + bytes(self._unit - len(kept)))

    async def preallocate(self, start: int, end: int, mode: str) -> None:
        """Give every unallocated cluster of ``[start, end)`` space that reads as zeros."""
        image, bits = self._image, self._bits
        if image.encryption is not None and image.header.version < 3:
            raise UnsupportedError(
                "Preallocation of an encrypted image needs compatibility level 1.1 or above"
            )
        cluster, last = start >> bits, align_up(end, self._size) >> bits
        while cluster < last:
            async with image.lock:
                await self._writer.begin()
                table = cluster >> image.geometry.l2_bits
                await self._writer.ensure_table(table)
                count = min(last, (table + 1) << image.geometry.l2_bits) - cluster
                count = min(count, max(1, _CHUNK >> bits))
                if image.geometry.data_file:
                    host = cluster
                else:
                    host, count = await self._allocate(count, mode)
                while count:
                    found, index = await self._writer.entries(cluster)
                    part = min(count, len(found.entries) - index)
                    first = self._preallocated | (host << bits)
                    entries = array("Q", range(first, first + (part << bits), self._size))
                    # Subclusters that hide what is below go on doing so.
                    _, bitmaps = found.part(index, part)
                    if bitmaps is not None and image.data_file_raw:
                        bitmaps = array("Q", (ALLOCATED,)) * part
                    self._writer.publish(found, index, cluster, entries, bitmaps=bitmaps)
                    cluster, host, count = cluster + part, host + part, count - part

    async def _allocate(self, count: int, mode: str) -> tuple[int, int]:
        """Up to ``count`` clusters that read as zeros: the first, and how many there are."""
        allocator, bits = self._image.refcounts.allocator, self._bits
        host, count = await allocator.allocate(count)
        try:
            await self._reserve(host << bits, count << bits, mode)
        except BaseException:
            await self._image.refcounts.release(host, count)
            raise
        return host, count

    @property
    def _preallocated(self) -> int:
        """The flags of clusters that were never written: decrypted, zeros are garbage."""
        plain = self._image.encryption is None or self._image.geometry.extended_l2
        # (With extended L2 entries it is the bitmap that says so.)
        return COPIED if plain else COPIED | ZERO

    async def _reserve(self, offset: int, length: int, mode: str) -> None:
        """Make host space read as zeros, and be there as ``mode`` says."""
        storage = self._image.storage
        end = offset + length
        known = storage.size
        if offset < known:
            await storage.zero(offset, min(end, known) - offset)
        if end > known:
            await storage.truncate(end, "off" if mode == "metadata" else mode)

    async def grow_l1(self, entries: int) -> None:
        """Move to an L1 table of ``entries`` entries. Needs the lock."""
        image = self._image
        # The copy must not point at tables that are not durable.
        await flushing.flush(image)
        table = image.l1[:]
        table.extend(array("Q", bytes(8 * (entries - len(table)))))
        clusters = image.geometry.cluster_count(entries * 8)
        first = await image.refcounts.allocator.allocate_exactly(clusters)
        offset = first << self._bits
        try:
            data = store_table(table)
            await image.storage.write(offset, data, bytes(-len(data) % self._size))
            await flushing.write_refcounts(image)
            await image.barrier()
            old = image.header.l1_table_offset, image.header.l1_size
            await image.update_header(l1_table_offset=offset, l1_size=entries)
        except BaseException:
            if image.node.poisoned is None:
                await image.refcounts.release(first, clusters)
            raise
        image.l1 = table
        image.overlap.remove(overlap.ACTIVE_L1, old[0], old[1] * 8)
        image.overlap.add(overlap.ACTIVE_L1, offset, entries * 8)
        # The header on stable storage names the new table, so the old one is free at once.
        if old[0]:
            count = image.geometry.cluster_count(old[1] * 8)
            await image.refcounts.release(old[0] >> self._bits, count)

    async def _shrink(self, size: int) -> None:
        image, geometry = self._image, self._image.geometry
        old = image.header.size
        async with image.lock:
            await self._writer.begin()
            await flushing.flush(image)
            await image.update_header(size=size)
            image.node.mapping_changed()
        kept = geometry.l1_entries(size)
        end = min(kept * geometry.l1_entry_span, align_up(old, self._size))
        start = align_up(size, self._unit)
        if start < end:
            await self._zeroer.drop(start, end - start)
        await self._drop_tables(kept)
        async with image.lock:
            await flushing.flush(image)
            await self._shrink_l1(kept)
            await flushing.flush(image)
        if geometry.data_file and image.data.size > size:
            await image.data.truncate(size)
        # What was dropped may still be in use by requests: the file itself is cut at close.
        image.trim = True

    async def _shrink_l1(self, entries: int) -> None:
        """Give up the clusters of the L1 table past ``entries``; those entries are empty."""
        image = self._image
        old = len(image.l1)
        if entries >= old:
            return
        await image.update_header(l1_size=entries)
        image.l1 = image.l1[:entries]
        kept = image.geometry.cluster_count(entries * 8)
        count = image.geometry.cluster_count(old * 8) - kept
        if count:
            offset = image.header.l1_table_offset + (kept << self._bits)
            image.overlap.remove(overlap.ACTIVE_L1, offset, count << self._bits)
            await image.refcounts.release(offset >> self._bits, count)
