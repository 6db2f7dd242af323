"""qcow, version 1: QEMU's first image format.

1. Data are on stable storage before a table names them, tables before the L1 table names them: a
   crash leaves clusters that nobody uses.
2. Nothing is ever freed but by ``make_empty``, which has the L1 table empty on stable storage
   before it cuts the file.
3. A compressed cluster that is written gets a new place as a plain one.
4. Encrypted images are read only: the format is broken, and kept for rescuing what is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec import qcow
from blocklayer.codec.qcow import COMPRESSED, Header
from blocklayer.drivers.blocks import BlockFormatDriver, FileOptions, new_run
from blocklayer.drivers.qcow.clusters import Unpacker
from blocklayer.drivers.qcow.encryption import EncryptOptions, check_unused, unlock
from blocklayer.drivers.qcow2.packing import pack_cluster, packing_level
from blocklayer.drivers.tables import Space
from blocklayer.drivers.two_level import TwoLevelTable
from blocklayer.errors import CorruptionError, FormatError, UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import BackingReference, Buffer, DriverInfo
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.graph.options import Reference
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR, align_up, div_up

if TYPE_CHECKING:
    from blocklayer.drivers.crypto.sealed import Sealed


class QcowOptions(FileOptions):
    """Options of an open image."""

    backing: Reference | UnsetType | None = UNSET
    encrypt: EncryptOptions | UnsetType = UNSET


class QcowCreateOptions(BaseCreateOptions):
    """``-o`` of ``qemu-img create -f qcow``, but for encryption."""

    backing_file: Annotated[str | None, Meta(description="File name of a base image")] = None
    backing_fmt: Annotated[str | None, Meta(description="Format of the backing image")] = None

    def validate(self) -> None:
        """Raise UsageError if no such image can be made."""
        if not self.size:
            raise UsageError("Image size is too small, cannot be zero length")
        name = _encode_name(self.backing_file)
        if len(name) > qcow.MAX_NAME_SIZE:
            raise UsageError(f"Backing file name is longer than {qcow.MAX_NAME_SIZE} bytes")
        try:
            qcow.new_header(self.size, name)
        except FormatError as error:
            raise UsageError(str(error)) from None


def _encode_name(name: str | None) -> bytes:
    return (name or "").encode("utf-8", "surrogateescape")


class QcowDriver(BlockFormatDriver):
    """One qcow image of version 1."""

    NAME: ClassVar[str] = "qcow"
    Options = QcowOptions
    CreateOptions = QcowCreateOptions
    supports_backing = True

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Magic and version: later versions are another format."""
        start = qcow.MAGIC + qcow.VERSION.to_bytes(4, "big")
        return 100 if head.startswith(start) else 0

    async def open(self) -> None:
        """Read and judge the header; tables are read when they are needed."""
        self._storage = await self.open_file()
        data = await io.read(self._storage, 0, min(Header.SIZE, self._storage.size))
        header = self.header = qcow.decode_header(data, self._storage.size)
        self._sealed: Sealed | None = None
        options = self.node.options
        assert isinstance(options, QcowOptions)
        if self._encrypted:
            self._sealed = unlock(self.node, self._storage, options.encrypt)
        else:
            check_unused(options.encrypt)
        self._backing: BackingReference | None = None
        if header.backing_file_offset and header.backing_file_size:
            name = await io.read(
                self._storage, header.backing_file_offset, header.backing_file_size
            )
            self._backing = BackingReference(name.decode("utf-8", "surrogateescape"))
        self.allocation_unit = header.cluster_size
        self._unpacker = Unpacker(self._storage, header)
        self._start(self._storage.size)

    def _start(self, end: int) -> None:
        """Nothing of the tables is known, and the file is in use up to ``end``."""
        header = self.header
        self._space = Space(self._storage, align_up(end, header.cluster_size))
        self._tables = TwoLevelTable(
            self._storage,
            self._space,
            "big",
            l1_offset=header.l1_table_offset,
            l1_entries=header.l1_entries,
            l2_entries=header.l2_entries,
            alignment=header.cluster_size,
            check_table=self._check_table,
        )

    async def close(self) -> None:
        """Write back the tables."""
        await self._tables.write_back()

    async def flush(self) -> None:
        """Tables, then everything to stable storage."""
        await self._tables.write_back()
        await io.flush(self._storage)

    @property
    def size(self) -> int:
        """The disk's size."""
        return self.header.size

    @property
    def backing_reference(self) -> BackingReference | None:
        """The backing file that the header names."""
        return self._backing

    def info(self) -> DriverInfo:
        """Clusters, and whether they are encrypted."""
        return DriverInfo(cluster_size=self.header.cluster_size, encrypted=self._encrypted)

    @property
    def _encrypted(self) -> bool:
        return self.header.crypt_method != qcow.CRYPT_NONE

    def _check_table(self, index: int, place: int) -> None:
        if place < self.header.l1_end or place + 8 * self.header.l2_entries > align_up(
            self._storage.size, self.header.cluster_size
        ):
            raise CorruptionError(
                f"L2 table {index} of '{self._storage.filename}' at {place:#x} is out of place"
            )

    def _check_cluster(self, cluster: int, place: int) -> int:
        if place % SECTOR or place < self.header.l1_end or place >= self._storage.size:
            raise CorruptionError(
                f"Cluster {cluster} of '{self._storage.filename}' at {place:#x} is out of place"
            )
        return place

    async def map(self, offset: int, length: int) -> Extent:
        """Clusters that follow one another in the file, that are compressed, or that are absent."""
        unit, child = self.header.cluster_size, self.node.children["file"]
        cluster, within = divmod(offset, unit)
        limit = div_up(offset + length, unit)
        part, first = await self._tables.page(cluster)
        if part is None:
            end = await self._tables.absent_end(cluster, limit)
            return Extent(offset, min(length, end * unit - offset), Kind.UNALLOCATED)
        entries, start = part.entries, cluster - first
        entry, stop = entries[start], start + 1
        last = min(len(entries), limit - first)
        if entry & COMPRESSED:
            while stop < last and entries[stop] & COMPRESSED:
                stop += 1
        else:
            step = unit if entry else 0
            while stop < last and entries[stop] == entry + (stop - start) * step:
                stop += 1
        length = min(length, (first + stop) * unit - offset)
        if entry & COMPRESSED:
            return Extent(offset, length, Kind.OPAQUE, child=child, compressed=True)
        if not entry:
            return Extent(offset, length, Kind.UNALLOCATED)
        self._check_cluster(first + stop - 1, entries[stop - 1])
        place = self._check_cluster(cluster, entry) + within
        if self._encrypted:
            return Extent(offset, length, Kind.OPAQUE, place, child)
        return Extent(offset, length, Kind.DATA, place, child, writable=True)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Unpack compressed clusters, and decrypt encrypted ones."""
        unit, done = self.header.cluster_size, 0
        while done < len(view):
            cluster, within = divmod(offset + done, unit)
            piece = view[done : done + unit - within]
            part, first = await self._tables.page(cluster)
            entry = 0 if part is None else part.entries[cluster - first]
            if entry & COMPRESSED:
                data = await self._unpacker.read(cluster, entry)
                piece[:] = data[within : within + len(piece)]
            elif entry and self._encrypted:
                if self._sealed is None:
                    raise UsageError(f"'{self._storage.filename}' was opened without its key")
                place = self._check_cluster(cluster, entry) + within
                await self._sealed.read(place, offset + done, piece)
            else:
                # Rewritten since the request looked: let it have what is there now.
                await io.read_into(self.node, offset + done, piece)
            done += len(piece)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """New clusters at the end of the file, as many as one part of a table names."""
        if self._tables.full:
            await self._tables.write_back()
        unit = self.header.cluster_size
        cluster = offset // unit
        end = min(div_up(offset + length, unit), self._tables.page_end(cluster))
        size = (end - cluster) * unit
        part, first = await self._tables.page(cluster)
        absent = part is None or not any(part.entries[cluster - first : end - first])
        place, zeros_from = await self._space.take(size, unit)
        child, fresh = self.node.children["file"], place >= zeros_from
        bare = fresh and absent and self.node.backing is None
        return new_run(offset, length, cluster * unit, size, child, place, fresh=fresh, bare=bare)

    async def commit(self, allocation: Allocation) -> None:
        """Enter the clusters into their table."""
        assert isinstance(allocation.token, tuple)
        place, size = allocation.token
        unit = self.header.cluster_size
        await self._tables.set(allocation.offset // unit, range(place, place + size, unit))
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The clusters stay free."""
        assert isinstance(allocation.token, tuple)
        self._space.give_back(*allocation.token)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeros in place where data are; what is absent, without a backing file, is zeros."""
        end = offset + length
        while offset < end:
            extent = await self.map(offset, end - offset)
            step = min(extent.length, end - offset)
            if extent.kind is not Kind.UNALLOCATED or self.node.backing is not None:
                await super().zero(offset, step, unmap=unmap)
            offset += step

    def pack(self, data: Buffer, level: int | None = None) -> bytes | None:
        """One cluster compressed."""
        return pack_cluster(
            data, self.header.cluster_size, zstd=False, level=packing_level("zlib", level)
        )

    async def write_packed(self, offset: int, parts: Sequence[bytes]) -> None:
        """Append compressed clusters, then enter them into their tables."""
        unit = self.header.cluster_size
        for cluster, packed in enumerate(parts, offset // unit):
            if self._tables.full:
                await self._tables.write_back()
            length = align_up(len(packed), SECTOR)
            place, _ = await self._space.take(length, SECTOR)
            try:
                await io.write(self._storage, place, packed.ljust(length, b"\0"))
                entry = qcow.encode_compressed(place, len(packed), self.header.cluster_bits)
                await self._tables.set(cluster, [entry])
            except BaseException:
                self._space.give_back(place, length)
                raise
            self.node.mapping_changed()

    @classmethod
    def check_compression_level(cls, options: BaseCreateOptions, level: int) -> None:
        """Those of deflate."""
        packing_level("zlib", level)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Whole clusters, each compressed if that makes it smaller."""
        unit, view = self.header.cluster_size, memoryview(data).cast("B")
        for at in range(0, len(view), unit):
            piece = view[at : at + unit]
            packed = await offload(self.pack, piece)
            if packed is None:
                await self._write_plain(offset + at, bytes(piece).ljust(unit, b"\0"))
            else:
                await self.write_packed(offset + at, (packed,))

    async def _write_plain(self, offset: int, data: bytes) -> None:
        """Store one whole cluster."""
        extent = await self.map(offset, 1)
        if extent.kind is Kind.DATA and extent.host_offset is not None:
            await io.write(self._storage, extent.host_offset, data)
            return
        allocation = await self.allocate(offset, len(data))
        try:
            assert isinstance(allocation.token, tuple)
            await io.write(self._storage, allocation.token[0], data)
            await self.commit(allocation)
        except BaseException:
            await self.abort(allocation)
            raise

    async def make_empty(self) -> None:
        """Drop everything but header and L1 table."""
        header, storage = self.header, self._storage
        try:
            length = header.l1_end - header.l1_table_offset
            await io.write_zeroes(storage, header.l1_table_offset, length)
            await io.flush(storage)
            if storage.size > header.l1_end:
                await io.truncate(storage, header.l1_end, shrink=True)
        except BaseException:
            self.node.poison("it may have been emptied or not: open it again")
            raise
        finally:
            # Tables that are in memory only are dropped with the rest.
            self._start(storage.size)
            self._unpacker.forget()
            self.node.mapping_changed()

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """Header, backing file name, and an empty L1 table."""
        assert isinstance(options, QcowCreateOptions)
        name = _encode_name(options.backing_file)
        header = qcow.new_header(options.size, name)
        # The table is as long as whole sectors, as QEMU makes it.
        end = header.l1_table_offset + align_up(8 * header.l1_entries, SECTOR)
        await io.write_zeroes(target, 0, min(target.size, end))
        if target.size < end:
            await io.truncate(target, end)
        await io.write(target, 0, header.pack() + name)
