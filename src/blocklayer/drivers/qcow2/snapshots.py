"""Internal snapshots: taken, gone back to, deleted, and looked at.

A snapshot is an L1 table of its own over clusters that the disk, and other snapshots, may share.

1. References go up, durably, before anything on file makes them; they go down only after the header
   on stable storage names nothing any more that makes them (R1, R2).
2. Each operation takes effect by one write of one header sector: after a crash, the image has the
   old snapshots and content or the new ones.
3. While copied flags and refcounts may disagree, an image of version 3 is marked dirty: whoever
   opens it for writing after a crash mends them. Unmended they cost space or a copy, never data: a
   flag is set on nothing that a snapshot on file shares.
4. All methods need the lock, and that no request is in flight: what was given up before is free
   then, refcounts in memory are exact, and nobody fills the caches.
"""

from __future__ import annotations

import time
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    any_bits,
    clear_bits,
    decode_l1,
    encode_l1,
    load_table,
    set_bits,
    store_table,
)
from blocklayer.codec.qcow2.geometry import MAX_L1_TABLE_SIZE
from blocklayer.codec.qcow2.header import INCOMPATIBLE_DIRTY
from blocklayer.codec.qcow2.snapshots import MAX_SNAPSHOTS, Snapshot, encode_table, extra_data
from blocklayer.codec.qcow2.subclusters import load_l2_table, store_l2_table
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.drivers.qcow2.frees import Reason
from blocklayer.drivers.qcow2.image import L1_SECTOR_ENTRIES
from blocklayer.drivers.qcow2.slices import Slice
from blocklayer.errors import BlockError, FormatError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.writing import Writer

_NS: Final = 1_000_000_000
_BATCH_ENTRIES: Final = 1 << 19
"""Entries that are looked at together: some tens of megabytes."""
_ANY_L2: Final = overlap.ACTIVE_L2 | overlap.INACTIVE_L2


class Snapshots:
    """Changes the snapshots of one image."""

    def __init__(self, image: Image, mapping: Mapping, writer: Writer) -> None:
        self._image = image
        self._mapping = mapping
        self._writer = writer
        self._bits = image.geometry.cluster_bits
        self._bad = L2_RESERVED | (OFFSET_MASK & image.geometry.cluster_mask) | COMPRESSED
        """An entry with one of these is looked at more closely."""

    def find(self, identifier: str) -> Snapshot:
        """The snapshot with this id."""
        for snapshot in self._image.snapshots:
            if snapshot.id == identifier:
                return snapshot
        raise UsageError(f"'{self._image.node.filename}' has no snapshot with the id {identifier}")

    async def create(self, name: str) -> Snapshot:
        """Keep what the disk holds now as a snapshot called ``name``."""
        image = self._image
        snapshot = self._new(name)
        await self._begin()
        await self._mark_dirty()
        shared: list[int] = []
        claimed: list[tuple[int, int]] = []
        try:
            await self._share_all(image.l1, shared)
            l1 = clear_bits(image.l1, COPIED)
            snapshot.l1_table_offset = await self._claim(len(l1) * 8, claimed)
            await self._write(snapshot.l1_table_offset, store_table(l1))
            await self._replace_l1(l1)
            await self._switch([*image.snapshots, snapshot], claimed, clean=True)
        except BaseException:
            await self._undo(shared, claimed)
            raise
        finally:
            image.node.mapping_changed()
        return snapshot

    def _new(self, name: str) -> Snapshot:
        """The table entry of a snapshot of now. Raises if the table has no room for it."""
        image = self._image
        if len(image.snapshots) >= MAX_SNAPSHOTS:
            raise UnsupportedError(
                f"'{image.node.filename}' has {MAX_SNAPSHOTS} snapshots, the most a file can have"
            )
        date_s, date_ns = divmod(time.time_ns(), _NS)
        numbers = [int(each.id) for each in image.snapshots if _is_number(each.id)]
        snapshot = Snapshot(
            l1_table_offset=0,
            l1_size=len(image.l1),
            id=str(1 + max(numbers, default=0)),
            name=name,
            date_s=date_s,
            date_ns=date_ns,
            extra_data=extra_data(0, image.header.size, 0),
        )
        encode_table([*image.snapshots, snapshot])
        return snapshot

    async def delete(self, snapshot: Snapshot) -> None:
        """Drop a snapshot and what only it held."""
        image = self._image
        await self._begin()
        l1 = await self._read_l1(snapshot)
        claimed: list[tuple[int, int]] = []
        try:
            left = [each for each in image.snapshots if each is not snapshot]
            await self._switch(left, claimed, clean=False)
        except BaseException:
            await self._undo([], claimed)
            raise
        try:
            await self._drop_tree(snapshot.l1_table_offset, l1)
            await self._settle_counts()
            await self._set_flags()
            await self._mark_clean()
        finally:
            image.node.mapping_changed()

    async def apply(self, snapshot: Snapshot) -> None:
        """Let the disk hold, and be as large as, what it was at ``snapshot``."""
        image = self._image
        size = self._size_at(snapshot)
        entries = max(snapshot.l1_size, image.geometry.l1_entries(size))
        if entries * 8 > MAX_L1_TABLE_SIZE:
            raise FormatError(
                f"snapshot {snapshot.id} of '{image.node.filename}' has a disk of {size} bytes, "
                "which is too large"
            )
        await self._begin()
        l1 = clear_bits(await self._read_l1(snapshot), COPIED)
        l1.extend(array("Q", bytes(8 * (entries - len(l1)))))
        await self._mark_dirty()
        old, old_offset = image.l1, image.header.l1_table_offset
        shared: list[int] = []
        claimed: list[tuple[int, int]] = []
        try:
            await self._share_all(l1, shared)
            offset = await self._claim(entries * 8, claimed)
            await self._write(offset, store_table(l1))
            await self._settle_counts()
            await image.update_header(l1_table_offset=offset, l1_size=entries, size=size)
        except BaseException:
            await self._undo(shared, claimed)
            raise
        try:
            image.l1 = l1
            image.overlap.clear()
            # No flag is to be set: the snapshot holds all that the disk holds.
            await self._drop_tree(old_offset, old)
            await self._settle_counts()
            await self._mark_clean()
        finally:
            image.node.mapping_changed()

    def _size_at(self, snapshot: Snapshot) -> int:
        header = self._image.header
        size = header.size if snapshot.disk_size is None else snapshot.disk_size
        if size != header.size and header.version < 3:
            raise UnsupportedError("Can't resize a v2 image which has snapshots")
        return size

    async def load(self, snapshot: Snapshot) -> None:
        """Show the snapshot in place of the disk, in memory only: the image is open read-only."""
        image = self._image
        image.l1 = await self._read_l1(snapshot)
        image.slices.clear()
        if snapshot.disk_size is not None:
            image.header.size = snapshot.disk_size
        image.node.mapping_changed()

    async def _begin(self) -> None:
        """All metadata is on file only, and refcounts count what tables refer to, and no more."""
        image = self._image
        await self._writer.begin()
        await flushing.flush(image)
        await image.frees.apply(force=True)
        image.slices.clear()

    async def _mark_dirty(self) -> None:
        image = self._image
        if image.header.version >= 3:
            await image.set_dirty(True)
            image.stays_dirty = True

    async def _mark_clean(self) -> None:
        """Flags and refcounts agree; make that durable, and say so."""
        image = self._image
        await image.barrier()
        if image.header.version >= 3:
            await image.set_dirty(False)
            image.stays_dirty = False

    async def _settle_counts(self) -> None:
        await flushing.write_refcounts(self._image)
        await self._image.barrier()

    async def _switch(
        self, snapshots: list[Snapshot], claimed: list[tuple[int, int]], *, clean: bool
    ) -> None:
        """Write a new table, and all before it durable, let the header name it.

        The same header write says whether flags and refcounts agree (``clean``).
        """
        image = self._image
        data = encode_table(snapshots)
        offset = await self._claim(len(data), claimed)
        await self._write(offset, data)
        await self._settle_counts()
        old = image.header.snapshots_offset
        old_length = sum(len(each.encode()) for each in image.snapshots)
        changes: dict[str, Any] = {"nb_snapshots": len(snapshots), "snapshots_offset": offset}
        if image.header.version >= 3:
            bits = image.header.incompatible_features & ~INCOMPATIBLE_DIRTY
            changes["incompatible_features"] = bits | (0 if clean else INCOMPATIBLE_DIRTY)
        await image.update_header(**changes)
        image.stays_dirty = not clean and image.header.version >= 3
        image.snapshots = snapshots
        image.overlap.clear()
        if old_length:
            self._give_up([(old >> self._bits, image.geometry.cluster_count(old_length))])

    def _give_up(self, runs: list[tuple[int, int]]) -> None:
        """Nothing that the header on stable storage names makes these references any more."""
        self._image.frees.add(runs, Reason.SNAPSHOT)
        self._image.frees.settled()

    async def _claim(self, length: int, claimed: list[tuple[int, int]]) -> int:
        """New space for ``length`` bytes in one piece, noted in ``claimed``; 0 for no bytes."""
        count = self._image.geometry.cluster_count(length)
        if not count:
            return 0
        await self._image.prepare()
        first = await self._image.refcounts.allocator.allocate_exactly(count)
        claimed.append((first, count))
        return first << self._bits

    async def _write(self, offset: int, data: bytes) -> None:
        """Fill claimed space, up to the end of its last cluster."""
        if data:
            await self._image.storage.write(offset, data, bytes(-len(data) % (1 << self._bits)))

    async def _undo(self, shared: list[int], claimed: list[tuple[int, int]]) -> None:
        """After an error before the switch: as if nothing had been begun.

        What cannot be undone is leaked, and left to the check that the dirty mark asks for.
        """
        image = self._image
        if image.node.poisoned is not None:
            return
        with suppress(BlockError):
            for first, count in claimed:
                await image.refcounts.release(first, count)
            async for _, runs in self._batches(shared):
                for first, count in runs:
                    await image.refcounts.release(first, count)
            await self._settle_counts()
            await self._set_flags()
            await self._mark_clean()

    async def _share_all(self, l1: array[int], shared: list[int]) -> None:
        """One reference more to each table of ``l1`` and what it holds; no flag claims them.

        ``shared`` are the tables done.
        """
        refcounts = self._image.refcounts
        async for tables, runs in self._batches(self._tables(l1), clear=True):
            done: list[tuple[int, int]] = []
            try:
                for first, count in runs:
                    await refcounts.increase(first, count)
                    done.append((first, count))
            except BaseException:
                with suppress(BlockError):
                    for first, count in done:
                        await refcounts.release(first, count)
                raise
            shared += tables

    async def _drop_tree(self, l1_offset: int, l1: array[int]) -> None:
        """Give up an L1 table and all that it refers to."""
        image = self._image
        clusters = image.geometry.cluster_count(len(l1) * 8)
        if clusters:
            self._give_up([(l1_offset >> self._bits, clusters)])
        async for _, runs in self._batches(self._tables(l1)):
            self._give_up(runs)
            await image.frees.apply(force=True)
        await image.frees.apply(force=True)

    def _tables(self, l1: array[int]) -> list[int]:
        """Where the L2 tables of an L1 table are."""
        geometry = self._image.geometry
        return [decode_l1(entry, geometry) for entry in l1 if entry & ~COPIED]

    async def _batches(
        self, tables: list[int], *, clear: bool = False
    ) -> AsyncIterator[tuple[list[int], list[tuple[int, int]]]]:
        """L2 tables, some at a time, with the (first, count) runs that they and their entries
        refer to; ``clear``: copied flags found in them are cleared.

        Of many tables together, the runs are few even where each is fragmented.
        """
        batch: list[int] = []
        offsets: list[int] = []
        runs: list[tuple[int, int]] = []
        for table in tables:
            found = await self._table(table)
            entries = found.entries
            if clear:
                await self._update_table(table, found, clear_bits(entries, COPIED))
            batch.append(table)
            offsets.append(table)
            self._collect(entries, offsets, runs)
            if len(offsets) + len(runs) > _BATCH_ENTRIES:
                yield batch, self._as_runs(offsets, runs)
                batch, offsets, runs = [], [], []
        if batch:
            yield batch, self._as_runs(offsets, runs)

    def _collect(
        self, entries: array[int], offsets: list[int], runs: list[tuple[int, int]]
    ) -> None:
        """Add the clusters of plain entries to ``offsets``, those of others to ``runs``."""
        plain = clear_bits(entries, COPIED | ZERO)
        if any_bits(plain, self._bad):
            runs += self._mapping.references(entries, 0)
        else:
            offsets += filter(None, plain)

    def _as_runs(self, offsets: list[int], runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        offsets.sort()
        bits, step = self._bits, 1 << self._bits
        start = end = offsets[0]
        for offset in offsets:
            if offset == end:
                end += step
            else:
                runs.append((start >> bits, (end - start) >> bits))
                start, end = offset, offset + step
        runs.append((start >> bits, (end - start) >> bits))
        return runs

    async def _set_flags(self) -> None:
        """Set the copied flags of the active tables where refcounts are one, and only there."""
        image = self._image
        await image.prepare()
        for index in range(len(image.l1)):
            table = image.l2_table(index)
            if not table:
                continue
            alone = await image.refcounts.get(table >> self._bits) == 1
            entry = encode_l1(table, copied=alone)
            if entry != image.l1[index]:
                image.l1[index] = entry
                image.l1_dirty.add(index // L1_SECTOR_ENTRIES)
            if alone:
                # What a shared table refers to is shared as well, and has no flags.
                found = await self._table(table)
                await self._update_table(table, found, await self._flagged(found.entries))
        await image.write_l1()

    async def _flagged(self, entries: array[int]) -> array[int]:
        """The entries with the flags that refcounts call for."""
        refcounts = self._image.refcounts
        span = self._image.geometry.refcount_block_entries
        block, block_counts = -1, array("B")
        flagged, plain = clear_bits(entries, COPIED), clear_bits(entries, COPIED | ZERO)
        for index, end in self._runs(plain):
            if plain[index] & COMPRESSED:
                continue
            cluster = (plain[index] & OFFSET_MASK) >> self._bits
            if end == index + 1:
                number, position = divmod(cluster, span)
                if number != block:
                    block, block_counts = number, await refcounts.counts(number * span, span)
                if block_counts[position] == 1:
                    flagged[index] |= COPIED
                continue
            while index < end:
                counts = await refcounts.counts(cluster, end - index)
                stop = index + len(counts)
                if counts.count(1) == len(counts):
                    flagged[index:stop] = set_bits(flagged[index:stop], COPIED)
                elif 1 in counts:
                    for number, count in enumerate(counts):
                        if count == 1:
                            flagged[index + number] |= COPIED
                cluster, index = cluster + len(counts), stop
        return flagged

    async def _replace_l1(self, l1: array[int]) -> None:
        """Let the active table be ``l1``, which differs in flags only."""
        image = self._image
        sectors = -(-len(l1) // L1_SECTOR_ENTRIES)
        image.l1 = l1
        image.l1_dirty.update(range(sectors))
        await image.write_l1()

    async def _read_l1(self, snapshot: Snapshot) -> array[int]:
        length = snapshot.l1_size * 8
        return load_table(await self._image.storage.read(snapshot.l1_table_offset, length))

    async def _table(self, offset: int) -> Slice:
        """An L2 table of the file."""
        geometry = self._image.geometry
        data = await self._image.storage.read(offset, geometry.cluster_size)
        return Slice(*load_l2_table(data, geometry))

    async def _update_table(self, offset: int, old: Slice, new: array[int]) -> None:
        if new != old.entries:
            size = self._image.geometry.cluster_size
            self._image.overlap.check(offset, size, own=_ANY_L2)
            await self._image.storage.write(offset, store_l2_table(new, old.bitmaps))

    def _runs(self, plain: array[int]) -> Iterator[tuple[int, int]]:
        """From where to where entries that hold something name consecutive clusters."""
        find, step, total = Slice(plain).run_end, 1 << self._bits, len(plain)
        index = 0
        while index < total:
            entry = plain[index]
            if not entry:
                index = find(index, 0)
                continue
            end = index + 1
            if end < total and plain[end] == entry + step:
                end = find(index, step)
            yield index, end
            index = end


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20
