"""Where the first structures of a new image go: plain arithmetic, no I/O.

Public:
    plan(geometry, size, *, mapped, crypto) -> Layout   where everything lies
    refcount_pieces(layout)     (offset, bytes) of the refcount table and its blocks

1. Without preallocation the file is the one qemu-img writes, byte for byte, as long as its refcount
   table fits in one cluster (with more clusters the order differs, as does a preallocated image's).
2. Refcount blocks count themselves, the table, and every cluster that the layout uses, no other.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

import msgspec

from blocklayer.codec.qcow2.entries import store_table
from blocklayer.codec.qcow2.geometry import MAX_REFCOUNT_TABLE_SIZE, Geometry
from blocklayer.codec.qcow2.refcounts import TYPECODES, encode_block
from blocklayer.errors import UsageError
from blocklayer.units import MIB

_CHUNK: Final = MIB


class Layout(msgspec.Struct, frozen=True):
    """Where everything of a new image lies. Offsets in bytes."""

    geometry: Geometry
    size: int
    table_clusters: int
    l1_offset: int
    l1_size: int
    l2_offset: int
    """The first L2 table; all are contiguous. 0 if nothing is mapped."""
    data_offset: int
    """The first data cluster; all are contiguous. With a data file: 0, its start."""
    data_clusters: int
    blocks: list[tuple[int, int]]
    """(index in the refcount table, offset) of every refcount block, by offset."""
    used_clusters: int
    file_size: int
    crypto_offset: int = 0
    """The LUKS header, 0 if there is none."""
    crypto_size: int = 0

    @property
    def table_offset(self) -> int:
        """Offset of the refcount table."""
        return self.geometry.cluster_size


def plan(geometry: Geometry, size: int, *, mapped: bool = False, crypto: int = 0) -> Layout:
    """Where everything goes in an image of ``size`` bytes; ``mapped``: all clusters preallocated,
    ``crypto``: bytes of a LUKS header.

    Header, refcount table and first refcount block lead, then the L1 table, the LUKS header, what
    is mapped, and the refcount blocks that all this needs besides the first.
    """
    l1_size = geometry.l1_entries(size)
    l1_clusters = geometry.cluster_count(l1_size * 8)
    l2_clusters = l1_size if mapped else 0
    data_clusters = geometry.cluster_count(size) if mapped else 0
    crypto_clusters = geometry.cluster_count(crypto)
    content = l1_clusters + crypto_clusters + l2_clusters
    if not geometry.data_file:
        content += data_clusters
    table_clusters = 1
    while True:
        first = table_clusters + 2
        placed, used = _place_blocks(geometry.refcount_block_entries, first - 1, first + content)
        needed = geometry.cluster_count(8 * len(placed))
        if needed <= table_clusters:
            break
        table_clusters = needed
    if table_clusters << geometry.cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
        raise UsageError(
            "The image size is too large to preallocate (try using a larger cluster size)"
        )
    bits = geometry.cluster_bits
    # qemu-img ends the file with the last entry of an L1 table that comes last.
    ends_in_l1 = len(placed) == 1 and not mapped and not crypto and l1_size
    after = first + l1_clusters + crypto_clusters
    return Layout(
        geometry=geometry,
        size=size,
        table_clusters=table_clusters,
        l1_offset=first << bits if l1_size else 0,
        l1_size=l1_size,
        crypto_offset=(first + l1_clusters) << bits if crypto else 0,
        crypto_size=crypto,
        l2_offset=after << bits if mapped else 0,
        data_offset=0 if geometry.data_file else (after + l2_clusters) << bits,
        data_clusters=data_clusters,
        blocks=[(index, cluster << bits) for index, cluster in placed],
        used_clusters=used,
        file_size=(first << bits) + l1_size * 8 if ends_in_l1 else used << bits,
    )


def _place_blocks(entries: int, first_block: int, end: int) -> tuple[list[tuple[int, int]], int]:
    """Refcount blocks for clusters ``[0, end)``, and for themselves, from ``end`` on.

    The answer lists them as (index, cluster), and says where free clusters begin.
    """
    placed = [(0, first_block)]
    known = {0}
    index = 0
    while index * entries < end:
        wanted = index
        # A block may be the first cluster of a range that has no block yet.
        while wanted not in known:
            placed.append((wanted, end))
            known.add(wanted)
            wanted = end // entries
            end += 1
        index += 1
    return placed, end


def refcount_pieces(layout: Layout) -> Iterator[tuple[int, bytes]]:
    """The refcount table and its blocks, each with its place in the file."""
    geometry = layout.geometry
    table = array("Q", bytes(layout.table_clusters << geometry.cluster_bits))
    for index, offset in layout.blocks:
        table[index] = offset
    yield layout.table_offset, store_table(table)
    # The first block lies apart, all others are contiguous.
    yield layout.blocks[0][1], _block(layout, 0)
    at_once = max(1, _CHUNK >> geometry.cluster_bits)
    for start in range(1, len(layout.blocks), at_once):
        part = layout.blocks[start : start + at_once]
        yield part[0][1], b"".join(_block(layout, index) for index, _ in part)


def _block(layout: Layout, index: int) -> bytes:
    """Refcount block ``index``: one reference for each used cluster."""
    entries = layout.geometry.refcount_block_entries
    order = layout.geometry.refcount_order
    used = min(max(layout.used_clusters - index * entries, 0), entries)
    counts = array(TYPECODES[order], (1,)) * used + array(TYPECODES[order], (0,)) * (entries - used)
    return encode_block(counts, order)
