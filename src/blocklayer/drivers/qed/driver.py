"""QED images: clusters in one file, found through tables in two levels.

1. Data are on stable storage before a table names them, tables before the L1 table names them: a
   crash leaves clusters that nobody uses, never a table that is wrong. So the image needs no mark
   while it is written; one that others left is obeyed.
2. Nothing is ever freed, so the place of a cluster never changes.
3. The backing file's name is on stable storage before the header names it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from blocklayer.codec import qed
from blocklayer.codec.qed import UNALLOCATED, ZERO, Header
from blocklayer.drivers.blocks import BlockFormatDriver, FileOptions, new_run
from blocklayer.drivers.tables import Space
from blocklayer.drivers.two_level import TwoLevelTable
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.driver import BackingReference, DriverInfo
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.graph.options import Reference, Size
from blocklayer.units import SECTOR, align_up, div_up


class QedOptions(FileOptions):
    """Options of an open image."""

    backing: Reference | UnsetType | None = UNSET


class QedCreateOptions(BaseCreateOptions):
    """``-o`` of ``qemu-img create -f qed``."""

    backing_file: Annotated[str | None, Meta(description="File name of a base image")] = None
    backing_fmt: Annotated[str | None, Meta(description="Image format of the base image")] = None
    cluster_size: Annotated[Size, Meta(description="Cluster size (in bytes)")] = (
        qed.DEFAULT_CLUSTER_SIZE
    )
    table_size: Annotated[Size | None, Meta(description="L1/L2 table size (in clusters)")] = None

    def validate(self) -> None:
        """Raise UsageError if no such image can be made."""
        problem = qed.check_layout(self.size, self.cluster_size, self.tables)
        if problem is not None:
            raise UsageError(problem)
        if len(_encode_name(self.backing_file or "")) > qed.MAX_NAME_SIZE:
            raise UsageError(f"Backing file name is longer than {qed.MAX_NAME_SIZE} bytes")

    @property
    def tables(self) -> int:
        """Clusters of a table."""
        return qed.DEFAULT_TABLE_SIZE if self.table_size is None else self.table_size


def _encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


class QedDriver(BlockFormatDriver):
    """One QED image."""

    NAME: ClassVar[str] = "qed"
    Options = QedOptions
    CreateOptions = QedCreateOptions
    supports_backing = True

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """The magic stands at the start."""
        return 100 if head.startswith(qed.MAGIC) else 0

    async def open(self) -> None:
        """Read and judge the header; tables are read when they are needed."""
        self._storage = await self.open_file()
        size = self._storage.size
        data = await io.read(self._storage, 0, min(Header.SIZE, size))
        header = self.header = qed.decode_header(data, size)
        self._backing: BackingReference | None = None
        if header.has_backing:
            place, length = header.backing_filename_offset, header.backing_filename_size
            if place + length > size:
                raise FormatError(f"The QED backing file name at {place:#x} is past the end")
            name = await io.read(self._storage, place, length)
            raw = header.features & qed.FEATURE_BACKING_RAW
            self._backing = BackingReference(
                name.decode("utf-8", "surrogateescape"), "raw" if raw else None
            )
        self.allocation_unit = self.zero_alignment = header.cluster_size
        self._space = Space(self._storage, align_up(size, header.cluster_size))
        self.tables = TwoLevelTable(
            self._storage,
            self._space,
            "little",
            l1_offset=header.l1_table_offset,
            l1_entries=header.table_entries,
            l2_entries=header.table_entries,
            alignment=header.cluster_size,
            check_table=self._check_table,
        )
        if not self.node.flags.read_only and not self.node.flags.repair:
            await self._become_writer()

    async def _become_writer(self) -> None:
        if self.header.features & qed.FEATURE_NEED_CHECK:
            result = await self.check(frozenset(("errors",)))
            if result.corruptions > result.corruptions_fixed or result.check_errors:
                raise FormatError(
                    f"'{self._storage.filename}' was not closed properly and is damaged: open it "
                    "read-only and save its data, or run 'check -r all'"
                )
        if self.header.autoclear_features:
            await self._write_header(replace(self.header, autoclear_features=0))

    async def _write_header(self, header: Header) -> None:
        try:
            await io.write(self._storage, 0, header.pack())
        except BaseException:
            self.node.poison("its header may have changed or not: open it again")
            raise
        self.header = header

    async def close(self) -> None:
        """Write back the tables."""
        await self.tables.write_back()

    async def flush(self) -> None:
        """Tables, then everything to stable storage."""
        await self.tables.write_back()
        await io.flush(self._storage)

    @property
    def size(self) -> int:
        """The disk's size."""
        return self.header.image_size

    @property
    def backing_reference(self) -> BackingReference | None:
        """The backing file that the header names; its format only if that is raw."""
        return self._backing

    def info(self) -> DriverInfo:
        """Clusters."""
        return DriverInfo(cluster_size=self.header.cluster_size)

    def table_problem(self, place: int) -> str | None:
        """Why no table can be at ``place``; None if one can."""
        if place % self.header.cluster_size or place < self.header.data_offset:
            return "is no place for a table"
        if place + self.header.table_bytes > align_up(self._storage.size, self.header.cluster_size):
            return "ends past the end of the file"
        return None

    def cluster_problem(self, place: int) -> str | None:
        """Why no data can be at ``place``; None if they can."""
        if place % self.header.cluster_size or place < self.header.data_offset:
            return "is no place for a cluster"
        return "is past the end of the file" if place >= self._storage.size else None

    def _check_table(self, index: int, place: int) -> None:
        problem = self.table_problem(place)
        if problem is not None:
            raise CorruptionError(
                f"L2 table {index} of '{self._storage.filename}' at {place:#x} {problem}"
            )

    def _check_cluster(self, cluster: int, place: int) -> int:
        problem = self.cluster_problem(place)
        if problem is not None:
            raise CorruptionError(
                f"Cluster {cluster} of '{self._storage.filename}' at {place:#x} {problem}"
            )
        return place

    async def map(self, offset: int, length: int) -> Extent:
        """Clusters that follow one another in the file, that read as zeros, or that are absent."""
        unit = self.header.cluster_size
        cluster, within = divmod(offset, unit)
        limit = div_up(offset + length, unit)
        part, first = await self.tables.page(cluster)
        if part is None:
            end = await self.tables.absent_end(cluster, limit)
            return Extent(offset, min(length, end * unit - offset), Kind.UNALLOCATED)
        entries, start = part.entries, cluster - first
        entry, stop = entries[start], start + 1
        last = min(len(entries), limit - first)
        step = 0 if entry in (UNALLOCATED, ZERO) else unit
        while stop < last and entries[stop] == entry + (stop - start) * step:
            stop += 1
        length = min(length, (first + stop) * unit - offset)
        if not step:
            return Extent(offset, length, Kind.ZERO if entry == ZERO else Kind.UNALLOCATED)
        # Every cluster of the run is judged by the last one, which is the largest.
        self._check_cluster(first + stop - 1, entries[stop - 1])
        place = self._check_cluster(cluster, entry) + within
        return Extent(offset, length, Kind.DATA, place, self.node.children["file"], writable=True)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """New clusters at the end of the file, as many as one part of a table names."""
        if self.tables.full:
            await self.tables.write_back()
        unit = self.header.cluster_size
        cluster = offset // unit
        end = min(div_up(offset + length, unit), self.tables.page_end(cluster))
        size = (end - cluster) * unit
        place, zeros_from = await self._space.take(size, unit)
        child, fresh = self.node.children["file"], place >= zeros_from
        bare = fresh and self.node.backing is None
        return new_run(offset, length, cluster * unit, size, child, place, fresh=fresh, bare=bare)

    async def commit(self, allocation: Allocation) -> None:
        """Enter the clusters into their table."""
        assert isinstance(allocation.token, tuple)
        place, size = allocation.token
        unit = self.header.cluster_size
        await self.tables.set(allocation.offset // unit, range(place, place + size, unit))
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The clusters stay free."""
        assert isinstance(allocation.token, tuple)
        self._space.give_back(*allocation.token)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeros in place where data are; elsewhere entries that say so."""
        unit, end = self.header.cluster_size, offset + length
        if self.tables.full:
            await self.tables.write_back()
        while offset < end:
            extent = await self.map(offset, end - offset)
            step = min(extent.length, end - offset)
            if extent.kind is Kind.UNALLOCATED:
                cluster = offset // unit
                last = min(div_up(offset + step, unit), self.tables.page_end(cluster))
                step = min(step, last * unit - offset)
                await self.tables.set(cluster, [ZERO] * (last - cluster))
                self.node.mapping_changed()
            else:
                await super().zero(offset, step, unmap=unmap)
            offset += step

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Grow: tables for any size are there already."""
        header = self.header
        if preallocation != "off":
            raise UnsupportedError(f"Unsupported preallocation mode '{preallocation}'")
        if size < self.size:
            raise UnsupportedError("Shrinking images is currently not supported")
        if size % SECTOR or size > qed.max_size(header.cluster_size, header.table_size):
            raise UsageError("Invalid image size specified")
        if size == self.size:
            return
        await self._hide_below(size)
        await self.flush()
        await self._write_header(replace(header, image_size=size))
        self.node.mapping_changed()

    async def _hide_below(self, size: int) -> None:
        """Let what the disk grows by read as zeros, also over a longer backing file."""
        unit, start = self.header.cluster_size, self.size
        edge = align_up(start, unit)
        shown = 0 if self.node.backing is None else min(self.node.backing.size, size)
        if start < edge:
            extent = await self.map(start, edge - start)
            if extent.kind is Kind.DATA and extent.host_offset is not None:
                await io.write_zeroes(self._storage, extent.host_offset, edge - start)
            elif extent.kind is Kind.UNALLOCATED and start < shown:
                # The cluster gets what the disk shows of it, with zeros behind its end.
                head = edge - unit
                content = await io.read_around(self.node, head, unit)
                allocation = await self.allocate(head, unit)
                try:
                    await io.write_stored(self._storage, allocation.host_offset, [content])
                    await self.commit(allocation)
                except BaseException:
                    await self.abort(allocation)
                    raise
        if edge < shown:
            await self.zero(edge, align_up(shown, unit) - edge, unmap=False)

    async def change_backing(self, reference: BackingReference | None) -> None:
        """Write the name beside the old one, then the header."""
        self.node.check_writable()
        features = self.header.features & ~(qed.FEATURE_BACKING_FILE | qed.FEATURE_BACKING_RAW)
        header = replace(
            self.header, features=features, backing_filename_offset=0, backing_filename_size=0
        )
        if reference is not None:
            name = _encode_name(reference.filename)
            if not 0 < len(name) <= qed.MAX_NAME_SIZE:
                raise UsageError(f"Backing file names have 1 to {qed.MAX_NAME_SIZE} bytes")
            _set_backing(header, reference, qed.name_place(self.header, len(name)), len(name))
            await io.write(self._storage, header.backing_filename_offset, name)
            await io.flush(self._storage)
        await self._write_header(header)
        self._backing = reference

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Follow all tables; mend what can be."""
        from blocklayer.drivers.qed.check import check

        result = await check(self, repair)
        mended = "errors" in repair and result.corruptions == result.corruptions_fixed
        if mended and self.header.features & qed.FEATURE_NEED_CHECK:
            await self.flush()
            features = self.header.features & ~qed.FEATURE_NEED_CHECK
            await self._write_header(replace(self.header, features=features))
        return result

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """Header and L1 table, which is empty."""
        assert isinstance(options, QedCreateOptions)
        size = align_up(options.size, SECTOR)
        header = qed.new_header(size, options.cluster_size, options.tables)
        name = b""
        if options.backing_file:
            reference = BackingReference(options.backing_file, options.backing_fmt)
            name = _encode_name(options.backing_file)
            _set_backing(header, reference, Header.SIZE, len(name))
        end = header.l1_table_offset + header.table_bytes
        await io.write_zeroes(target, 0, min(target.size, end))
        if target.size < end:
            await io.truncate(target, end)
        # Last, so that an image half made is none.
        await io.write(target, 0, header.pack() + name)


def _set_backing(header: Header, reference: BackingReference, place: int, length: int) -> None:
    header.features |= qed.FEATURE_BACKING_FILE
    if reference.format == "raw":
        header.features |= qed.FEATURE_BACKING_RAW
    header.backing_filename_offset, header.backing_filename_size = place, length
