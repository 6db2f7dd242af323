"""The sizes that follow from a qcow2 header, computed once, and how offsets split by them.

Public:
    Geometry.make(cluster_bits, *, version=3, refcount_order=4, extended_l2=False,
                  data_file=False) -> Geometry
    Geometry.of(header) -> Geometry               also: the fields below, all plain integers
      .split(guest_offset) -> (l1_index, l2_index, offset_in_cluster)
      .join(l1_index, l2_index) -> guest_offset
      .cluster_count(length), .l1_entries(size), .align_down(offset), .align_up(offset)
      .refcount_position(host_offset) -> (table_index, block_index)
      .refcount_clusters(known) -> (blocks, table_clusters)
    MAX_L1_TABLE_SIZE, MAX_REFCOUNT_TABLE_SIZE (bytes)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2.entries import COPIED, OFFSET_MASK

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.header import ImageHeader

MAX_L1_TABLE_SIZE: Final = 32 << 20
MAX_REFCOUNT_TABLE_SIZE: Final = 8 << 20

# Above the standard descriptor's 47 bits of offset the format cannot point.
HOST_OFFSET_BITS: Final = 56


class Geometry(msgspec.Struct, frozen=True):
    """Sizes in bytes, counts in entries. Make one with `make` or `of`."""

    version: int
    cluster_bits: int
    cluster_size: int
    # offset & cluster_mask is the offset within its cluster.
    cluster_mask: int
    extended_l2: bool
    # What is allocated or zeroed by itself: a cluster, or 1/32 of one with extended L2 entries.
    subcluster_bits: int
    subcluster_size: int
    # Guest data live in another file, at host offset = guest offset.
    data_file: bool
    # The bits of an L2 entry, not compressed, of which one is set if it has a cluster. In a data
    # file the first cluster lies at 0, and the copied flag tells that an entry has it.
    held_mask: int
    l2_entry_size: int
    l2_bits: int
    l2_entries: int
    # Guest bytes that one L2 table, that is one L1 entry, maps.
    l1_entry_span: int
    refcount_order: int
    refcount_bits: int
    refcount_max: int
    refcount_block_entries: int
    # Host bytes that one refcount block counts.
    refcount_block_span: int
    # The largest guest size that the largest L1 table maps.
    max_size: int
    # Width of the offset in a compressed descriptor; the sector count is above it.
    compressed_offset_bits: int
    # Compressed data lie below this host offset, normal clusters below max_host_offset.
    max_compressed_offset: int
    max_host_offset: int

    @classmethod
    def make(
        cls,
        cluster_bits: int,
        *,
        version: int = 3,
        refcount_order: int = 4,
        extended_l2: bool = False,
        data_file: bool = False,
    ) -> Geometry:
        l2_entry_bits = 4 if extended_l2 else 3
        l2_bits = cluster_bits - l2_entry_bits
        refcount_bits = 1 << refcount_order
        block_entries = (8 << cluster_bits) >> refcount_order
        subcluster_bits = cluster_bits - (5 if extended_l2 else 0)
        compressed_offset_bits = 62 - (cluster_bits - 8)
        return cls(
            version=version,
            cluster_bits=cluster_bits,
            cluster_size=1 << cluster_bits,
            cluster_mask=(1 << cluster_bits) - 1,
            extended_l2=extended_l2,
            subcluster_bits=subcluster_bits,
            subcluster_size=1 << subcluster_bits,
            data_file=data_file,
            held_mask=OFFSET_MASK | (COPIED if data_file else 0),
            l2_entry_size=1 << l2_entry_bits,
            l2_bits=l2_bits,
            l2_entries=1 << l2_bits,
            l1_entry_span=1 << (cluster_bits + l2_bits),
            refcount_order=refcount_order,
            refcount_bits=refcount_bits,
            refcount_max=(1 << refcount_bits) - 1,
            refcount_block_entries=block_entries,
            refcount_block_span=block_entries << cluster_bits,
            max_size=(MAX_L1_TABLE_SIZE // 8) << (cluster_bits + l2_bits),
            compressed_offset_bits=compressed_offset_bits,
            max_compressed_offset=1 << min(compressed_offset_bits, HOST_OFFSET_BITS),
            max_host_offset=1 << HOST_OFFSET_BITS,
        )

    @classmethod
    def of(cls, header: ImageHeader) -> Geometry:
        """The geometry of a decoded header, which `validate` has accepted."""
        return cls.make(
            header.cluster_bits,
            version=header.version,
            refcount_order=header.refcount_order,
            extended_l2=header.extended_l2,
            data_file=header.has_data_file,
        )

    def split(self, guest_offset: int) -> tuple[int, int, int]:
        """L1 index, L2 index and offset in the cluster."""
        cluster_index = guest_offset >> self.cluster_bits
        return (
            cluster_index >> self.l2_bits,
            cluster_index & (self.l2_entries - 1),
            guest_offset & self.cluster_mask,
        )

    def join(self, l1_index: int, l2_index: int) -> int:
        """Guest offset of the cluster that this entry describes."""
        return ((l1_index << self.l2_bits) + l2_index) << self.cluster_bits

    def align_down(self, offset: int) -> int:
        return offset & ~self.cluster_mask

    def align_up(self, offset: int) -> int:
        return (offset + self.cluster_mask) & ~self.cluster_mask

    def cluster_count(self, length: int) -> int:
        """Clusters that hold `length` bytes from a cluster's start."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def l1_entries(self, size: int) -> int:
        """L1 entries that map a disk of `size` bytes."""
        return (size + self.l1_entry_span - 1) >> (self.cluster_bits + self.l2_bits)

    def refcount_position(self, host_offset: int) -> tuple[int, int]:
        """Refcount table index and index in the block, of the cluster at `host_offset`."""
        return divmod(host_offset >> self.cluster_bits, self.refcount_block_entries)

    def refcount_clusters(self, known: int) -> tuple[int, int]:
        """Refcount blocks, and clusters of their table, that count `known` clusters and all of
        themselves."""
        blocks = table = 0
        while True:
            more = -(-(known + blocks + table) // self.refcount_block_entries)
            wider = self.cluster_count(more * 8)
            if (more, wider) == (blocks, table):
                return blocks, table
            blocks, table = more, wider
