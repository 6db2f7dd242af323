"""Allocation of host clusters: first fit from a hint, growth of the refcount structures, packing.

1. What is allocated counts one reference each, in memory; nothing is written here but new refcount
   tables. Cluster 0 holds the header and is never handed out.
2. Where a region of the file has no refcount block yet, all its clusters are free: the new block
   goes into its first cluster and counts itself.
3. A larger refcount table is put, with the blocks that count it, past the end of everything; both
   are durable before the header points at them, and the old one is given up after that.
4. A failure leaves what was allocated before as it was, and nothing allocated by halves.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.entries import store_table
from blocklayer.codec.qcow2.geometry import MAX_REFCOUNT_TABLE_SIZE
from blocklayer.codec.qcow2.refcounts import encode_block
from blocklayer.drivers.qcow2 import overlap
from blocklayer.errors import StorageError
from blocklayer.units import div_up

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.refcounts import Block, Refcounts


class Allocator:
    """Finds free clusters of one image."""

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self._image = image
        self._refcounts = refcounts
        geometry = image.geometry
        self._bits = geometry.cluster_bits
        self._span = geometry.refcount_block_entries
        self._hint = 1
        """No cluster below it is free."""
        self._packed = 0
        """Where the last compressed cluster ended, within a host cluster; 0: nowhere."""

    def clear(self) -> None:
        """Forget what was known."""
        self._hint, self._packed = 1, 0

    def freed(self, runs: list[tuple[int, int]]) -> None:
        """These (first, count) runs of clusters are free now."""
        self._hint = max(1, min(self._hint, *(first for first, _ in runs)))
        packed = self._packed >> self._bits
        if self._packed and any(first <= packed < first + count for first, count in runs):
            self._packed = 0

    async def allocate(self, count: int) -> tuple[int, int]:
        """The first free run, cut at ``count`` clusters: (first cluster, how many)."""
        cluster = self._hint
        while True:
            index, position = divmod(cluster, self._span)
            block = await self._refcounts.block(index)
            if block is None:
                block = await self.add_block(index)
            try:
                position = block.counts.index(0, position)
            except ValueError:
                cluster = (index + 1) * self._span
                self._hint = cluster
                continue
            cluster = index * self._span + position
            got = self._refcounts.free_from(block, position, count)
            self._check(cluster, got)
            block.put(position, self._refcounts.ones(got))
            self._hint = cluster + got
            return cluster, got

    async def allocate_exactly(self, count: int) -> int:
        """``count`` clusters in one piece: the first of them."""
        cluster = await self._find(count)
        self._check(cluster, count)
        await self._refcounts.increase(cluster, count)
        if cluster == self._hint:
            self._hint += count
        return cluster

    async def _find(self, count: int) -> int:
        """The start of ``count`` free clusters that have refcount blocks."""
        cluster = start = self._hint
        while cluster - start < count:
            index, position = divmod(cluster, self._span)
            block = await self._refcounts.block(index)
            if block is None:
                if count < self._span:
                    # Its first cluster goes to the block itself: look behind it.
                    await self.add_block(index)
                    start = cluster = index * self._span + 1
                    continue
                return await self._extend(count)
            free = self._refcounts.free_from(block, position, count - (cluster - start))
            cluster += free
            if position + free < self._span and cluster - start < count:
                try:
                    cluster = index * self._span + block.counts.index(0, position + free)
                except ValueError:
                    cluster = (index + 1) * self._span
                start = cluster
        return start

    def _check(self, cluster: int, count: int) -> None:
        end = (cluster + count) << self._bits
        if end > self._image.geometry.max_host_offset:
            raise StorageError(
                f"'{self._image.node.filename}' cannot grow to {end:#x} bytes", errno.EFBIG
            )
        self._image.overlap.check(cluster << self._bits, count << self._bits)

    async def add_block(self, index: int) -> Block:
        """A refcount block for a region without one, in the region's first cluster."""
        refcounts = self._refcounts
        if index >= len(refcounts.table):
            await self._grow_table(index + 1)
            found = await refcounts.block(index)
            if found is not None:
                return found
        cluster = max(1, index * self._span)
        self._check(cluster, 1)
        block = refcounts.new_block()
        block.put(cluster - index * self._span, refcounts.ones(1))
        await refcounts.insert(index, block)
        refcounts.set_block_offset(index, cluster << self._bits)
        self._image.overlap.add(overlap.REFCOUNT_BLOCK, cluster << self._bits, 1)
        return block

    def _tail(self) -> int:
        """The first region after all that have refcount blocks."""
        used = bytes(memoryview(self._refcounts.table)).rstrip(b"\0")
        return div_up(len(used), 8)

    async def _extend(self, count: int) -> int:
        """Refcount blocks past the end of everything, then room for ``count`` clusters."""
        first_region = self._tail()
        blocks = self._blocks_for(count)
        if first_region + blocks > len(self._refcounts.table):
            await self._grow_table(first_region + 2 * blocks)
            first_region = self._tail()
        start = first_region * self._span
        self._check(start, blocks + count)
        # The new blocks lie side by side, so that what follows them is in one piece. They count
        # themselves before the table names them: a failure half way only leaks.
        for number in range(blocks):
            block = self._refcounts.new_block()
            block.put(0, self._refcounts.ones(max(0, blocks - number * self._span)))
            await self._refcounts.insert(first_region + number, block)
            offset = (start + number) << self._bits
            self._refcounts.set_block_offset(first_region + number, offset)
            self._image.overlap.add(overlap.REFCOUNT_BLOCK, offset, 1)
        return start + blocks

    def _blocks_for(self, count: int) -> int:
        """How many blocks count themselves and ``count`` clusters behind them."""
        return div_up(count, self._span - 1)

    async def _grow_table(self, entries: int) -> None:
        """Move to a refcount table of at least ``entries`` entries."""
        from blocklayer.drivers.qcow2.flushing import write_refcounts

        image, refcounts = self._image, self._refcounts
        per_cluster = image.geometry.cluster_size // 8
        first_region = len(refcounts.table)
        clusters = div_up(max(entries, first_region + first_region // 2), per_cluster)
        while True:
            blocks = self._blocks_for(clusters)
            if clusters * per_cluster >= max(entries, first_region + blocks):
                break
            clusters += 1
        if clusters << self._bits > MAX_REFCOUNT_TABLE_SIZE:
            raise StorageError(
                f"'{image.node.filename}' cannot grow: its refcount table would exceed "
                f"{MAX_REFCOUNT_TABLE_SIZE} bytes",
                errno.EFBIG,
            )
        # The copy must not point at blocks that are not durable.
        await write_refcounts(image)
        start = first_region * self._span
        self._check(start, blocks + clusters)
        table = refcounts.table[:]
        table.extend(array("Q", bytes(8 * (clusters * per_cluster - len(table)))))
        for number in range(blocks):
            table[first_region + number] = (start + number) << self._bits
        await self._write_structures(table, start, blocks, clusters)

    async def _write_structures(
        self, table: array[int], start: int, blocks: int, clusters: int
    ) -> None:
        """Write ``blocks`` refcount blocks and ``table`` from cluster ``start`` on; use them."""
        image, refcounts = self._image, self._refcounts
        order = image.geometry.refcount_order
        left, data = blocks + clusters, []
        for _ in range(blocks):
            block = refcounts.new_block()
            block.put(0, refcounts.ones(min(left, self._span)))
            left -= min(left, self._span)
            data.append(encode_block(block.counts, order))
        await image.storage.write(start << self._bits, *data, store_table(table))
        await image.barrier()
        old = image.header.refcount_table_offset, image.header.refcount_table_clusters
        table_offset = (start + blocks) << self._bits
        await image.update_header(
            refcount_table_offset=table_offset, refcount_table_clusters=clusters
        )
        refcounts.replace_table(table)
        guard = image.overlap
        guard.remove(overlap.REFCOUNT_TABLE, old[0], old[1] << self._bits)
        guard.add(overlap.REFCOUNT_TABLE, table_offset, clusters << self._bits)
        guard.add(overlap.REFCOUNT_BLOCK, start << self._bits, blocks << self._bits)
        # The header on stable storage names the new table, so the old one is free at once.
        await refcounts.release(old[0] >> self._bits, old[1])

    async def allocate_bytes(self, length: int) -> int:
        """Room for ``length`` compressed bytes (at most a cluster), packed behind the last.

        Each host cluster that they touch counts one reference more.
        """
        size = 1 << self._bits
        packed, cluster = self._packed, self._packed >> self._bits
        room = size - (packed & (size - 1)) if packed else 0
        limit = self._image.geometry.refcount_max
        if room and await self._refcounts.get(cluster) >= limit:
            room = 0
        if 0 < length <= room:
            await self._refcounts.increase(cluster, 1)
            offset = packed
        else:
            fresh, _ = await self.allocate(1)
            offset = fresh << self._bits
            if room and fresh == cluster + 1:
                await self._share(cluster, fresh)
                offset = packed
        self._packed = offset + length if (offset + length) & (size - 1) else 0
        return offset

    async def _share(self, cluster: int, fresh: int) -> None:
        try:
            await self._refcounts.increase(cluster, 1)
        except BaseException:
            await self._refcounts.release(fresh, 1)
            raise

    async def release_bytes(self, offset: int, length: int) -> None:
        """Undo ``allocate_bytes``."""
        first = offset >> self._bits
        last = (offset + length - 1) >> self._bits
        self._packed = 0
        await self._refcounts.release(first, last - first + 1)
