"""An image as ``check`` looks at it: straight from the file, past the driver's caches.

Public:
    CheckedImage        header, geometry, file, what was found so far, and small repairs
    StoredRefcounts     the refcounts that the file holds

1. Nothing read here is trusted: what an entry points at is bounded by the file before it is used.
2. Findings are counted in full, but only the first ``_MAX_MESSAGES`` are kept as text.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import Final

from blocklayer.codec.qcow2.entries import MAX_FILE_OFFSET, REFCOUNT_TABLE_RESERVED, load_table
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import ImageHeader
from blocklayer.codec.qcow2.refcounts import decode_block
from blocklayer.drivers.qcow2.recount import Recount
from blocklayer.drivers.qcow2.storage import Storage
from blocklayer.errors import CorruptionError
from blocklayer.graph.checking import CheckResult
from blocklayer.units import MIB, SECTOR

_MAX_MESSAGES: Final = 100_000
_INCOMPATIBLE_AT: Final = 72
_REFCOUNT_TABLE_AT: Final = 48
_CACHED_BLOCKS_SIZE: Final = 4 * MIB


class CheckedImage:
    """What all passes of one check share."""

    def __init__(self, storage: Storage, header: ImageHeader, repair: frozenset[str]) -> None:
        self.storage = storage
        self.header = header
        self.geometry = Geometry.of(header)
        self.repair = repair
        self.result = CheckResult(total_clusters=self.geometry.cluster_count(header.size))
        self.file_size = storage.size
        self.data_end = 0
        """Where the last cluster in a data file ends."""
        self.recount = Recount()
        self.outside = Recount()
        """References to clusters past the end of the file: nothing may be put there."""
        self.metadata: set[int] = set()
        """Clusters of tables that no L2 table may share."""
        self.structure_faults = 0
        """Corruptions of the refcount structure, which a rebuild repairs."""
        self.structure_broken = False
        """The refcount structure cannot be used as it is."""
        self.flags_suspect = False
        """A copied flag may be wrong…"""
        self.sound_windows: set[int] = set()
        """…but none for a cluster in these windows of ``recount``."""
        self.changed = False

    @property
    def file_clusters(self) -> int:
        """Clusters that the file has, the last perhaps in part."""
        return self.geometry.cluster_count(self.file_size)

    @property
    def sound(self) -> bool:
        """Nothing worse than a leak was found, or is left."""
        return not self.result.check_errors and not self.result.corruptions

    def note(self, message: str) -> None:
        """Keep a line for the user."""
        messages = self.result.messages
        if len(messages) < _MAX_MESSAGES:
            messages.append(message)
        elif len(messages) == _MAX_MESSAGES:
            messages.append("Too many findings: the rest is counted, but not listed")

    def corruption(self, message: str) -> None:
        """Something is wrong, and stays wrong."""
        self.result.corruptions += 1
        self.note(f"ERROR{message}")

    def failure(self, message: str) -> None:
        """Something could not be checked."""
        self.result.check_errors += 1
        self.note(message)

    def refer(self, offset: int, length: int, flag: int = 0) -> None:
        """Count a reference to all clusters that the range touches."""
        geometry = self.geometry
        first = offset >> geometry.cluster_bits
        count = ((offset + length - 1) >> geometry.cluster_bits) - first + 1
        if offset + length - self.file_size >= geometry.cluster_size:
            self.corruption(
                ": counting reference for region exceeding the end of the file by one cluster "
                f"or more: offset {offset:#x} size {length:#x}"
            )
            self.outside.add_run(first, count)
            self.flags_suspect = True
        elif count == 1:
            self.recount.add(first, flag)
        else:
            self.recount.add_run(first, count, flag)

    def may_write_table(self, offset: int) -> bool:
        """Whether an L2 table at ``offset`` can be repaired in place, harming no other table."""
        geometry = self.geometry
        return (
            not offset & geometry.cluster_mask
            and offset + geometry.cluster_size <= self.file_size
            and offset >> geometry.cluster_bits not in self.metadata
        )

    async def write(self, offset: int, data: bytes) -> None:
        """Store a repair."""
        self.changed = True
        await self.storage.write(offset, data)
        self.file_size = max(self.file_size, offset + len(data))

    async def set_incompatible_features(self, bits: int) -> None:
        """Change the header's incompatible features; what was repaired before is stable first."""
        await self._patch_header(_INCOMPATIBLE_AT, bits.to_bytes(8, "big"))
        self.header.incompatible_features = bits

    async def set_refcount_table(self, offset: int, clusters: int) -> None:
        """Point the header at another refcount table; what it needs is stable first."""
        place = offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")
        await self._patch_header(_REFCOUNT_TABLE_AT, place)
        self.header.refcount_table_offset = offset
        self.header.refcount_table_clusters = clusters

    async def _patch_header(self, at: int, field: bytes) -> None:
        await self.storage.flush()
        sector = await self.storage.read(0, SECTOR)
        sector[at : at + len(field)] = field
        await self.write(0, bytes(sector))
        await self.storage.flush()


class StoredRefcounts:
    """The refcount table, and the blocks that are being looked at."""

    def __init__(self, image: CheckedImage) -> None:
        self.image = image
        self.table: array[int] = array("Q")
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._max_blocks = max(2, _CACHED_BLOCKS_SIZE // image.geometry.cluster_size)

    async def load(self) -> None:
        """Read the table, and forget blocks."""
        header = self.image.header
        size = header.refcount_table_clusters << header.cluster_bits
        self.table = load_table(await self.image.storage.read(header.refcount_table_offset, size))
        self._blocks.clear()

    async def block(self, index: int) -> bytes | None:
        """The block's bytes, None if there is none. CorruptionError if the entry leads nowhere."""
        entry = self.table[index] & ~REFCOUNT_TABLE_RESERVED if index < len(self.table) else 0
        if entry == 0:
            return None
        raw = self._blocks.get(index)
        if raw is None:
            geometry = self.image.geometry
            if entry & geometry.cluster_mask or entry >= MAX_FILE_OFFSET:
                raise CorruptionError(f"refcount table entry {index}: {entry:#x} leads nowhere")
            if entry >= self.image.file_size:
                return None
            raw = bytes(await self.image.storage.read(entry, geometry.cluster_size))
            self._blocks[index] = raw
            if len(self._blocks) > self._max_blocks:
                self._blocks.popitem(last=False)
        return raw

    async def part(self, cluster: int, count: int) -> bytes | None:
        """The packed refcounts of clusters that lie within one block."""
        geometry = self.image.geometry
        index, start = divmod(cluster, geometry.refcount_block_entries)
        raw = await self.block(index)
        if raw is None:
            return None
        bits = geometry.refcount_bits
        return raw[start * bits // 8 : (start + count) * bits // 8]

    async def get(self, cluster: int) -> int:
        """One cluster's refcount."""
        geometry = self.image.geometry
        per_byte = max(1, 8 // geometry.refcount_bits)
        start = cluster - cluster % per_byte
        raw = await self.part(start, per_byte)
        if raw is None:
            return 0
        return decode_block(raw, geometry.refcount_order)[cluster - start]
