"""A qcow2 image as a stream: planned as a whole, then given from its first byte to its last.

Public:
    StreamPlan(geometry, size): `add_plain`, `add_packed`, `add_zeros` in rising order, `settle()`;
      then its places and counts, `is_packed(index)`, and the bytes of its tables:
      `refcount_table()`, `refcount_blocks()`, `l1_table()`, `l2_tables()`
    Cursor(geometry): where the next cluster goes; the same for the plan and for the bytes

1. Header, refcount table, refcount blocks, L1 table, L2 tables, data: what is pointed at follows
   what points at it, so that the header can go first and nothing is changed afterwards. Only the
   lengths of all compressed clusters must be known beforehand.
2. Data stands in guest order. Compressed clusters share host clusters, as far as a refcount can
   count; a plain one begins a host cluster.
3. Memory: 17 bytes a run of clusters of one kind, 4 bytes a compressed cluster.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, NamedTuple

from blocklayer.codec.qcow2.entries import (
    COPIED,
    ZERO,
    encode_compressed,
    store_table,
)
from blocklayer.codec.qcow2.geometry import MAX_REFCOUNT_TABLE_SIZE, Geometry
from blocklayer.codec.qcow2.refcounts import TYPECODES, encode_block
from blocklayer.errors import UsageError

_PLAIN: Final = 0
_PACKED: Final = 1
_ZEROS: Final = 2


class Cursor:
    """The place of the next data, in bytes from where data begins."""

    def __init__(self, geometry: Geometry) -> None:
        self.at = 0
        self._bits = geometry.cluster_bits
        self._mask = geometry.cluster_mask
        self._most = geometry.refcount_max
        self._shares = 0
        """Compressed clusters that the host cluster at ``at`` holds a part of."""

    def plain(self, count: int) -> int:
        """Place ``count`` clusters; the answer is where."""
        place = self.at + self._mask & ~self._mask
        self.at = place + (count << self._bits)
        self._shares = 0
        return place

    def packed(self, length: int) -> int:
        """Place a compressed cluster; the answer is where."""
        if self._shares == self._most:
            self.plain(0)
        place = self.at
        self.at = end = place + length
        if not end & self._mask:
            self._shares = 0
        elif end >> self._bits == place >> self._bits:
            self._shares += 1
        else:
            self._shares = 1
        return place


class _Placed(NamedTuple):
    """``clusters`` from guest cluster ``first`` on, and where they are; one without a ``place``
    reads as zeros. ``length`` is that of a compressed one."""

    first: int
    clusters: int
    place: int | None
    length: int = 0


class StreamPlan:
    """Where everything of one image goes. Indexes and counts are of guest clusters."""

    def __init__(self, geometry: Geometry, size: int) -> None:
        self.geometry = geometry
        self.l1_size = geometry.l1_entries(size)
        self._kinds = bytearray()
        self._firsts = array("Q")
        self._counts = array("Q")
        self._lengths = array("I")
        self._cursor = Cursor(geometry)
        self._end = 0
        self._l2_count = 0
        self._last_table = -1

    def add_plain(self, index: int, count: int) -> None:
        """``count`` clusters that are stored as they are."""
        self._add(_PLAIN, index, count)
        self._cursor.plain(count)

    def add_packed(self, index: int, length: int) -> None:
        """A cluster of ``length`` compressed bytes."""
        self._add(_PACKED, index, 1)
        self._lengths.append(length)
        self._cursor.packed(length)

    def add_zeros(self, index: int, count: int) -> None:
        """Clusters that read as zeros whatever a backing file holds."""
        self._add(_ZEROS, index, count)

    def _add(self, kind: int, index: int, count: int) -> None:
        assert index >= self._end
        assert count > 0
        if self._kinds and self._kinds[-1] == kind and index == self._end:
            self._counts[-1] += count
        else:
            self._kinds.append(kind)
            self._firsts.append(index)
            self._counts.append(count)
        self._end = index + count
        bits = self.geometry.l2_bits
        first, last = index >> bits, (self._end - 1) >> bits
        self._l2_count += last - max(first, self._last_table + 1) + 1
        self._last_table = last

    def settle(self) -> None:
        """All clusters are known. Raises UsageError if no image can hold them."""
        geometry = self.geometry
        bits = geometry.cluster_bits
        l1_clusters = geometry.cluster_count(self.l1_size * 8)
        data = geometry.cluster_count(self._cursor.at)
        tables = l1_clusters + self._l2_count
        self.block_count, self.table_clusters = geometry.refcount_clusters(1 + tables + data)
        if self.table_clusters << bits > MAX_REFCOUNT_TABLE_SIZE:
            raise UsageError(
                "The image is too large for its refcount table (try using a larger cluster size)"
            )
        self.table_offset = geometry.cluster_size
        self.blocks_offset = (1 + self.table_clusters) << bits
        self.l1_offset = self.blocks_offset + (self.block_count << bits)
        self.l2_offset = self.l1_offset + (l1_clusters << bits)
        self.data_offset = self.l2_offset + (self._l2_count << bits)
        self.length = self.data_offset + (data << bits)
        """Bytes of the whole stream."""
        if self._lengths and self.length > geometry.max_compressed_offset:
            raise UsageError("The image is too large for compression with this cluster size")

    def is_packed(self, index: int) -> bool:
        """Whether the cluster was added with ``add_packed``."""
        run = bisect_right(self._firsts, index) - 1
        inside = run >= 0 and index < self._firsts[run] + self._counts[run]
        return inside and self._kinds[run] == _PACKED

    def packed_lengths(self) -> Iterator[int]:
        """The lengths of all compressed clusters, in order."""
        return iter(self._lengths)

    def _placed(self) -> Iterator[_Placed]:
        cursor, lengths = Cursor(self.geometry), self.packed_lengths()
        for kind, first, count in zip(self._kinds, self._firsts, self._counts, strict=True):
            if kind == _ZEROS:
                yield _Placed(first, count, None)
            elif kind == _PLAIN:
                yield _Placed(first, count, cursor.plain(count))
            else:
                for index in range(first, first + count):
                    length = next(lengths)
                    yield _Placed(index, 1, cursor.packed(length), length)

    def refcount_table(self) -> bytes:
        """The refcount table: the blocks stand one after the other."""
        table = array("Q", bytes(self.table_clusters << self.geometry.cluster_bits))
        for index in range(self.block_count):
            table[index] = self.blocks_offset + (index << self.geometry.cluster_bits)
        return store_table(table)

    def refcount_blocks(self) -> Iterator[bytes]:
        """The refcount blocks, one at a time."""
        order, entries = self.geometry.refcount_order, self.geometry.refcount_block_entries
        block = array(TYPECODES[order])
        for count, value in self._references():
            while count:
                part = min(count, entries - len(block))
                block.extend(array(TYPECODES[order], (value,)) * part)
                count -= part
                if len(block) == entries:
                    yield encode_block(block, order)
                    del block[:]
        if block:
            block.extend(array(TYPECODES[order], (0,)) * (entries - len(block)))
            yield encode_block(block, order)

    def _references(self) -> Iterator[tuple[int, int]]:
        """How many host clusters in a row have how many references, from the first on."""
        bits = self.geometry.cluster_bits
        yield self.data_offset >> bits, 1
        current = value = 0
        for _, count, place, length in self._placed():
            if place is None:
                continue
            first = place >> bits
            if value and first != current:
                yield 1, value
                value = 0
            if not length:
                yield count, 1
                current = first + count
                continue
            last = (place + length - 1) >> bits
            value += 1
            if last != first:
                yield 1, value
                value = 1
            current = last
        if value:
            yield 1, value

    def l1_table(self) -> bytes:
        """The L1 table, whole clusters."""
        table = array("Q", bytes(self.l2_offset - self.l1_offset))
        bits, place = self.geometry.l2_bits, self.l2_offset
        for first, count in zip(self._firsts, self._counts, strict=True):
            for index in range(first >> bits, ((first + count - 1) >> bits) + 1):
                if not table[index]:
                    table[index] = COPIED | place
                    place += self.geometry.cluster_size
        return store_table(table)

    def l2_tables(self) -> Iterator[bytes]:
        """The L2 tables that map something, one at a time."""
        geometry = self.geometry
        bits, current = geometry.l2_bits, -1
        table = array("Q")
        for index, count, place, length in self._placed():
            while count:
                if index >> bits != current:
                    if table:
                        yield store_table(table)
                    table, current = array("Q", bytes(8 * geometry.l2_entries)), index >> bits
                start = index & (geometry.l2_entries - 1)
                part = min(count, geometry.l2_entries - start)
                table[start : start + part] = self._entries(place, length, part)
                index, count = index + part, count - part
                if place is not None:
                    place += part << geometry.cluster_bits
        if table:
            yield store_table(table)

    def _entries(self, place: int | None, length: int, count: int) -> array[int]:
        if place is None:
            return array("Q", (ZERO,)) * count
        offset = self.data_offset + place
        if length:
            return array("Q", (encode_compressed(offset, length, self.geometry),))
        size = self.geometry.cluster_size
        return array("Q", range(COPIED | offset, (COPIED | offset) + count * size, size))
