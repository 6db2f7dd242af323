"""The qcow2 driver: what ``graph`` asks of the format, handed to the parts that know.

1. Opening reads; it writes only what the format demands of a writer: autoclear bits that are not
   understood are cleared, and refcounts that the dirty bit calls untrusted are rebuilt.
2. Metadata that contradicts itself stops the request with a CorruptionError. In an image open for
   writing, the corrupt bit is set and writes are refused from then on; reads go on (R4).
3. What cannot be had with a data file (snapshots, compressed clusters) is refused before anything
   happens.
4. Closing writes everything back, in the order of a flush, then what lazy refcounts left out, then
   the persistent bitmaps.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from msgspec import UNSET

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import ImageHeader
from blocklayer.drivers.qcow2 import data_file, flushing
from blocklayer.drivers.qcow2.bitmaps import BitmapKeeper, StoredBitmaps
from blocklayer.drivers.qcow2.compression import Compressor
from blocklayer.drivers.qcow2.encryption import Encryption, EncryptOptions, refuse_compression
from blocklayer.drivers.qcow2.image import Image
from blocklayer.drivers.qcow2.info import Qcow2Info, snapshot_info, specific_info
from blocklayer.drivers.qcow2.making import Qcow2Maker
from blocklayer.drivers.qcow2.mapping import Mapping
from blocklayer.drivers.qcow2.reading import load_snapshots, read_header
from blocklayer.drivers.qcow2.resizing import Resizer
from blocklayer.drivers.qcow2.settings import Qcow2Options, Settings
from blocklayer.drivers.qcow2.storage import Storage
from blocklayer.drivers.qcow2.writing import Writer
from blocklayer.drivers.qcow2.zeroing import Zeroer
from blocklayer.errors import BlockError, CorruptionError, UnsupportedError
from blocklayer.graph import options as graph_options
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.driver import BackingReference, Buffer, DriverInfo, SnapshotInfo
from blocklayer.graph.extent import Allocation, Extent
from blocklayer.graph.waiting import in_place
from blocklayer.units import align_up

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.snapshots import Snapshots
    from blocklayer.graph.checking import Rehearsal

T = TypeVar("T")

_KNOWN_AUTOCLEAR = qcow2_header.AUTOCLEAR_BITMAPS | qcow2_header.AUTOCLEAR_DATA_FILE_RAW


class Qcow2Driver(Qcow2Maker, BitmapKeeper):
    """One open qcow2 image."""

    Options = Qcow2Options
    supports_backing: ClassVar[bool] = True
    supports_snapshots: ClassVar[bool] = True
    relocates: ClassVar[bool] = True

    image: Image
    mapping: Mapping
    writer: Writer
    zeroer: Zeroer
    compressor: Compressor
    resizer: Resizer

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Certain, given the magic; versions to come are refused by ``open``, not taken for raw."""
        version = int.from_bytes(head[4:8], "big")
        return 100 if head[:4] == b"QFI\xfb" and version >= 2 else 0

    async def open(self) -> None:
        """Read the header, the L1 table and the snapshot table."""
        options = self.node.options
        assert isinstance(options, Qcow2Options)
        await self.node.open_child("file", options.file)
        storage = Storage(self.node.children["file"])
        header = await read_header(storage)
        await data_file.open_child(self.node, header)
        encrypt = EncryptOptions() if options.encrypt is UNSET else options.encrypt
        data = data_file.storage_of(self.node, storage, header)
        self.encryption = await Encryption.open(self.node, storage, data, header, encrypt)
        self._assemble(storage, header)
        await self.image.load_l1()
        await load_snapshots(self.image)
        if not self.node.flags.repair:
            await self.stored_bitmaps.read_directory()
            self.stored_bitmaps.attach()
        if not self.node.flags.read_only:
            await self._become_writer()
        self._clean_timer: asyncio.TimerHandle | None = None
        self._schedule_cleaning()

    def _assemble(self, storage: Storage, header: ImageHeader) -> None:
        """Build the parts around the image's state."""
        node, options = self.node, self.node.options
        assert isinstance(options, Qcow2Options)
        settings = Settings.make(options, node.flags, header, Geometry.of(header))
        data = data_file.storage_of(node, storage, header)
        self.image = image = Image(node, storage, data, header, settings)
        image.encryption = self.encryption
        self.stored_bitmaps = StoredBitmaps(image)
        if header.extended_l2:
            from blocklayer.drivers.qcow2.subclusters import (
                SubclusterMapping,
                SubclusterWriter,
                SubclusterZeroer,
            )

            self.mapping = SubclusterMapping(image)
            self.writer = SubclusterWriter(image, self.mapping)
            self.zeroer = SubclusterZeroer(image, self.mapping, self.writer)
        else:
            self.mapping = Mapping(image)
            self.writer = Writer(image, self.mapping)
            self.zeroer = Zeroer(image, self.mapping, self.writer)
        self.compressor = Compressor(image, self.mapping, self.writer)
        self.resizer = Resizer(image, self.mapping, self.writer, self.zeroer)
        self.allocation_unit = header.cluster_size
        self.holds_zeros = header.version >= 3
        self.zero_alignment = self.discard_alignment = image.geometry.subcluster_size

    async def _become_writer(self) -> None:
        """What the format demands before an image may be written."""
        image, header = self.image, self.image.header
        if self.node.flags.repair:
            return
        if header.incompatible_features & qcow2_header.INCOMPATIBLE_CORRUPT:
            raise UnsupportedError(
                f"Could not open '{image.storage.node.filename}': qcow2: Image is corrupt; "
                "cannot be opened read/write"
            )
        if header.has_data_file:
            await image.data.reserve(header.size)
        if header.autoclear_features & ~_KNOWN_AUTOCLEAR:
            await image.update_header(
                autoclear_features=header.autoclear_features & _KNOWN_AUTOCLEAR
            )
        if self.dirty:
            from blocklayer.drivers.qcow2.check import rebuild_refcounts

            await rebuild_refcounts(self)
        await self.stored_bitmaps.become_writer()

    async def reload(self) -> None:
        """Read everything anew: a repair has rewritten the image below its caches."""
        storage = self.image.storage
        # It may take 32 MiB, and cycles keep the old state for a while.
        self.image.l1 = array("Q")
        self._assemble(storage, await read_header(storage))
        await self.image.load_l1()
        await load_snapshots(self.image)
        if not self.node.flags.repair:
            await self.stored_bitmaps.read_directory()
        self.node.mapping_changed()

    async def close(self) -> None:
        """Write back everything; after an error that stopped writes, nothing."""
        if self._clean_timer is not None:
            self._clean_timer.cancel()
            self._clean_timer = None
        if self.image.writable:
            await self._store_all()
        if self.encryption is not None:
            self.encryption.close()

    async def _store_all(self) -> None:
        async with self.image.lock:
            await flushing.write_all(self.image)
            if not self.node.flags.repair and not self.image.stays_dirty:
                await self.image.set_dirty(False)
            await self.stored_bitmaps.store()

    async def retire(self) -> bool:
        """What memory has stays good for reading."""
        if self.image.writable:
            await self._store_all()
        self.stored_bitmaps.become_read_only()
        return True

    def _schedule_cleaning(self) -> None:
        interval_s = self.image.settings.clean_interval_s
        # In place no loop runs between requests: the timer would never fire, and never go away.
        if interval_s and not in_place():
            loop = asyncio.get_running_loop()
            self._clean_timer = loop.call_later(interval_s, self._clean)

    def _clean(self) -> None:
        self.image.slices.drop_unused()
        if not self.image.lock.locked():
            self.image.refcounts.drop_unused()
        self._schedule_cleaning()

    async def _signal(self, error: CorruptionError) -> CorruptionError:
        """Mark the image corrupt and stop writes, if it is open for writing; ``error`` to raise."""
        image, name = self.image, self.node.filename
        if not image.writable:
            return CorruptionError(f"Image '{name}' is corrupt: {error}")
        self.node.poison("the image is marked corrupt: see 'check'")
        self.node.mapping_changed()
        message = f"Image '{name}' is corrupt, no more writes are taken: {error}"
        if image.header.version < 3:
            return CorruptionError(message)
        bits = image.header.incompatible_features | qcow2_header.INCOMPATIBLE_CORRUPT
        async with image.lock:
            try:
                await image.update_header(incompatible_features=bits)
            except BlockError as failure:
                return CorruptionError(f"{message} (and it could not be marked: {failure})")
        return CorruptionError(message)

    @property
    def size(self) -> int:
        """Bytes the guest sees."""
        return self.image.header.size

    @property
    def dirty(self) -> bool:
        """Whether the file's refcounts are marked as untrusted."""
        return bool(self.image.header.incompatible_features & qcow2_header.INCOMPATIBLE_DIRTY)

    @property
    def backing_reference(self) -> BackingReference | None:
        """The backing file that the header names."""
        header = self.image.header
        if not header.backing_file:
            return None
        return BackingReference(header.backing_file, header.backing_format or None)

    def info(self) -> DriverInfo:
        """Clusters, the dirty bit, and the snapshots inside."""
        header = self.image.header
        return DriverInfo(
            cluster_size=self.image.geometry.cluster_size,
            vm_state_offset=self._vm_state_offset,
            dirty=self.dirty,
            encrypted=header.crypt_method != qcow2_header.CRYPT_NONE,
            snapshots=[snapshot_info(snapshot) for snapshot in self.image.snapshots],
        )

    def specific_info(self) -> Qcow2Info:
        """As ``qemu-img info`` shows it."""
        return specific_info(self.image, self.stored_bitmaps.info())

    async def storage_has_holes(self) -> bool:
        """Preallocated clusters, perhaps: their data is in the file's holes."""
        return await self.mapping.storage_has_holes()

    async def map(self, offset: int, length: int) -> Extent:
        """Where the guest's bytes live."""
        try:
            extent = await self.mapping.map(offset, length)
            return extent if self.encryption is None else self.encryption.shown(extent)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Unpack compressed clusters, decrypt others."""
        if self.encryption is None:
            await self.compressor.read(offset, view)
            return
        await self.encryption.read(offset, view, self.mapping, self.compressor)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Encrypt clusters that are written in place."""
        assert self.encryption is not None
        await self.encryption.write(offset, data, self.mapping)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Set clusters aside for a write."""
        try:
            return await self.writer.allocate(offset, length)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def commit(self, allocation: Allocation) -> None:
        """Point the guest's clusters at what was set aside."""
        try:
            await self.writer.commit(allocation)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def abort(self, allocation: Allocation) -> None:
        """Give back what was set aside."""
        await self.writer.abort(allocation)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make clusters read as zeros."""
        try:
            await self.zeroer.zero(offset, length, unmap=unmap)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def discard(self, offset: int, length: int) -> None:
        """Give the space of clusters back."""
        try:
            await self.zeroer.discard(offset, length)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Store clusters compressed."""
        data_file.refuse(self.image, "compressed clusters")
        refuse_compression(self.encryption)
        try:
            await self.compressor.write(offset, data)
        except CorruptionError as error:
            raise await self._signal(error) from None

    def pack(self, data: Buffer, level: int | None = None) -> bytes | None:
        """Compress one cluster."""
        data_file.refuse(self.image, "compressed clusters")
        refuse_compression(self.encryption)
        return self.compressor.pack(data, level)

    async def write_packed(self, offset: int, parts: Sequence[bytes]) -> None:
        """Store compressed clusters."""
        data_file.refuse(self.image, "compressed clusters")
        try:
            await self.compressor.write_packed(offset, parts)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def flush(self) -> None:
        """Write back metadata and make everything durable, in order."""
        await self._write_back(flushing.flush)

    async def flush_all(self) -> None:
        """Like ``flush``, and the file's refcounts are right even if they are lazy."""
        await self._write_back(flushing.settle)

    async def _write_back(self, write: Callable[[Image], Awaitable[None]]) -> None:
        if self.node.flags.read_only:
            return
        try:
            async with self.image.lock:
                await write(self.image)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the disk's size."""
        try:
            await self.resizer.truncate(size, preallocation=preallocation, shrink=shrink)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def change_backing(self, reference: BackingReference | None) -> None:
        """Rewrite the backing file's name and format in the header."""
        if reference is not None:
            data_file.refuse_backing(self.image)
        async with self.image.lock:
            self.node.check_writable()
            await self.image.update_header(
                backing_file=reference.filename if reference else None,
                backing_format=reference.format if reference else None,
            )

    @classmethod
    def amend_options(cls) -> type[graph_options.AmendOptions]:
        """Loaded when somebody asks."""
        from blocklayer.drivers.qcow2.amend import Qcow2AmendOptions

        return Qcow2AmendOptions

    async def amend(
        self,
        options: graph_options.AmendOptions,
        progress: Callable[[int, int], None],
        *,
        force: bool = False,
    ) -> None:
        """Change the image's version, size, refcounts, or key slots."""
        from blocklayer.drivers.qcow2.amend import Qcow2AmendOptions, amend

        assert isinstance(options, Qcow2AmendOptions)
        try:
            await amend(self, options, progress, force=force)
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def make_empty(self) -> None:
        """Give up every cluster and table that the guest's disk has."""
        try:
            await self.zeroer.empty()
        except CorruptionError as error:
            raise await self._signal(error) from None

    async def snapshot_create(self, name: str) -> SnapshotInfo:
        """Keep what the disk holds now."""
        return snapshot_info(await self._on_snapshots(lambda them: them.create(name)))

    async def snapshot_apply(self, identifier: str) -> None:
        """Go back to what the disk held."""
        await self._on_snapshots(lambda them: them.apply(them.find(identifier)))

    async def snapshot_delete(self, identifier: str) -> None:
        """Drop a snapshot."""
        await self._on_snapshots(lambda them: them.delete(them.find(identifier)))

    async def snapshot_load(self, identifier: str) -> None:
        """Show a snapshot in place of the disk."""
        await self._on_snapshots(lambda them: them.load(them.find(identifier)))

    async def _on_snapshots(self, do: Callable[[Snapshots], Awaitable[T]]) -> T:
        from blocklayer.drivers.qcow2.snapshots import Snapshots

        data_file.refuse(self.image, "internal snapshots")
        try:
            async with self.image.lock:
                return await do(Snapshots(self.image, self.mapping, self.writer))
        except CorruptionError as error:
            raise await self._signal(error) from None

    @property
    def _vm_state_offset(self) -> int:
        return align_up(self.size, self.image.geometry.l1_entry_span)

    async def prepare_vm_state(self, length: int) -> int:
        """Let the L1 table reach behind the disk."""
        if length:
            await self.resizer.reach(self._vm_state_offset + length)
        return self._vm_state_offset

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Compare refcounts with references, and mend them."""
        from blocklayer.drivers.qcow2.check import check

        return await check(self, repair)

    async def rehearse(self, repair: frozenset[str]) -> Rehearsal:
        """Do all that ``check`` does, on a shadow of the file."""
        from blocklayer.drivers.qcow2.rehearsal import rehearse

        return await rehearse(self, repair)
