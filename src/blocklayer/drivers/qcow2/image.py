"""The state of one open image that all parts of the driver share.

1. ``lock`` is held by whoever changes metadata, across its I/O. Readers of the mapping do not take
   it: they see either the state before a change or after it, since in-memory entries change
   between two awaits.
2. ``header`` is what the first cluster of the file says. A header update is one write of one
   sector or, where several differ, a sequence of writes that can be cut off anywhere, with barriers
   between. If it fails, the old header is put back; if that fails too, the node is poisoned, for
   nobody knows any more what the file says (R4).
3. ``prepare`` comes before every change of metadata.
"""

from __future__ import annotations

import asyncio
from array import array
from typing import Any, Final

from blocklayer.codec.qcow2.entries import (
    L1_RESERVED,
    OFFSET_MASK,
    decode_l1,
    encode_l1,
    load_table,
    store_table,
)
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import (
    INCOMPATIBLE_DIRTY,
    ImageHeader,
)
from blocklayer.codec.qcow2.rewriting import rewriting
from blocklayer.codec.qcow2.snapshots import Snapshot
from blocklayer.codec.qcow2.validation import full_disk_encryption_area
from blocklayer.drivers.qcow2 import overlap
from blocklayer.drivers.qcow2.encryption import Encryption
from blocklayer.drivers.qcow2.frees import Frees
from blocklayer.drivers.qcow2.overlap import Overlap
from blocklayer.drivers.qcow2.refcounts import Refcounts
from blocklayer.drivers.qcow2.settings import Settings
from blocklayer.drivers.qcow2.slices import SliceCache
from blocklayer.drivers.qcow2.storage import Storage
from blocklayer.errors import BlockError, CorruptionError
from blocklayer.graph.node import Node
from blocklayer.units import SECTOR, align_up

L1_SECTOR_ENTRIES: Final = SECTOR // 8


class Image:
    """Header, L1 table and caches of an open image."""

    def __init__(
        self, node: Node, storage: Storage, data: Storage, header: ImageHeader, settings: Settings
    ) -> None:
        self.node = node
        self.storage = storage
        """Where metadata live."""
        self.data = data
        """Where guest data live: in ``storage`` too, or in a data file, each at its own offset."""
        self.header = header
        self.geometry = Geometry.of(header)
        self.settings = settings
        self.lock = asyncio.Lock()
        self.l1 = array("Q")
        self.l1_dirty: set[int] = set()
        """Sectors of the L1 table that differ from the file."""
        self.snapshots: list[Snapshot] = []
        self.bitmap_directory = (0, 0)
        """Host offset and length of the bitmap directory, if there is one."""
        self.overlap = Overlap(settings.overlap_kinds, self.geometry.cluster_size)
        self.refcounts = Refcounts(self)
        self.slices = SliceCache(self)
        self.frees = Frees(self)
        self.encryption: Encryption | None = None
        self.trim = False
        """So much was given up that the file is to be cut to what is in use, at close."""
        self.stays_dirty = False
        """Copied flags on file may be wrong: the dirty bit is left for the next one to open it."""
        self._l1_bad = L1_RESERVED | (OFFSET_MASK & self.geometry.cluster_mask)

    @property
    def writable(self) -> bool:
        """Whether guest writes are taken."""
        return not self.node.flags.read_only and self.node.poisoned is None

    @property
    def data_file_raw(self) -> bool:
        """Whether the data file is to be, at every moment, the disk as a raw image.

        Cipher text never is one, whatever the header says.
        """
        return self.header.data_file_raw and self.encryption is None

    @property
    def frees_in_place(self) -> bool:
        """Whether a discard gives space back that its guest clusters keep, at once.

        Not that of cipher text: its zeros are garbage to whoever reads them before the entries that
        hide them are on stable storage.
        """
        return self.settings.discard_request and self.encryption is None

    @property
    def data_end(self) -> int:
        """How long a data file is to be: as the disk, though only whole sectors are encrypted."""
        size = self.header.size
        return size if self.encryption is None else align_up(size, SECTOR)

    async def load_l1(self) -> None:
        """Read the active L1 table."""
        size = self.header.l1_size * 8
        self.l1 = load_table(await self.storage.read(self.header.l1_table_offset, size))
        self.l1_dirty.clear()

    def l2_table(self, l1_index: int) -> int:
        """Offset of the L2 table for ``l1_index``, 0 if there is none."""
        if l1_index >= len(self.l1):
            return 0
        entry = self.l1[l1_index]
        if entry & self._l1_bad:
            try:
                return decode_l1(entry, self.geometry)
            except CorruptionError as error:
                raise CorruptionError(f"L1 index {l1_index:#x}: {error}") from None
        return entry & OFFSET_MASK

    def set_l1(self, l1_index: int, l2_table_offset: int) -> None:
        """Point ``l1_index`` at a table that nobody else uses (or, with 0, at none)."""
        self.l1[l1_index] = encode_l1(l2_table_offset, copied=l2_table_offset != 0)
        self.l1_dirty.add(l1_index // L1_SECTOR_ENTRIES)

    async def write_l1(self) -> None:
        """Write the sectors of the L1 table that changed."""
        start = self.header.l1_table_offset
        for sector in sorted(self.l1_dirty):
            first = sector * L1_SECTOR_ENTRIES
            part = self.l1[first : first + L1_SECTOR_ENTRIES]
            offset = start + sector * SECTOR
            self.overlap.check(offset, len(part) * 8, own=overlap.ACTIVE_L1)
            await self.storage.write(offset, store_table(part))
            self.l1_dirty.discard(sector)

    async def prepare(self) -> None:
        """What must be known before metadata changes; call it with the lock held."""
        self.node.check_writable()
        if not self.overlap.complete:
            await self.enter_metadata()

    async def enter_metadata(self) -> None:
        """Tell the overlap checks where all metadata is."""
        header, geometry, guard = self.header, self.geometry, self.overlap
        await self.refcounts.load()
        guard.add(overlap.HEADER, 0, geometry.cluster_size)
        area = full_disk_encryption_area(header)
        if area is not None:
            guard.add(overlap.HEADER, *area)
        guard.add(overlap.ACTIVE_L1, header.l1_table_offset, header.l1_size * 8)
        guard.add(
            overlap.REFCOUNT_TABLE,
            header.refcount_table_offset,
            header.refcount_table_clusters << geometry.cluster_bits,
        )
        for index, entry in enumerate(self.refcounts.table):
            if entry:
                offset = self.refcounts.block_offset(index)
                guard.add(overlap.REFCOUNT_BLOCK, offset, geometry.cluster_size)
        for entry in self.l1:
            if entry & OFFSET_MASK:
                guard.add(overlap.ACTIVE_L2, entry & OFFSET_MASK, geometry.cluster_size)
        guard.add(overlap.BITMAP_DIRECTORY, *self.bitmap_directory)
        if self.snapshots:
            await self._enter_snapshots()
        guard.complete = True

    async def _enter_snapshots(self) -> None:
        guard, cluster_size = self.overlap, self.geometry.cluster_size
        length = sum(len(snapshot.encode()) for snapshot in self.snapshots)
        guard.add(overlap.SNAPSHOT_TABLE, self.header.snapshots_offset, length)
        for snapshot in self.snapshots:
            guard.add(overlap.INACTIVE_L1, snapshot.l1_table_offset, snapshot.l1_size * 8)
            if guard.kinds & overlap.INACTIVE_L2:
                data = await self.storage.read(snapshot.l1_table_offset, snapshot.l1_size * 8)
                for entry in load_table(data):
                    if entry & OFFSET_MASK:
                        guard.add(overlap.INACTIVE_L2, entry & OFFSET_MASK, cluster_size)

    async def barrier(self) -> None:
        """Metadata written before are on stable storage before what is written after."""
        await self.storage.flush()

    async def data_barrier(self) -> None:
        """Guest data and metadata written before are on stable storage."""
        if self.data is not self.storage:
            await self.data.flush()
        await self.storage.flush()

    async def update_header(self, **changes: Any) -> None:
        """Set header fields, in memory and on stable storage; all or none of them."""
        header = self.header
        before = {name: getattr(header, name) for name in changes}
        old = bytes(await self.storage.read(0, header.cluster_size))
        try:
            for name, value in changes.items():
                setattr(header, name, value)
            new = header.encode()
        except BlockError:
            self._restore(before)
            raise
        try:
            for offset, data in rewriting(old, new):
                await self.storage.write(offset, data)
                await self.barrier()
        except BaseException:
            self._restore(before)
            await self._write_back(old)
            raise

    def _restore(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            setattr(self.header, name, value)

    async def _write_back(self, old: bytes) -> None:
        try:
            await self.storage.write(0, old)
            await self.barrier()
        except BlockError as error:
            self.node.poison(f"its header could be neither updated nor put back ({error})")

    async def set_dirty(self, dirty: bool) -> None:
        """Set or clear the header's note that refcounts on file cannot be trusted."""
        bits = self.header.incompatible_features & ~INCOMPATIBLE_DIRTY
        if dirty:
            bits |= INCOMPATIBLE_DIRTY
        if bits != self.header.incompatible_features:
            await self.update_header(incompatible_features=bits)
