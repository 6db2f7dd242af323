"""The walk of ``check``: every reference to a host cluster that an image's metadata holds.

Public:
    Walk(image).run(stored)     fills ``image.recount`` and the cluster statistics

1. References are counted from the header, the active tables, snapshots, bitmaps, the encryption
   header, and the refcount structure, in this order, which is also that of what is reported.
2. One L2 table is looked at at a time. Zeros are skipped and contiguous clusters are counted as
   one run; only entries that are neither are looked at one by one.
3. What cannot be followed is reported and not followed; nothing is followed past the file's end.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Final

from blocklayer.codec.qcow2 import bitmaps
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    ZERO,
    decode_compressed,
    load_table,
)
from blocklayer.codec.qcow2.geometry import MAX_L1_TABLE_SIZE
from blocklayer.codec.qcow2.snapshots import Snapshot, decode_table, table_size_bound
from blocklayer.codec.qcow2.subclusters import ALLOCATED, bitmap_problem
from blocklayer.codec.qcow2.validation import full_disk_encryption_area
from blocklayer.drivers.qcow2.check_bitmaps import Contradictions, contradiction
from blocklayer.drivers.qcow2.check_data_file import count_table
from blocklayer.drivers.qcow2.check_image import CheckedImage, StoredRefcounts
from blocklayer.drivers.qcow2.recount import COPIED_REFERENCE, SHARED_REFERENCE
from blocklayer.errors import BlockError, CorruptionError, FormatError
from blocklayer.units import GIB, KIB, MIB

_READ_SIZE: Final = MIB // 2
_L1_CHUNK: Final = 64 * KIB
_SPARE_TABLES_SIZE: Final = GIB
_PIECE_ENTRIES: Final = 64
_PIECE: Final = _PIECE_ENTRIES * 8
_ZERO_PIECE: Final = bytes(_PIECE)
_COPIED_BYTE: Final = b"\x80"
_UNPACK_PIECE: Final = struct.Struct(f">{_PIECE_ENTRIES}Q").unpack

_LONG_RUN_ENTRIES: Final = 1024


def _ones(count: int) -> int:
    """One in each of ``count`` entries read as one number; times a value, that value in each."""
    return int.from_bytes((b"\0" * 7 + b"\1") * count, "big")


def _ordinals(count: int) -> int:
    """0, 1, 2, … in ``count`` entries read as one number."""
    return int.from_bytes(struct.pack(f">{count}Q", *range(count)), "big")


class Walk:
    """One pass over all metadata of ``image``."""

    def __init__(self, image: CheckedImage) -> None:
        self.image = image
        geometry = image.geometry
        self.blocks: dict[int, int] = {}
        """Refcount blocks that were counted: offset by index."""
        self.table_counted = False
        self._active = False
        self._host = OFFSET_MASK & ~geometry.cluster_mask
        self._odd = ~(COPIED | self._host)
        self._runs = [
            (count, _ones(count), _ordinals(count) << geometry.cluster_bits)
            for count in (_LONG_RUN_ENTRIES, _PIECE_ENTRIES)
        ]
        self._reserved = L2_RESERVED | (ZERO if geometry.extended_l2 else 0)
        self._contradictions = Contradictions(geometry.l2_entries if geometry.extended_l2 else 0)
        self._bitmaps = array("Q")
        """Those of the table that is looked at, with extended L2 entries."""
        self._expected = 0
        # In an image that is whole, a table is used once by the disk and once by each snapshot.
        self._tables_left = image.file_clusters * (1 + image.header.nb_snapshots)
        self._tables_left += _SPARE_TABLES_SIZE >> geometry.cluster_bits
        self._zeros = bytes(geometry.cluster_size)
        self._buffer = memoryview(bytearray(max(_READ_SIZE, geometry.cluster_size)))

    async def run(self, stored: StoredRefcounts) -> None:
        """Count everything."""
        image, header = self.image, self.image.header
        self._note_metadata(stored)
        image.refer(0, image.geometry.cluster_size)
        self._active = True
        await self._count_l1(header.l1_table_offset, header.l1_size)
        self._active = False
        if header.nb_snapshots and not await self._count_snapshots():
            return
        area = full_disk_encryption_area(header)
        if area is not None:
            image.refer(*area)
        await self._count_bitmaps()
        self._count_refcounts(stored)

    def _note_metadata(self, stored: StoredRefcounts) -> None:
        """Which clusters no repair of an L2 table may touch."""
        header, bits = self.image.header, self.image.geometry.cluster_bits
        metadata = self.image.metadata
        metadata.add(0)
        area = full_disk_encryption_area(header)
        for offset, length in (
            (header.l1_table_offset, header.l1_size * 8),
            (header.refcount_table_offset, header.refcount_table_clusters << bits),
            (header.snapshots_offset, 1 if header.nb_snapshots else 0),
            area or (0, 0),
        ):
            metadata.update(range(offset >> bits, (offset + length + (1 << bits) - 1) >> bits))
        metadata.update(entry >> bits for entry in stored.table if entry)

    async def _count_l1(self, offset: int, size: int) -> None:
        """An L1 table of ``size`` entries, and all below it."""
        if not size:
            return
        image = self.image
        image.refer(offset, size * 8)
        for start in range(0, size * 8, _L1_CHUNK):
            length = min(_L1_CHUNK, size * 8 - start)
            entries = load_table(await image.storage.read(offset + start, length))
            indexes = [index for index, entry in enumerate(entries, start // 8) if entry]
            await self._count_tables([entry for entry in entries if entry], indexes)

    async def _count_tables(self, l1_entries: list[int], indexes: list[int]) -> None:
        """The L2 tables that these entries point at; tables that lie in a row are read as one."""
        image, cluster_size = self.image, self.image.geometry.cluster_size
        at_once = max(1, _READ_SIZE // cluster_size)
        start = 0
        self._tables_left -= len(l1_entries)
        if self._tables_left < 0:
            raise CorruptionError(
                f"'{image.storage.node.filename}' refers to more L2 tables than it can hold"
            )
        while start < len(l1_entries):
            offset = l1_entries[start] & OFFSET_MASK
            stop = start + 1
            while (
                stop < len(l1_entries)
                and stop - start < at_once
                and l1_entries[stop] & OFFSET_MASK == offset + (stop - start) * cluster_size
            ):
                stop += 1
            data = self._buffer[: (stop - start) * cluster_size]
            await image.storage.read_into(offset, data)
            for index, entry in enumerate(l1_entries[start:stop]):
                self._refer_table(entry)
                table = bytes(data[index * cluster_size : (index + 1) * cluster_size])
                if image.geometry.data_file:
                    count_table(image, table, indexes[start + index])
                elif image.geometry.extended_l2:
                    await self._count_extended(table, offset + index * cluster_size)
                else:
                    await self._count_table(table, offset + index * cluster_size)
            start = stop

    def _refer_table(self, l1_entry: int) -> None:
        image = self.image
        if l1_entry & L1_RESERVED:
            image.corruption(f" found L1 entry with reserved bits set: {l1_entry:x}")
        offset = l1_entry & OFFSET_MASK
        image.refer(offset, image.geometry.cluster_size, self._flag(l1_entry))
        if offset & image.geometry.cluster_mask:
            image.corruption(
                f" l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            )

    def _flag(self, entry: int) -> int:
        if not self._active:
            return 0
        return COPIED_REFERENCE if entry & COPIED else SHARED_REFERENCE

    async def _count_table(self, data: bytes, table_offset: int) -> None:
        """One L2 table: find its entries, lone ones fast, the rest in pieces."""
        self._expected = 0
        size, zeros, find = len(data), self._zeros, data.find
        lone: list[bytes] = []
        start = position = 0
        while position < size:
            # Most entries start with the copied bit, and nothing finds a byte faster than this.
            hit = find(_COPIED_BYTE, position)
            while hit & 7 and hit > 0:
                hit = find(_COPIED_BYTE, hit + 1)
            found = hit if hit >= 0 else size
            if data[position:found] != zeros[: found - position]:
                end = found
            elif found == size:
                break
            else:
                position = found
                end = found + 8
                if end == size or not data[end]:
                    lone.append(data[found:end])
                    position = end
                    continue
                end = min(found + _PIECE, size)
            await self._count_lone(lone, data, start, position, table_offset)
            run = self._count_run(data, position)
            if not run:
                await self._count_range(data, position, end, table_offset)
            start = position = position + run if run else end
        await self._count_lone(lone, data, start, size, table_offset)

    async def _count_extended(self, data: bytes, table_offset: int) -> None:
        """One L2 table of extended entries: as others, if no bitmap contradicts its entry."""
        words = memoryview(data).cast("Q")
        entries, bitmaps = words[::2].tobytes(), words[1::2].tobytes()
        self._bitmaps = load_table(bitmaps)
        if not self._contradictions.any(entries, bitmaps):
            await self._count_table(entries, table_offset)
            return
        self._expected, geometry = 0, self.image.geometry
        for index, entry in enumerate(load_table(entries)):
            contradicts = bitmap_problem(entry, self._bitmaps[index], geometry) is not None
            if contradicts or (entry and not self._count_plain((entry,))):
                await self._count_odd_or_repair(entry, index, table_offset)

    async def _count_lone(
        self, lone: list[bytes], data: bytes, start: int, end: int, table_offset: int
    ) -> None:
        """Entries of ``data[start:end]`` that were put aside; there are no others in it."""
        if lone and not self._count_plain(load_table(b"".join(lone))):
            await self._count_range(data, start, end, table_offset)
        lone.clear()

    async def _count_range(self, data: bytes, start: int, end: int, table_offset: int) -> None:
        """The entries in ``data[start:end]``."""
        at = start
        while at < end:
            piece = data[at : min(at + _PIECE, end)]
            if len(piece) == _PIECE:
                run = _PIECE if piece == _ZERO_PIECE else self._count_run(data, at, end)
                if run:
                    at += run
                    continue
                words = _UNPACK_PIECE(piece)
            else:
                words = tuple(load_table(piece))
            if not self._count_plain(tuple(filter(None, words))):
                for index, entry in enumerate(words):
                    if entry and not self._count_plain((entry,)):
                        await self._count_odd_or_repair(entry, at // 8 + index, table_offset)
            at += len(piece)

    def _count_run(self, data: bytes, at: int, end: int | None = None) -> int:
        """Count entries from ``at`` on that map contiguous clusters; the answer is their length.

        0 if there are not at least a piece of them, or something is special about them.
        """
        image, cluster_size = self.image, self.image.geometry.cluster_size
        end = len(data) if end is None else end
        first = int.from_bytes(data[at : at + 8], "big")
        host = first & self._host
        if first & self._odd or not host:
            return 0
        for count, ones, steps in self._runs:
            stop = at + count * 8
            if (
                stop <= end
                and int.from_bytes(data[stop - 8 : stop], "big")
                == first + (count - 1) * cluster_size
                and host + count * cluster_size <= image.file_size
                and int.from_bytes(data[at:stop], "big") == first * ones + steps
            ):
                if self._active:
                    image.result.allocated_clusters += count
                    image.result.fragmented_clusters += self._expected not in (0, host)
                self._expected = host + count * cluster_size
                cluster = host >> image.geometry.cluster_bits
                image.recount.add_run(cluster, count, self._flag(first))
                return count * 8
        return 0

    def _count_plain(self, entries: Sequence[int]) -> bool:
        """Count entries that just map clusters; False, and no effect, if one of them does not."""
        image = self.image
        odd, mask, limit = self._odd, self._host, image.file_size
        cluster_size, bits = image.geometry.cluster_size, image.geometry.cluster_bits
        copied: list[int] = []
        shared: list[int] = []
        expected, fragmented = self._expected, 0
        for entry in entries:
            host = entry & mask
            if entry & odd or host >= limit or not host:
                return False
            if host != expected and expected:
                fragmented += 1
            expected = host + cluster_size
            (copied if entry >= COPIED else shared).append(host >> bits)
        self._expected = expected
        if self._active:
            image.result.allocated_clusters += len(entries)
            image.result.fragmented_clusters += fragmented
        if copied:
            image.recount.add_all(copied, COPIED_REFERENCE if self._active else 0)
        if shared:
            image.recount.add_all(shared, SHARED_REFERENCE if self._active else 0)
        return True

    async def _count_odd_or_repair(self, entry: int, index: int, table_offset: int) -> None:
        """An entry that is not plain. A zero cluster with a broken offset can do without it."""
        image = self.image
        host = entry & OFFSET_MASK
        has_data = self._has_data(entry, index)
        if (
            "errors" in image.repair
            and not has_data
            and not entry & (COMPRESSED | L2_RESERVED)
            and host & image.geometry.cluster_mask
            and image.may_write_table(table_offset)
        ):
            image.note(
                f"Repairing offset={host:x}: Preallocated cluster is not properly aligned; "
                "L2 entry corrupted."
            )
            place = table_offset + index * image.geometry.l2_entry_size
            # What reads as zeros of a cluster with subclusters, the bitmap goes on to say.
            mended = 0 if image.geometry.extended_l2 else ZERO
            await image.write(place, mended.to_bytes(8, "big"))
            image.result.corruptions_fixed += 1
            return
        self._count_odd(entry, index, has_data)

    def _has_data(self, entry: int, index: int) -> bool:
        """Whether the cluster of a standard entry holds any data, as far as its table says."""
        if self.image.geometry.extended_l2:
            return bool(self._bitmaps[index] & ALLOCATED)
        return not entry & ZERO

    def _count_odd(self, entry: int, index: int, has_data: bool) -> None:
        """An entry that is compressed, zero, broken, or points past the end of the file."""
        image, geometry = self.image, self.image.geometry
        if entry & COMPRESSED:
            if geometry.extended_l2 and self._bitmaps[index]:
                image.corruption(
                    f" compressed cluster {index} with non-zero subcluster allocation bitmap, "
                    f"entry={entry:#x}"
                )
                return
            self._count_compressed(entry)
            return
        if entry & self._reserved:
            image.corruption(f" found l2 entry with reserved bits set: {entry:x}")
        host = entry & OFFSET_MASK
        if geometry.extended_l2 and bitmap_problem(entry, self._bitmaps[index], geometry):
            image.corruption(contradiction(entry, geometry))
        if not host:
            return
        if host & geometry.cluster_mask:
            kind = "Data" if has_data else "Preallocated"
            image.corruption(
                f" offset={host:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
            )
        if self._active:
            image.result.allocated_clusters += 1
            image.result.fragmented_clusters += self._expected not in (0, host)
        self._expected = host + geometry.cluster_size
        image.refer(host, geometry.cluster_size, self._flag(entry))

    def _count_compressed(self, entry: int) -> None:
        image = self.image
        offset, length = decode_compressed(entry, image.geometry)
        if entry & COPIED:
            image.corruption(
                f": coffset={offset:#x}: copied flag must never be set for compressed clusters"
            )
        if self._active:
            # Compressed clusters never lie where a contiguous read would want them.
            image.result.allocated_clusters += 1
            image.result.compressed_clusters += 1
            image.result.fragmented_clusters += 1
        image.refer(offset, length)

    async def _count_snapshots(self) -> bool:
        """The snapshot table and the tables of every snapshot; False if it cannot be read."""
        image, header = self.image, self.image.header
        start = header.snapshots_offset
        bound = min(table_size_bound(header.nb_snapshots), max(0, image.file_size - start))
        try:
            data = await image.storage.read(start, bound)
            snapshots, length = decode_table(data, header.nb_snapshots)
        except BlockError as error:
            image.failure(f"ERROR failed to read the snapshot table: {error}")
            return False
        for snapshot in snapshots:
            await self._count_snapshot(snapshot)
        image.refer(start, length)
        return True

    async def _count_snapshot(self, snapshot: Snapshot) -> None:
        image = self.image
        where = f" snapshot {snapshot.id} ({snapshot.name})"
        if snapshot.l1_table_offset & image.geometry.cluster_mask:
            image.corruption(
                f"{where} l1_offset={snapshot.l1_table_offset:#x}: L1 table is not cluster "
                "aligned; snapshot table entry corrupted"
            )
        elif snapshot.l1_size * 8 > MAX_L1_TABLE_SIZE:
            image.corruption(
                f"{where} l1_size={snapshot.l1_size:#x}: L1 table is too large; snapshot table "
                "entry corrupted"
            )
        else:
            bits = image.geometry.cluster_bits
            image.metadata.add(snapshot.l1_table_offset >> bits)
            await self._count_l1(snapshot.l1_table_offset, snapshot.l1_size)

    async def _count_bitmaps(self) -> None:
        """The bitmap directory, tables and data, while the header vouches for them."""
        image, header = self.image, self.image.header
        data = header.extension(qcow2_header.EXTENSION_BITMAPS)
        if data is None or not header.autoclear_features & qcow2_header.AUTOCLEAR_BITMAPS:
            return
        try:
            extension = bitmaps.decode_bitmaps_extension(data)
            offset, size = extension.bitmap_directory_offset, extension.bitmap_directory_size
            image.refer(offset, size)
            entries = bitmaps.decode_directory(
                await image.storage.read(offset, size), extension.nb_bitmaps
            )
        except FormatError as error:
            image.corruption(f" bitmap directory: {error}")
            return
        for entry in entries:
            await self._count_bitmap(entry)

    async def _count_bitmap(self, entry: bitmaps.BitmapEntry) -> None:
        image = self.image
        if entry.bitmap_table_size > bitmaps.MAX_TABLE_ENTRIES:
            image.corruption(f" bitmap '{entry.name}': table is too large")
            return
        size = entry.bitmap_table_size * 8
        image.refer(entry.bitmap_table_offset, size)
        for start in range(0, min(size, max(0, image.file_size)), _READ_SIZE):
            length = min(_READ_SIZE, size - start)
            table = await image.storage.read(entry.bitmap_table_offset + start, length)
            for word in load_table(table):
                problem = bitmaps.bitmap_table_problem(word, image.geometry)
                if problem is not None:
                    image.corruption(f" bitmap '{entry.name}': {problem}")
                elif word & OFFSET_MASK:
                    image.refer(word & OFFSET_MASK, image.geometry.cluster_size)

    def _count_refcounts(self, stored: StoredRefcounts) -> None:
        """The refcount table and its blocks."""
        image, header = self.image, self.image.header
        before = image.result.corruptions
        size = header.refcount_table_clusters << header.cluster_bits
        image.refer(header.refcount_table_offset, size)
        self.table_counted = image.result.corruptions == before
        for index, entry in enumerate(stored.table):
            if entry:
                self._count_block(index, entry)
        if len(self.blocks) > image.file_clusters:
            raise CorruptionError(
                f"'{image.storage.node.filename}' refers to more refcount blocks than it can hold"
            )
        image.structure_faults = image.result.corruptions - before

    def _count_block(self, index: int, entry: int) -> None:
        image, geometry = self.image, self.image.geometry
        cluster = entry >> geometry.cluster_bits
        if entry & REFCOUNT_TABLE_RESERVED:
            image.corruption(f" refcount table entry {index} has reserved bits set")
            image.structure_broken = True
        elif entry & geometry.cluster_mask:
            image.corruption(
                f" refcount block {index} is not cluster aligned; refcount table entry corrupted"
            )
            image.structure_broken = True
        elif cluster >= image.file_clusters:
            image.corruption(f" refcount block {index} is outside image")
        else:
            image.recount.add(cluster)
            self.blocks[index] = entry
            # An overflow is reported by itself, once all is counted.
            references = min(image.recount.get(cluster), geometry.refcount_max)
            if references != 1:
                image.corruption(f" refcount block {index} refcount={references}")
                image.structure_broken = True
