"""Refcounts: the table, a bounded cache of blocks, and counting up and down.

1. Blocks in memory hold one native item per cluster. Counting a run of clusters is one comparison
   and one slice assignment a block, not a loop.
2. A block may be written at any time: counts go up before anything refers to a cluster, and down
   only after nothing on stable storage does (see ``frees``), so the file never claims too little.
3. A table entry is written only after the block it points at is durable.
4. All methods need the image's lock.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import (
    decode_refcount_table_entry,
    load_table,
    store_table,
)
from blocklayer.codec.qcow2.refcounts import TYPECODES, decode_block, encode_block, zero_block
from blocklayer.drivers.qcow2 import overlap
from blocklayer.drivers.qcow2.allocator import Allocator
from blocklayer.errors import CorruptionError, UnsupportedError
from blocklayer.units import SECTOR

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image

_TABLE_SECTOR_ENTRIES: Final = SECTOR // 8
_SECTOR_BITS_COUNT: Final = SECTOR * 8


class Block:
    """One refcount block; ``[low, high)`` are the entries that differ from the file."""

    __slots__ = ("counts", "high", "low", "used")

    def __init__(self, counts: array[int]) -> None:
        self.counts = counts
        self.used = True
        self.low = self.high = 0

    def put(self, index: int, counts: array[int]) -> None:
        """Replace the counts from ``index`` on."""
        self.counts[index : index + len(counts)] = counts
        self.touch(index, index + len(counts))

    def touch(self, low: int, high: int) -> None:
        """Entries from ``low`` up to ``high`` are to be written."""
        if self.low == self.high:
            self.low, self.high = low, high
        else:
            self.low, self.high = min(self.low, low), max(self.high, high)


class Refcounts:
    """The refcounts of one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.geometry = image.geometry
        self.table = array("Q")
        self.table_dirty: set[int] = set()
        """Sectors of the table that differ from the file."""
        self.blocks: dict[int, Block] = {}
        self.allocator = Allocator(image, self)
        self._max = image.settings.refcount_blocks_max
        self._loaded = False
        typecode = TYPECODES[self.geometry.refcount_order]
        entries = self.geometry.refcount_block_entries
        self._zeros = zero_block(entries, self.geometry.refcount_order)
        self._ones = array(typecode, (1,)) * entries

    @property
    def dirty(self) -> bool:
        """Whether the file's refcounts are behind those in memory."""
        return bool(self.table_dirty) or any(block.high for block in self.blocks.values())

    async def load(self) -> None:
        """Read the refcount table, once."""
        if self._loaded:
            return
        header, bits = self._image.header, self.geometry.cluster_bits
        size = header.refcount_table_clusters << bits
        self.table = load_table(await self._image.storage.read(header.refcount_table_offset, size))
        self._loaded = True

    def replace_table(self, table: array[int]) -> None:
        """The header points at ``table`` from now on."""
        self.table = table
        self.table_dirty.clear()

    def clear(self) -> None:
        """Forget everything, also what was not written."""
        self.blocks.clear()
        self.table_dirty.clear()
        self._loaded = False
        self.allocator.clear()

    def block_offset(self, index: int) -> int:
        """Host offset of block ``index``, 0 where there is none."""
        if index >= len(self.table):
            return 0
        try:
            return decode_refcount_table_entry(self.table[index], self.geometry)
        except CorruptionError as error:
            raise CorruptionError(f"refcount table index {index:#x}: {error}") from None

    async def block(self, index: int) -> Block | None:
        """Block ``index``; None where there is none: all its clusters are free."""
        found = self.blocks.get(index)
        if found is None:
            await self.load()
            offset = self.block_offset(index)
            if not offset:
                return None
            data = await self._image.storage.read(offset, self.geometry.cluster_size)
            found = Block(decode_block(data, self.geometry.refcount_order))
            await self.insert(index, found)
        found.used = True
        return found

    async def insert(self, index: int, block: Block) -> None:
        """Keep ``block`` in the cache, in place of one that is not used."""
        while len(self.blocks) >= self._max:
            key, oldest = next(iter(self.blocks.items()))
            if oldest.used:
                oldest.used = False
                self.blocks[key] = self.blocks.pop(key)
                continue
            await self._write_block(key, oldest)
            del self.blocks[key]
        self.blocks[index] = block

    def new_block(self) -> Block:
        """A block of free clusters, all of it to be written."""
        block = Block(self._zeros[:])
        block.touch(0, len(block.counts))
        return block

    def ones(self, count: int) -> array[int]:
        """``count`` counts of one."""
        return self._ones[:count]

    def free_from(self, block: Block, start: int, limit: int) -> int:
        """How many clusters from ``start`` on are free, ``limit`` at most."""
        counts = block.counts
        end = min(len(counts), start + limit)
        # Runs are short, or as long as asked for; widen the strides and compare each as a whole.
        good, stride = start, 1
        while good < end:
            bad = min(end, good + stride)
            if counts[good:bad] == self._zeros[: bad - good]:
                good = bad
                stride *= 8
            elif stride == 1:
                break
            else:
                stride = 1
        return good - start

    async def get(self, cluster: int) -> int:
        """The refcount of host cluster ``cluster``."""
        index, position = divmod(cluster, self.geometry.refcount_block_entries)
        block = await self.block(index)
        return block.counts[position] if block else 0

    async def counts(self, first: int, count: int) -> array[int]:
        """The refcounts of the first of ``count`` clusters, as far as one block counts them."""
        index, position = divmod(first, self.geometry.refcount_block_entries)
        block = await self.block(index)
        return (block.counts if block else self._zeros)[position : position + count]

    async def increase(self, first: int, count: int) -> None:
        """One reference more to each cluster; all of them or none."""
        done = 0
        try:
            while done < count:
                done += await self._increase_some(first + done, count - done)
        except BaseException:
            await self.release(first, done)
            raise

    async def _increase_some(self, first: int, count: int) -> int:
        index, position = divmod(first, self.geometry.refcount_block_entries)
        block = await self.block(index)
        if block is None:
            block = await self.allocator.add_block(index)
        part = block.counts[position : position + count]
        if part == self._zeros[: len(part)]:
            block.put(position, self._ones[: len(part)])
            return len(part)
        if max(part) >= self.geometry.refcount_max:
            raise UnsupportedError(
                f"'{self._image.node.filename}': the refcount of a cluster near host offset "
                f"{first << self.geometry.cluster_bits:#x} would exceed the "
                f"{self.geometry.refcount_bits} bits that the image has for it"
            )
        block.put(position, _shifted(part, 1))
        return len(part)

    async def decrease(self, first: int, count: int) -> tuple[int, list[tuple[int, int]]]:
        """One reference less to each of the first clusters, as far as one block counts them.

        The answer is how many those were, and which (first, count) runs are free now.
        """
        index, position = divmod(first, self.geometry.refcount_block_entries)
        block = await self.block(index)
        part = block.counts[position : position + count] if block else self._zeros[:1]
        if part == self._ones[: len(part)]:
            zeroed = [(first, len(part))]
            lower = self._zeros[: len(part)]
        elif min(part) == 0:
            offset = (first + part.index(0)) << self.geometry.cluster_bits
            raise CorruptionError(f"Cannot free the cluster at host offset {offset:#x}: it is free")
        else:
            zeroed = (
                [(first + i, 1) for i, value in enumerate(part) if value == 1] if 1 in part else []
            )
            lower = _shifted(part, -1)
        assert block is not None
        block.put(position, lower)
        if zeroed:
            self.allocator.freed(zeroed)
        return len(part), zeroed

    async def release(self, first: int, count: int) -> None:
        """Take back references that nothing on file ever had."""
        while count:
            done, _ = await self.decrease(first, count)
            first, count = first + done, count - done

    async def write_blocks(self) -> None:
        """Write all dirty blocks."""
        for index, block in list(self.blocks.items()):
            await self._write_block(index, block)

    async def _write_block(self, index: int, block: Block) -> None:
        if not block.high:
            return
        geometry = self.geometry
        # Whole sectors: the entries of one sector become durable together.
        per_sector = _SECTOR_BITS_COUNT >> geometry.refcount_order
        low = block.low - block.low % per_sector
        high = min(len(block.counts), -(-block.high // per_sector) * per_sector)
        data = encode_block(block.counts[low:high], geometry.refcount_order)
        offset = self.block_offset(index) + (low << geometry.refcount_order) // 8
        self._image.overlap.check(offset, len(data), own=overlap.REFCOUNT_BLOCK)
        await self._image.storage.write(offset, data)
        block.low = block.high = 0

    async def write_table(self) -> None:
        """Write table entries of new blocks. The blocks must be durable."""
        start = self._image.header.refcount_table_offset
        for sector in sorted(self.table_dirty):
            first = sector * _TABLE_SECTOR_ENTRIES
            part = self.table[first : first + _TABLE_SECTOR_ENTRIES]
            offset = start + sector * SECTOR
            self._image.overlap.check(offset, len(part) * 8, own=overlap.REFCOUNT_TABLE)
            await self._image.storage.write(offset, store_table(part))
            self.table_dirty.discard(sector)

    def set_block_offset(self, index: int, offset: int) -> None:
        """A new block lies there."""
        self.table[index] = offset
        self.table_dirty.add(index // _TABLE_SECTOR_ENTRIES)

    def drop_unused(self) -> None:
        """Drop clean blocks that nobody asked for since the last call."""
        for index, block in list(self.blocks.items()):
            if not block.used and not block.high:
                del self.blocks[index]
            block.used = False

    async def exceed(self, count: int) -> bool:
        """Whether the file's refcounts say that more than ``count`` clusters are in use.

        Needs no lock: it looks at the file only, and disturbs no cache.
        """
        header, geometry, storage = self._image.header, self.geometry, self._image.storage
        size = header.refcount_table_clusters << geometry.cluster_bits
        used = 0
        for offset in load_table(await storage.read(header.refcount_table_offset, size)):
            if offset:
                data = await storage.read(offset & ~geometry.cluster_mask, geometry.cluster_size)
                block = decode_block(data, geometry.refcount_order)
                used += len(block) - block.count(0)
            if used > count:
                return True
        return False

    async def drop_empty_blocks(self) -> None:
        """Take blocks that count nothing but themselves off the end of the table."""
        await self.load()
        for index in range(len(self.table) - 1, 0, -1):
            block = await self.block(index)
            if block is None:
                continue
            own = self.block_offset(index) >> self.geometry.cluster_bits
            region, position = divmod(own, self.geometry.refcount_block_entries)
            alone = block.counts.count(0) == len(block.counts) - 1
            if region != index or not alone or block.counts[position] != 1:
                return
            self.set_block_offset(index, 0)
            del self.blocks[index]
            self._image.overlap.remove(overlap.REFCOUNT_BLOCK, own << self.geometry.cluster_bits, 1)

    async def end_of_use(self) -> int:
        """The host offset after the last cluster that is in use."""
        await self.load()
        for index in range(len(self.table) - 1, -1, -1):
            block = await self.block(index)
            if block is None:
                continue
            used = len(bytes(memoryview(block.counts)).rstrip(b"\0"))
            if used:
                last = (used - 1) // block.counts.itemsize
                cluster = index * self.geometry.refcount_block_entries + last + 1
                return cluster << self.geometry.cluster_bits
        return 0


def _shifted(counts: array[int], change: int) -> array[int]:
    """``change`` more of each."""
    if counts.count(counts[0]) == len(counts):
        return array(counts.typecode, (counts[0] + change,)) * len(counts)
    return array(counts.typecode, [value + change for value in counts])
