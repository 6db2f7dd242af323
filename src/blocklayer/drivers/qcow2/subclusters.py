"""Mapping and allocation with extended L2 entries, where each of 32 subclusters is by itself.

1. A cluster is still what is allocated, shared and counted; its subclusters only say which parts of
   it hold data. Bits in a bitmap change where entries do: in ``Writer.publish``.
2. A cluster that is the image's alone is written where it is: what is not allocated there, or reads
   as zeros, is filled first and shown by ``commit``. Any other is replaced by a new one, and what
   the old one holds is copied into it.
3. In a data file every cluster is the image's alone, at its guest offset, also one that has no
   entry yet.
4. What a plain write can reach without a claim is never read to be written back.
5. One allocation settles all that a write needs of a cluster. A caller that has not committed one
   must not ask for another in the same cluster; ``graph.io`` and ``jobs`` ask for whole clusters.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, ClusterKind
from blocklayer.codec.qcow2.subclusters import (
    ALLOCATED,
    COUNT,
    ZEROED,
    between,
    bitmap_problem,
    run_end,
    subcluster_kind,
    uniform,
)
from blocklayer.drivers.qcow2.mapping import Mapping
from blocklayer.drivers.qcow2.slices import Slice
from blocklayer.drivers.qcow2.writing import Space, Writer
from blocklayer.drivers.qcow2.zeroing import Change, Zeroer
from blocklayer.errors import CorruptionError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.waiting import offload
from blocklayer.units import align_down, align_up

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image


class SubclusterMapping(Mapping):
    """Answers ``map`` for an image with extended L2 entries."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self._sub_bits = image.geometry.subcluster_bits
        # The bitmap says what reads as zeros.
        self._bad |= ZERO

    async def map(self, offset: int, length: int) -> Extent:
        """The extent at ``offset``."""
        image, cache = self._image, self._image.slices
        cluster = offset >> self._bits
        found = cache.slices.get(cluster >> cache.bits)
        if found is None:
            found = await cache.get(cluster >> cache.bits)
        else:
            found.used = True
        index = cluster & cache.mask
        entry, bitmap = _words(found, index)
        if entry or bitmap:
            self.check_bitmap(entry, bitmap, cluster)
        inside = offset & self._cluster_mask
        if entry & COMPRESSED:
            assert found is not None
            need = (inside + length + self._cluster_mask) >> self._bits
            count = found.compressed_end(index, min(cache.entries, index + need)) - index
            length = min(length, (count << self._bits) - inside)
            return Extent(offset, length, Kind.OPAQUE, compressed=True)
        number = inside >> self._sub_bits
        kind = subcluster_kind(entry, bitmap, number, image.geometry)
        writable = kind is ClusterKind.NORMAL and bool(entry & COPIED) and image.writable
        if writable:
            assert found is not None
            if found.checked != image.overlap.version:
                await self._verify(found, offset)
                return await self.map(offset, length)
        end = run_end(bitmap, number)
        known = (end << self._sub_bits) - inside
        if end == COUNT and known < length:
            generation = image.node.generation
            like = uniform(bitmap, number)
            known += await self._following(cluster, entry, like, length - known, writable)
            if generation != image.node.generation:
                # Something moved while slices were read: answer for what is known now.
                return await self.map(offset, min(length, self._cluster_size - inside))
        return self._subcluster_extent(kind, entry, offset, min(length, known), writable)

    async def _following(
        self, cluster: int, entry: int, like: int, length: int, writable: bool
    ) -> int:
        """For how many of the ``length`` bytes after ``cluster`` the mapping goes on.

        ``like``: the bitmap of a cluster that goes on with all its subclusters.
        """
        image, cache = self._image, self._image.slices
        step = self._cluster_size if entry & self._held else 0
        first, need = cluster + 1, (length + self._cluster_mask) >> self._bits
        count = 0
        while count < need:
            at = first + count
            found = cache.slices.get(at >> cache.bits)
            if found is None and image.l2_table(at >> self._l2_bits):
                if count:
                    break
                found = await cache.get(at >> cache.bits)
            if writable and (found is None or found.checked != image.overlap.version):
                # Promise no more than was verified.
                break
            here, bitmap = _words(found, at & cache.mask)
            if here != entry + (count + 1) * step:
                break
            if bitmap != like:
                if uniform(bitmap, 0) != like or bitmap_problem(here, bitmap, image.geometry):
                    break
                return (count << self._bits) + (run_end(bitmap, 0) << self._sub_bits)
            count += await self._run(at, need - count, here, step, bitmap)
        return count << self._bits

    def _subcluster_extent(
        self, kind: ClusterKind, entry: int, offset: int, length: int, writable: bool
    ) -> Extent:
        place = child = None
        if entry & self._held:
            place = (entry & OFFSET_MASK) + (offset & self._cluster_mask)
            child = self._image.data.child
        if kind is ClusterKind.UNALLOCATED:
            return Extent(offset, length, self._hole, place, child)
        if kind is ClusterKind.NORMAL:
            return Extent(offset, length, Kind.DATA, place, child, writable, recurse=True)
        return Extent(offset, length, Kind.ZERO, place, child)

    def check_bitmap(self, entry: int, bitmap: int, cluster: int) -> None:
        """Raise CorruptionError if what describes guest cluster ``cluster`` cannot be followed."""
        if entry & (self._bad | COMPRESSED) or self._data_file:
            self.check(entry, cluster)
        problem = bitmap_problem(entry, bitmap, self._image.geometry)
        if problem is not None:
            raise CorruptionError(
                f"L2 entry {entry:#018x} of guest offset {cluster << self._bits:#x}: {problem}"
            )


def _words(found: Slice | None, index: int) -> tuple[int, int]:
    """Entry and bitmap; those of nothing where there is no slice."""
    if found is None:
        return 0, 0
    assert found.bitmaps is not None
    return found.entries[index], found.bitmaps[index]


class SubclusterWriter(Writer):
    """Changes the mapping of an image with extended L2 entries."""

    _mapping: SubclusterMapping

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Set space aside for a write; see ``FormatDriver.allocate``.

        The write may cover subclusters that have their data in place, but starts in no such one.
        """
        image, bits = self._image, self._bits
        async with image.lock:
            await self.begin()
            guest = offset >> bits
            entries, bitmaps = await self._described(guest, self._clusters(guest, offset, length))
            own = image.geometry.data_file or _is_own(entries[0])
            if image.geometry.data_file:
                host, count = guest, len(entries)
            elif own:
                host, count = (entries[0] & OFFSET_MASK) >> bits, self._alike(entries, own)
                image.overlap.check(host << bits, count << bits)
            else:
                host, count = await image.refcounts.allocator.allocate(self._alike(entries, own))
            end = min(offset + length, (guest + count) << bits)
            if own:
                end = self._before_data(offset, end, bitmaps[((end - 1) >> bits) - guest])
            start = align_down(offset, image.geometry.subcluster_size)
            stop = align_up(end, image.geometry.subcluster_size)
            if not own:
                start = min(start, self._held(guest, entries[0], bitmaps[0])[0])
                last = count - 1
                stop = max(stop, self._held(guest + last, entries[last], bitmaps[last])[1])
            space = Space(guest, host, count, own, start, stop)
            reads_zero = not own and host << bits >= image.storage.size
            if image.geometry.data_file:
                stop = max(end, min(stop, image.data_end))
            else:
                await image.storage.reserve((host + count) << bits)
            place = (host << bits) + start - (guest << bits)
            allocation = Allocation(
                offset, end - offset, image.data.child, place,
                offset - start, stop - end, reads_zero, space,
            )  # fmt: skip
            if image.encryption is not None:
                image.encryption.prepare(allocation)
            return allocation

    async def _described(self, guest: int, count: int) -> tuple[array[int], array[int]]:
        """Entries and bitmaps of up to ``count`` clusters from ``guest`` on, checked."""
        cache = self._image.slices
        index = guest & cache.mask
        count = min(count, cache.entries - index)
        found = await cache.get(guest >> cache.bits)
        if found is None:
            found = Slice.empty(cache.entries, self._image.geometry)
        entries, bitmaps = found.part(index, count)
        assert bitmaps is not None
        for number, (entry, bitmap) in enumerate(zip(entries, bitmaps, strict=True)):
            if entry or bitmap:
                self._mapping.check_bitmap(entry, bitmap, guest + number)
        return entries, bitmaps

    def _alike(self, entries: array[int], own: bool) -> int:
        """How many of the clusters can be had at once: all own, in a row, or all to be replaced."""
        count = 1
        if own:
            step = 1 << self._bits
            while count < len(entries) and entries[count] == entries[0] + count * step:
                count += 1
        else:
            while count < len(entries) and not _is_own(entries[count]):
                count += 1
        return count

    def _before_data(self, offset: int, end: int, bitmap: int) -> int:
        """``end``, or where the subcluster starts that it cuts, if that has its data in place.

        The rest of it must not be copied: others may write it meanwhile, without a claim.
        """
        last = (end & ((1 << self._bits) - 1)) >> self._image.geometry.subcluster_bits
        start = align_down(end, self._image.geometry.subcluster_size)
        return start if bitmap >> last & 1 and start > offset else end

    def _held(self, guest: int, entry: int, bitmap: int) -> tuple[int, int]:
        """The guest bytes [start, end) that the cluster holds; (end, start) if it holds none."""
        start, end = guest << self._bits, (guest + 1) << self._bits
        if entry & COMPRESSED:
            return start, end
        held = bitmap & ALLOCATED
        if not held:
            return end, start
        bits = self._image.geometry.subcluster_bits
        first = (held & -held).bit_length() - 1
        return start + (first << bits), start + (held.bit_length() << bits)

    def _bitmaps(self, space: Space, found: Slice, index: int, count: int) -> array[int]:
        """The bitmaps of the next ``count`` clusters of ``space``, with what it holds allocated."""
        assert found.bitmaps is not None
        bits, sub_bits = self._bits, self._image.geometry.subcluster_bits
        bitmaps = array("Q", (ALLOCATED,)) * count
        for number in {0, count - 1}:
            base = (space.guest + number) << bits
            first = max(space.start - base, 0) >> sub_bits
            end = min(space.end - base, 1 << bits) >> sub_bits
            covered = between(first, end)
            old = found.bitmaps[index + number]
            bitmaps[number] = (old | covered) & ~(covered << COUNT)
        return bitmaps

    async def write_cluster(self, offset: int, data: Buffer) -> None:
        """Store whole subclusters from ``offset`` on, whatever was there before."""
        node, view = self._image.node, memoryview(data)
        while view:
            allocation = await self.allocate(offset, len(view))
            part = view[: allocation.length]
            try:
                head = await io.read_around(node, offset - allocation.head, allocation.head)
                tail = await io.read_around(node, offset + len(part), allocation.tail)
                stored: list[Buffer] = [head, part, tail]
                if allocation.seal is not None:
                    stored = [await offload(allocation.seal, b"".join(stored))]
                await self._image.data.write(allocation.host_offset, *stored)
                await self.commit(allocation)
            except BaseException:
                await self.abort(allocation)
                raise
            offset += len(part)
            view = view[len(part) :]


def _is_own(entry: int) -> bool:
    """Whether the cluster can be written where it is."""
    return bool(entry & COPIED and entry & OFFSET_MASK and not entry & COMPRESSED)


class SubclusterZeroer(Zeroer):
    """Drops guest data of an image with extended L2 entries."""

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make whole subclusters read as zeros; see ``Driver.zero``."""
        for start in self._in_part(offset, offset + length):
            extent = await self._mapping.map(start, 1)
            if extent.compressed:
                # It has no bitmap to note zeros in.
                data = await io.read_around(self._image.node, start, 1 << self._bits)
                await self._writer.write_cluster(start, data)
        await super().zero(offset, length, unmap=unmap)

    def _in_part(self, offset: int, end: int) -> list[int]:
        """Where the clusters start of which ``[offset, end)`` covers only a part."""
        size = 1 << self._bits
        if end == self._image.header.size:
            end = align_up(end, size)
        edges = {align_down(edge, size) for edge in (offset, end) if edge % size}
        return sorted(edges)

    async def discard(self, offset: int, length: int) -> None:
        """Give the space of whole subclusters back; see ``Driver.discard``."""
        places: list[tuple[int, int]] = []
        takes_back = self._image.frees_in_place and not self._image.settings.discard_no_unref
        if takes_back and not self._image.geometry.data_file:
            # Clusters that stay are not given up as others are: what is unused in them is.
            for start in self._in_part(offset, offset + length):
                low, high = max(start, offset), min(start + (1 << self._bits), offset + length)
                places += await self._places(low, high)
        await super().discard(offset, length)
        for place, size in places:
            await self._image.storage.discard(place, size)

    def _changed(
        self, change: Change, old: Slice, cluster: int, count: int, start: int, end: int
    ) -> tuple[array[int], array[int] | None]:
        """See ``Zeroer``."""
        entries, bitmaps = old.part(cluster & self._image.slices.mask, count)
        assert bitmaps is not None
        bits, sub_bits = self._bits, self._image.geometry.subcluster_bits
        if end == self._image.header.size:
            end = align_up(end, 1 << bits)
        whole = cluster << bits >= start and (cluster + count) << bits <= end
        alike = entries.count(entries[0]) == count and bitmaps.count(bitmaps[0]) == count
        if whole and alike:
            entry, bitmap = subclusters_changed(change, entries[0], bitmaps[0], ALLOCATED)
            return array("Q", (entry,)) * count, array("Q", (bitmap,)) * count
        for number in range(count):
            base = (cluster + number) << bits
            first = max(start - base, 0) >> sub_bits
            covered = between(first, min(end - base, 1 << bits) >> sub_bits)
            entries[number], bitmaps[number] = subclusters_changed(
                change, entries[number], bitmaps[number], covered
            )
        return entries, bitmaps


def subclusters_changed(change: Change, entry: int, bitmap: int, covered: int) -> tuple[int, int]:
    """Entry and bitmap after ``change`` of the ``covered`` subclusters.

    A compressed cluster changes only as a whole. A cluster goes with the last data it holds.
    """
    if entry & COMPRESSED:
        if covered != ALLOCATED:
            return entry, bitmap
        return 0, ZEROED if change.zero else 0
    held, whole = bitmap & ALLOCATED, covered == ALLOCATED
    covered = covered if not change.held_only else covered & held
    bitmap &= ~(covered | covered << COUNT)
    if change.zero:
        bitmap |= covered << COUNT
    empty = not bitmap & ALLOCATED and (held or whole)
    return (0 if change.frees and empty else entry), bitmap
