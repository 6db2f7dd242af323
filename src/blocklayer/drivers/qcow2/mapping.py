"""Where guest bytes live: from L1 and L2 entries to extents.

1. An answer is true at the moment it is given: nothing is awaited after the entries were read.
2. A run goes on across L2 slices while the entries go on alike, as far as was asked and slices are
   at hand; a few more are read for it.
3. Writes in place are promised only for clusters that nobody shares and that hit no metadata.
4. In a data file every cluster lies at its guest offset, and nowhere else; those of a raw one do
   even where the tables say nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    l2_problem,
    misplaced,
)
from blocklayer.drivers.qcow2.slices import Slice
from blocklayer.errors import CorruptionError
from blocklayer.graph.extent import Extent, Kind

if TYPE_CHECKING:
    from array import array

    from blocklayer.drivers.qcow2.image import Image

_LOADS_MAX: Final = 8
"""Slices read for one answer, beyond the first."""


class Mapping:
    """Answers ``map`` for one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._l2_bits = geometry.l2_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._data_file = geometry.data_file
        self._held = geometry.held_mask
        self._bad = L2_RESERVED | (OFFSET_MASK & geometry.cluster_mask)
        if geometry.version == 2:
            self._bad |= ZERO
        self._sparse: bool | None = None
        """The answer of ``storage_has_holes``, once it is known."""

    async def map(self, offset: int, length: int) -> Extent:
        """The extent at ``offset``."""
        cache = self._image.slices
        first = offset >> self._bits
        need = ((offset + length - 1) >> self._bits) - first + 1
        key = first >> cache.bits
        found = cache.slices.get(key)
        if found is None:
            found = await cache.get(key)
        else:
            found.used = True
        entry = found.entries[first & cache.mask] if found else 0
        if entry & COMPRESSED:
            assert found is not None
            self.check(entry, first)
            index = first & cache.mask
            count = found.compressed_end(index, min(cache.entries, index + need)) - index
        else:
            if entry & self._bad or self._data_file:
                self.check(entry, first)
            step = self._cluster_size if entry & self._held else 0
            if need == 1 or (found and found.ends_at(first & cache.mask, step)):
                count = 1
            else:
                generation = self._image.node.generation
                count = await self._run(first, need, entry, step)
                if generation != self._image.node.generation:
                    # Something moved while slices were read: answer for what is known now.
                    return await self.map(offset, min(length, self._cluster_size))
        length = min(length, (count << self._bits) - (offset & self._cluster_mask))
        writable = bool(entry & COPIED) and not entry & (ZERO | COMPRESSED)
        if writable and self._image.writable:
            assert found is not None
            if found.checked != self._image.overlap.version:
                await self._verify(found, offset)
                return await self.map(offset, length)
        return self._extent(entry, offset, length)

    def _extent(self, entry: int, offset: int, length: int) -> Extent:
        child = self._image.data.child
        if entry & COMPRESSED:
            return Extent(offset, length, Kind.OPAQUE, compressed=True)
        place = entry & OFFSET_MASK
        if entry & ZERO:
            if not place:
                return Extent(offset, length, Kind.ZERO)
            place += offset & self._cluster_mask
            return Extent(offset, length, Kind.ZERO, place, child)
        if not entry & self._held:
            return Extent(offset, length, self._hole)
        place += offset & self._cluster_mask
        writable = bool(entry & COPIED) and self._image.writable
        return Extent(offset, length, Kind.DATA, place, child, writable, recurse=True)

    @property
    def _hole(self) -> Kind:
        """What is where nothing was written: through a raw data file nothing below is to show."""
        image = self._image
        hides = image.data_file_raw and image.node.backing is not None
        return Kind.ZERO if hides else Kind.UNALLOCATED

    async def storage_has_holes(self) -> bool:
        """Whether the file has less space than the clusters in use need; looked at once."""
        if self._sparse is None:
            self._sparse = await self._is_sparse()
        return self._sparse

    async def _is_sparse(self) -> bool:
        image = self._image
        if image.data_file_raw:
            # Its zeros are holes, not entries.
            present = image.data.node.driver.actual_size()
            return present is None or present < image.data.size
        present = image.storage.node.driver.actual_size()
        if present is None or present >= image.storage.size:
            return False
        clusters = present >> self._bits
        # A hole or two is not worth asking for; QEMU asks from the same numbers on.
        return await image.refcounts.exceed(max(clusters * 10 // 9, clusters + 2) - 1)

    async def _run(self, first: int, need: int, entry: int, step: int, bitmap: int = 0) -> int:
        """How many clusters from ``first`` on are mapped alike, ``need`` at most.

        ``first`` itself has ``entry`` and ``bitmap``.
        """
        image = self._image
        cache, end, cluster, loads = image.slices, first + need, first, 0
        while cluster < end:
            key, index = cluster >> cache.bits, cluster & cache.mask
            found = cache.slices.get(key)
            wanted = entry + (cluster - first) * step
            if found is None:
                if not image.l2_table(cluster >> self._l2_bits):
                    if entry or bitmap:
                        break
                    cluster = self._unmapped_end(cluster, end)
                    continue
                if loads == _LOADS_MAX:
                    break
                loads += 1
                found = await cache.get(key)
                if found is None:
                    break
            if found.entries[index] != wanted:
                break
            if found.bitmaps is not None and found.bitmaps[index] != bitmap:
                break
            stop = found.run_end(index, step)
            cluster += stop - index
            if stop < cache.entries:
                break
            if step and found.checked != image.overlap.version and image.writable:
                # Promise no more than was verified.
                break
        return max(1, min(cluster, end) - first)

    def _unmapped_end(self, cluster: int, end: int) -> int:
        """Where the run of L1 entries without a table ends, in clusters, ``end`` at most.

        The one of ``cluster`` has none, though it may not be 0.
        """
        l1 = self._image.l1
        index = (cluster >> self._l2_bits) + 1
        last = min(len(l1), ((end - 1) >> self._l2_bits) + 1)
        stride = 1
        while index < last:
            part = l1[index : min(last, index + stride)]
            if part.count(0) == len(part):
                index += len(part)
                stride *= 8
            elif stride == 1:
                break
            else:
                stride = 1
        return end if index >= last else min(end, index << self._l2_bits)

    async def _verify(self, found: Slice, offset: int) -> None:
        """Make sure that no entry of the slice lets plain writes hit metadata."""
        image = self._image
        if self._data_file:
            # No metadata there, and every entry is compared with its place when it is looked up.
            found.checked = image.overlap.version
            return
        if not image.overlap.complete:
            async with image.lock:
                if not image.overlap.complete:
                    await image.enter_metadata()
        version = image.overlap.version
        try:
            image.overlap.check_entries(found.entries)
        except CorruptionError as error:
            raise CorruptionError(f"near guest offset {offset:#x}: {error}") from None
        found.checked = version

    def check(self, entry: int, cluster: int) -> None:
        """Raise CorruptionError if the entry of guest cluster ``cluster`` cannot be followed."""
        problem = l2_problem(entry, self._image.geometry)
        if problem is None and self._data_file:
            problem = misplaced(entry, cluster << self._bits)
        if problem is not None:
            raise CorruptionError(
                f"L2 entry {entry:#018x} of guest offset {cluster << self._bits:#x}: {problem}"
            )

    def references(self, entries: array[int], first: int) -> list[tuple[int, int]]:
        """The (first, count) runs of host clusters that these entries of guest clusters hold."""
        if self._data_file or entries.count(0) == len(entries):
            # Clusters of a data file have no refcounts.
            return []
        runs: list[tuple[int, int]] = []
        after = -1
        for number, entry in enumerate(entries):
            if not entry & (OFFSET_MASK | COMPRESSED):
                continue
            if entry & (self._bad | COMPRESSED):
                self.check(entry, first + number)
            if entry & COMPRESSED:
                runs.append(self._compressed_clusters(entry))
                after = -1
                continue
            cluster = (entry & OFFSET_MASK) >> self._bits
            if cluster == after:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((cluster, 1))
            after = cluster + 1
        return runs

    def _compressed_clusters(self, entry: int) -> tuple[int, int]:
        from blocklayer.codec.qcow2.entries import decode_compressed

        offset, length = decode_compressed(entry, self._image.geometry)
        first = offset >> self._bits
        return first, ((offset + length - 1) >> self._bits) - first + 1
