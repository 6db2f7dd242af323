"""Guest writes that need new space: set aside, shown, or given back; and how entries change.

1. An entry changes in memory at one place, ``publish``: there the node's mapping moves on, and what
   the old entries held is given up.
2. An L2 table that is new, or that a snapshot shares, is written in full to its own cluster before
   the L1 entry in memory points at it.
3. ``commit`` shows an allocation slice by slice; what it did not show, ``abort`` still gives back.
4. A cluster that reads as zeros but has space of its own is written in that space; so is each one
   of a data file.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.drivers.qcow2.frees import Reason
from blocklayer.errors import CorruptionError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.extent import Allocation
from blocklayer.graph.waiting import offload
from blocklayer.units import MIB

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.slices import Slice

_ALLOCATION_MAX: Final = 64 * MIB


class Space(msgspec.Struct, gc=False):
    """What an allocation holds: ``count`` host clusters for guest clusters from ``guest`` on."""

    guest: int
    host: int
    count: int
    reused: bool
    """The clusters belonged to these guest clusters before, reading as zeros (in part)."""
    start: int = 0
    """With extended L2 entries: the first guest byte that the clusters hold…"""
    end: int = 0
    """…and the first after those that they hold."""


class Writer:
    """Changes the mapping of one image."""

    def __init__(self, image: Image, mapping: Mapping) -> None:
        self._image = image
        self._mapping = mapping
        self._bits = image.geometry.cluster_bits

    async def begin(self) -> None:
        """What comes before every change; call it with the lock held."""
        image = self._image
        await image.prepare()
        if image.frees.many:
            await flushing.flush(image)
        await image.frees.apply()

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Set space aside for a write; see ``FormatDriver.allocate``."""
        image, bits = self._image, self._bits
        size = 1 << bits
        async with image.lock:
            await self.begin()
            guest = offset >> bits
            if image.geometry.data_file:
                return self._in_data_file(guest, offset, length)
            reused = await self._reusable(guest, offset, length)
            if reused is None:
                wanted = self._clusters(guest, offset, length)
                host, count = await image.refcounts.allocator.allocate(wanted)
                space = Space(guest, host, count, False)
            else:
                space = reused
            reads_zero = not space.reused and space.host << bits >= image.storage.size
            await image.storage.reserve((space.host + space.count) << bits)
            head = offset & (size - 1)
            length = min(length, (space.count << bits) - head)
            allocation = Allocation(
                offset, length, image.storage.child, space.host << bits,
                head, -(head + length) % size, reads_zero, space,
            )  # fmt: skip
            if image.encryption is not None:
                image.encryption.prepare(allocation)
            return allocation

    def _in_data_file(self, guest: int, offset: int, length: int) -> Allocation:
        """The place of the clusters in the data file, which stays as long as the disk."""
        space = Space(guest, guest, self._clusters(guest, offset, length), True)
        image, size = self._image, 1 << self._bits
        head = offset & (size - 1)
        length = min(length, (space.count << self._bits) - head)
        end = offset + length
        tail = min(-end % size, max(0, image.data_end - end))
        allocation = Allocation(
            offset, length, image.data.child, offset - head, head, tail, False, space
        )
        if image.encryption is not None:
            image.encryption.prepare(allocation)
        return allocation

    def _clusters(self, guest: int, offset: int, length: int) -> int:
        """How many clusters one allocation for the write may have."""
        in_table = self._image.geometry.l2_entries - (guest & (self._image.geometry.l2_entries - 1))
        wanted = ((offset + length - 1) >> self._bits) - guest + 1
        return min(wanted, in_table, max(1, _ALLOCATION_MAX >> self._bits))

    async def _reusable(self, guest: int, offset: int, length: int) -> Space | None:
        """The space that the clusters have of their own already, though they read as zeros."""
        cache = self._image.slices
        found = await cache.get(guest >> cache.bits)
        if found is None:
            return None
        index = guest & cache.mask
        entry = found.entries[index]
        if not (entry & ZERO and entry & COPIED and entry & OFFSET_MASK) or entry & COMPRESSED:
            return None
        self._mapping.check(entry, guest)
        count = min(
            found.run_end(index, 1 << self._bits) - index, self._clusters(guest, offset, length)
        )
        host = (entry & OFFSET_MASK) >> self._bits
        self._image.overlap.check(host << self._bits, count << self._bits)
        return Space(guest, host, count, True)

    async def commit(self, allocation: Allocation) -> None:
        """Show the allocation; see ``FormatDriver.commit``."""
        space = allocation.token
        assert isinstance(space, Space)
        step = 1 << self._bits
        async with self._image.lock:
            await self._image.prepare()
            await self.ensure_table(space.guest >> self._image.geometry.l2_bits)
            while space.count:
                found, index = await self.entries(space.guest)
                count = min(space.count, len(found.entries) - index)
                start = COPIED | (space.host << self._bits)
                entries = array("Q", range(start, start + count * step, step))
                bitmaps = self._bitmaps(space, found, index, count)
                self.publish(found, index, space.guest, entries, bitmaps=bitmaps)
                space.guest += count
                space.host += count
                space.count -= count

    def _bitmaps(self, space: Space, found: Slice, index: int, count: int) -> array[int] | None:
        """What goes beside the entries of the next ``count`` clusters of ``space``."""
        return None

    async def abort(self, allocation: Allocation) -> None:
        """Give the space back; see ``FormatDriver.abort``."""
        space = allocation.token
        assert isinstance(space, Space)
        if space.reused or not space.count:
            return
        async with self._image.lock:
            await self._image.refcounts.release(space.host, space.count)
            space.count = 0

    async def entries(self, guest: int) -> tuple[Slice, int]:
        """The slice that holds guest cluster ``guest``, to be changed at once, and where in it."""
        cache = self._image.slices
        return await cache.modify(guest >> cache.bits), guest & cache.mask

    def publish(
        self,
        found: Slice,
        index: int,
        guest: int,
        entries: array[int],
        reason: Reason = Reason.OTHER,
        *,
        bitmaps: array[int] | None = None,
    ) -> None:
        """Replace entries from guest cluster ``guest`` on; what only the old ones held goes.

        With extended L2 entries, ``bitmaps`` go beside them (empty ones if None is given).
        """
        old = found.entries[index : index + len(entries)]
        if found.bitmaps is not None:
            if bitmaps is None:
                bitmaps = array("Q", bytes(8 * len(entries)))
            if old == entries and found.bitmaps[index : index + len(entries)] == bitmaps:
                return
        elif old == entries:
            return
        dropped = self._dropped(old, entries, guest)
        found.put(index, entries, bitmaps)
        self._image.node.mapping_changed()
        if dropped:
            self._image.frees.add(dropped, reason)

    def _dropped(self, old: array[int], entries: array[int], guest: int) -> list[tuple[int, int]]:
        if self._image.geometry.data_file or old.count(0) == len(old) or old == entries:
            return []
        # A cluster that the new entry still names keeps its reference.
        kept = OFFSET_MASK | COMPRESSED
        given_up = array(
            "Q",
            (
                0
                if before == after or not ((before ^ after) & kept or before & COMPRESSED)
                else before
                for before, after in zip(old, entries, strict=True)
            ),
        )
        return self._mapping.references(given_up, guest)

    async def ensure_table(self, l1_index: int) -> None:
        """Make the L2 table of ``l1_index`` exist, and be nobody else's."""
        image = self._image
        geometry = image.geometry
        if l1_index >= len(image.l1):
            raise CorruptionError(f"L1 index {l1_index:#x} is past the L1 table")
        old = image.l2_table(l1_index)
        if old and image.l1[l1_index] & COPIED:
            return
        data = await image.storage.read(old, geometry.cluster_size) if old else None
        cluster, _ = await image.refcounts.allocator.allocate(1)
        offset = cluster << self._bits
        try:
            if data is None:
                await image.storage.write(offset, bytes(geometry.cluster_size))
            else:
                await image.storage.write(offset, data)
        except BaseException:
            await image.refcounts.release(cluster, 1)
            raise
        image.overlap.add(overlap.ACTIVE_L2, offset, geometry.cluster_size)
        image.set_l1(l1_index, offset)
        if old:
            image.overlap.remove(overlap.ACTIVE_L2, old, geometry.cluster_size)
            image.frees.add([(old >> self._bits, 1)], Reason.OTHER)

    async def write_cluster(self, offset: int, data: Buffer) -> None:
        """Store whole clusters from ``offset`` on in new space, whatever was there before."""
        view = memoryview(data)
        while view:
            allocation = await self.allocate(offset, len(view))
            part = view[: allocation.length]
            try:
                stored: Buffer = part
                if allocation.seal is not None:
                    stored = await offload(allocation.seal, part)
                await self._image.data.write(allocation.host_offset, stored)
                await self.commit(allocation)
            except BaseException:
                await self.abort(allocation)
                raise
            offset += len(part)
            view = view[len(part) :]
