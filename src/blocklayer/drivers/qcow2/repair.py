"""Repairing refcounts: in place where there is a sound block, in new blocks where there is none.

Public:
    repair_refcounts(image, stored, walk, comparison)

1. First refcounts rise and new blocks are written, then the table (and, if it moves, the header)
   points at them, then refcounts drop; each step is on stable storage before the next. A crash in
   between leaves leaks where there were none, never a refcount that is lower than it was and wrong.
2. The old structure stays as it is until the header points at the new one.
3. New blocks and tables go where nothing is referenced, not even by entries that point past the end
   of the file.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.entries import store_table
from blocklayer.codec.qcow2.geometry import MAX_REFCOUNT_TABLE_SIZE
from blocklayer.codec.qcow2.refcounts import TYPECODES, decode_block, encode_block
from blocklayer.drivers.qcow2.recount import WINDOW, WINDOW_BITS, Recount
from blocklayer.errors import UnsupportedError

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.check import Comparison
    from blocklayer.drivers.qcow2.check_image import CheckedImage, StoredRefcounts
    from blocklayer.drivers.qcow2.check_walk import Walk


async def repair_refcounts(
    image: CheckedImage, stored: StoredRefcounts, walk: Walk, comparison: Comparison
) -> None:
    """Make the refcounts in the file those that were counted, as far as ``image.repair`` goes."""
    if not (comparison.too_low or comparison.too_high or image.structure_faults):
        return
    errors, leaks = "errors" in image.repair, "leaks" in image.repair
    repairer = _Repairer(image, stored, walk)
    if errors:
        repairer.lay_out()
    if repairer.changes_structure:
        image.note("Rebuilding refcount structure")
        leaks = True
    else:
        async for cluster, refcount, reference in comparison.differences():
            if errors if refcount < reference else leaks:
                image.note(f"Repairing cluster {cluster} refcount={refcount} reference={reference}")
    if errors:
        await repairer.raise_refcounts()
        await repairer.switch()
    if leaks:
        await repairer.lower_refcounts()
    await stored.load()
    _settle(image, comparison, errors, leaks)


def _settle(image: CheckedImage, comparison: Comparison, errors: bool, leaks: bool) -> None:
    """Enter what was fixed, and what was not."""
    result = image.result
    if errors:
        result.corruptions_fixed += comparison.too_low + image.structure_faults
        result.corruptions -= image.structure_faults
        # Nothing but refcounts that could not be read lets a check with errors come this far.
        result.check_errors = 0
    else:
        result.corruptions += comparison.too_low
    if leaks:
        result.leaks_fixed += comparison.too_high
    else:
        result.leaks += comparison.too_high


class _Repairer:
    def __init__(self, image: CheckedImage, stored: StoredRefcounts, walk: Walk) -> None:
        self.image = image
        self.stored = stored
        self.blocks = dict(walk.blocks)
        """The structure as it will be: offset of each block by index."""
        self.new_blocks: set[int] = set()
        self.table_offset = image.header.refcount_table_offset
        self.table_clusters = image.header.refcount_table_clusters
        self.changes_structure = False
        self._table_counted = walk.table_counted
        self._kept = Recount()
        """Clusters of the old structure, which must outlive the switch."""
        self._cursor = 0

    @property
    def _bits(self) -> int:
        return self.image.geometry.cluster_bits

    def lay_out(self) -> None:
        """Decide which blocks stay and where others go; nothing is written."""
        image, entries = self.image, self.image.geometry.refcount_block_entries
        self._keep_old_structure()
        self._drop_broken_blocks()
        needed = sorted(self._needed() - self.blocks.keys())
        table_moves = not self._table_is_sound()
        if table_moves:
            self._forget_table()
        while needed or table_moves:
            while needed:
                index = needed.pop(0)
                cluster = self._place(1)
                self.blocks[index] = cluster << self._bits
                self.new_blocks.add(index)
                if cluster // entries not in self.blocks and cluster // entries not in needed:
                    needed.append(cluster // entries)
            fits = (max(self.blocks) + 1) * 8 <= self.table_clusters << self._bits
            if fits and not table_moves:
                break
            if not fits and not table_moves:
                self._forget_table()
            self.table_clusters = max(1, image.geometry.cluster_count((max(self.blocks) + 1) * 8))
            if self.table_clusters << self._bits > MAX_REFCOUNT_TABLE_SIZE:
                raise UnsupportedError(
                    f"'{image.storage.node.filename}' is too large for the refcount table that it "
                    "needs: convert it to larger clusters"
                )
            cluster = self._place(self.table_clusters)
            self.table_offset = cluster << self._bits
            covered = range(cluster // entries, (cluster + self.table_clusters - 1) // entries + 1)
            needed = [index for index in covered if index not in self.blocks]
            table_moves = False
        self.changes_structure = self._table() != self.stored.table or (
            self.table_offset != image.header.refcount_table_offset
        )

    def _keep_old_structure(self) -> None:
        image = self.image
        first = image.header.refcount_table_offset >> self._bits
        for cluster in range(first, first + image.header.refcount_table_clusters):
            self._kept.add(cluster)
        for offset in self.blocks.values():
            self._kept.add(offset >> self._bits)

    def _drop_broken_blocks(self) -> None:
        """Blocks that something else uses too cannot stay."""
        recount = self.image.recount
        shared = [
            index for index, offset in self.blocks.items() if recount.get(offset >> self._bits) != 1
        ]
        for index in shared:
            recount.add(self.blocks.pop(index) >> self._bits, times=-1)

    def _table_is_sound(self) -> bool:
        first = self.table_offset >> self._bits
        return self._table_counted and all(
            self.image.recount.get(cluster) == 1
            for cluster in range(first, first + self.table_clusters)
        )

    def _forget_table(self) -> None:
        """The table moves: where it is will be free."""
        if self._table_counted:
            first = self.table_offset >> self._bits
            for cluster in range(first, first + self.table_clusters):
                self.image.recount.add(cluster, times=-1)
            self._table_counted = False

    def _needed(self) -> set[int]:
        """Indexes of the blocks without which something referenced has no refcount."""
        recount, entries = self.image.recount, self.image.geometry.refcount_block_entries
        needed: set[int] = set()
        step = min(WINDOW, entries)
        for index in recount.windows:
            counts = recount.counts(index)
            for start in range(0, WINDOW, step):
                if counts is None or any(counts[start : start + step]):
                    needed.add(((index << WINDOW_BITS) + start) // entries)
        return needed

    def _place(self, count: int) -> int:
        """The first of ``count`` clusters in a row that are free, and now taken."""
        image, cluster, run = self.image, self._cursor, 0
        while run < count:
            free = not (
                image.recount.get(cluster) or self._kept.get(cluster) or image.outside.get(cluster)
            )
            run = run + 1 if free else 0
            cluster += 1
        if count == 1:
            self._cursor = cluster
        image.recount.add_run(cluster - count, count)
        return cluster - count

    def _table(self) -> array[int]:
        table = array("Q", bytes(self.table_clusters << self._bits))
        for index, offset in self.blocks.items():
            table[index] = offset
        return table

    def _counted(self, index: int) -> array[int]:
        """What block ``index`` should say."""
        recount, geometry = self.image.recount, self.image.geometry
        counts = array(TYPECODES[geometry.refcount_order])
        first, entries = index * geometry.refcount_block_entries, geometry.refcount_block_entries
        step = min(WINDOW, entries)
        for cluster in range(first, first + entries, step):
            part = recount.counts(cluster >> WINDOW_BITS)
            if part is None or max(part) > geometry.refcount_max:
                counts.extend(
                    min(recount.get(one), geometry.refcount_max)
                    for one in range(cluster, cluster + step)
                )
            else:
                start = cluster & (WINDOW - 1)
                counts.extend(part[start : start + step])
        return counts

    async def _current(self, index: int) -> array[int]:
        geometry = self.image.geometry
        raw = await self.image.storage.read(self.blocks[index], geometry.cluster_size)
        return decode_block(raw, geometry.refcount_order)

    async def raise_refcounts(self) -> None:
        """Write new blocks, and in those that stay raise what is too low."""
        order = self.image.geometry.refcount_order
        for index, offset in sorted(self.blocks.items()):
            wanted = self._counted(index)
            if index not in self.new_blocks:
                current = await self._current(index)
                wanted = array(current.typecode, map(max, current, wanted))
                if wanted == current:
                    continue
            await self.image.write(offset, encode_block(wanted, order))
        await self.image.storage.flush()

    async def switch(self) -> None:
        """Let the table, and the header, point at the structure as laid out."""
        image = self.image
        if not self.changes_structure:
            return
        await image.write(self.table_offset, store_table(self._table()))
        await image.storage.flush()
        if self.table_offset != image.header.refcount_table_offset:
            await image.set_refcount_table(self.table_offset, self.table_clusters)

    async def lower_refcounts(self) -> None:
        """In the blocks that were there before, lower what is too high."""
        order = self.image.geometry.refcount_order
        await self.image.storage.flush()
        for index, offset in sorted(self.blocks.items()):
            if index in self.new_blocks:
                continue
            current = await self._current(index)
            wanted = array(current.typecode, map(min, current, self._counted(index)))
            if wanted != current:
                await self.image.write(offset, encode_block(wanted, order))
        await self.image.storage.flush()
