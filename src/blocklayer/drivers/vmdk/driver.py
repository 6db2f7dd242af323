"""VMDK: a descriptor that makes extents a disk; or one sparse extent with its descriptor inside.

1. Extent files are named by the image: each passes the policy before it is opened (R8), and is
   always a file beside or below the descriptor's own kind of storage, never a URL.
2. A parent shows through only if its content identity (CID) is the one this image was made on. The
   identity changes with the first write after opening: an overlay of what has changed is refused.
3. Sparse extents begin at whole grains; otherwise the disk can be read only.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.codec.vmdk import descriptor as text
from blocklayer.codec.vmdk import sparse
from blocklayer.codec.vmdk.descriptor import Descriptor, ExtentLine
from blocklayer.drivers.blocks import BlockFormatDriver, FileOptions
from blocklayer.drivers.vmdk.compressed import CompressedExtent
from blocklayer.drivers.vmdk.create import VmdkCreateOptions, write_disk
from blocklayer.drivers.vmdk.extents import FlatExtent, PlainExtent, SparseExtent
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.child import Role
from blocklayer.graph.driver import BackingReference, Buffer
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.filename import protocol_options, resolve_relative, scheme_of, storage_of
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.graph.options import Reference
from blocklayer.graph.streams import ImageStream
from blocklayer.units import SECTOR


class VmdkOptions(FileOptions):
    """Options of an open disk."""

    backing: Reference | UnsetType | None = UNSET


class VmdkExtentInfo(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """One extent, as ``info`` shows it."""

    compressed: bool | None = None
    virtual_size: int
    filename: str
    cluster_size: int | None = None
    format: str


class VmdkInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """The format specific information."""

    cid: int
    parent_cid: int
    create_type: str
    extents: list[VmdkExtentInfo]


class VmdkDriver(BlockFormatDriver):
    """One VMDK disk."""

    NAME: ClassVar[str] = "vmdk"
    Options = VmdkOptions
    CreateOptions = VmdkCreateOptions
    supports_backing = True

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """A sparse extent's signature, or the first statement of a descriptor."""
        return 100 if head.startswith(sparse.MAGIC) or text.is_descriptor(head) else 0

    async def open(self) -> None:
        """Read the descriptor, then the extents, their headers only."""
        self._storage = await self.open_file()
        self._turn = asyncio.Lock()
        self._parent_checked = False
        head = await io.read(self._storage, 0, min(4, self._storage.size))
        self._extents: list[PlainExtent] = []
        if head == sparse.MAGIC:
            await self._open_monolithic()
        else:
            await self._open_descriptor()
        self._starts = [extent.start for extent in self._extents]
        self._size = self._extents[-1].end if self._extents else 0
        self._judge_writing()
        # Until the content has a new identity, no write goes past this driver.
        self._identified = self.node.flags.read_only

    async def _open_monolithic(self) -> None:
        child = self.node.children["file"]
        header = await self._header(self._storage)
        if not header.descriptor_offset:
            raise FormatError(
                f"'{self._storage.filename}' is an extent without a descriptor: open the disk that "
                "it is part of"
            )
        place = header.descriptor_offset * SECTOR
        size = header.descriptor_size * SECTOR
        if size > text.MAX_SIZE or place + size > self._storage.size:
            raise FormatError(
                f"The VMDK descriptor at {place:#x}, {size:#x} bytes, is out of place"
            )
        self._descriptor_place, self._descriptor_data = (
            place,
            await io.read(self._storage, place, size),
        )
        self._descriptor = text.parse_descriptor(self._descriptor_data)
        self._extents.append(self._sparse(0, child.name, header, ""))

    async def _header(self, storage: Node) -> sparse.Header:
        data = await io.read(storage, 0, min(SECTOR, storage.size))
        header = sparse.decode_header(data)
        if header.directory_offset == sparse.AT_END:
            if storage.size < SECTOR + sparse.FOOTER_SIZE:
                raise FormatError(f"The VMDK '{storage.filename}' is too short to have a footer")
            place = storage.size - sparse.FOOTER_SIZE
            header = sparse.footer_header(await io.read(storage, place, sparse.FOOTER_SIZE))
            if not self.node.flags.read_only:
                raise UnsupportedError(
                    f"'{storage.filename}' is a finished stream: open it read-only"
                )
        return header

    def _sparse(self, start: int, name: str, header: sparse.Header, type: str) -> SparseExtent:
        child = self.node.children[name]
        if header.compressed:
            return CompressedExtent(self.node, start, child, header, type)
        return SparseExtent(start, child, header, type)

    async def _open_descriptor(self) -> None:
        size = self._storage.size
        if size > text.MAX_SIZE:
            raise FormatError(f"'{self._storage.filename}' is no VMDK descriptor: it is too large")
        self._descriptor_place, self._descriptor_data = 0, await io.read(self._storage, 0, size)
        if not text.is_descriptor(self._descriptor_data):
            raise FormatError(f"'{self._storage.filename}' is not in VMDK format")
        self._descriptor = text.parse_descriptor(self._descriptor_data)
        start = 0
        for index, line in enumerate(self._descriptor.extents):
            extent = await self._open_extent(index, line, start)
            self._extents.append(extent)
            start = extent.end

    async def _open_extent(self, index: int, line: ExtentLine, start: int) -> PlainExtent:
        size = line.sectors * SECTOR
        if line.type in text.ZERO:
            return PlainExtent(start, size)
        if line.access == "RDONLY" and not self.node.flags.read_only:
            raise UnsupportedError(
                f"'{self._storage.filename}' has a read-only extent: open it read-only"
            )
        name = f"extents.{index}"
        node = await self.node.open_child(
            name, self._extent_options(line.filename), named_by=self._storage.filename
        )
        if line.type in text.FLAT:
            child = self.node.children[name]
            return FlatExtent(start, size, child, line.start * SECTOR, line.type)
        header = await self._header(node)
        if header.size < size:
            raise FormatError(
                f"The VMDK extent '{node.filename}' has {header.size:#x} bytes, its disk needs "
                f"{size:#x}"
            )
        extent = self._sparse(start, name, header, line.type)
        extent.size = size
        return extent

    def _extent_options(self, name: str) -> Reference:
        """Options for the extent file ``name``, once the policy has allowed it."""
        if scheme_of(name) is not None:
            # Extents are files: a colon in a name means nothing.
            name = f"./{name}"
        full = resolve_relative(storage_of(self.node).filename, name)
        local = scheme_of(full) in (None, "file")
        graph = self.node.graph
        graph.policy.check(
            self._storage.filename, "extent", full.removeprefix("file:"), local=local
        )
        return protocol_options(full, graph.registry)

    def _judge_writing(self) -> None:
        units = [extent.cluster_size for extent in self._extents if extent.cluster_size]
        self.allocation_unit = max(units, default=1)
        astray = any(extent.start % (extent.cluster_size or 1) for extent in self._extents)
        if astray and not self.node.flags.read_only:
            raise UnsupportedError(
                f"'{self._storage.filename}' has extents that begin within a grain: open it "
                "read-only"
            )
        zeroed = [e for e in self._extents if isinstance(e, SparseExtent) and e.header.zeroed]
        if zeroed:
            self.zero_alignment = self.allocation_unit

    @property
    def size(self) -> int:
        """All extents together."""
        return self._size

    @property
    def cid(self) -> int:
        """The identity of the content."""
        return self._descriptor.cid

    @property
    def backing_reference(self) -> BackingReference | None:
        """The parent that the descriptor hints at."""
        parent = self._descriptor.parent
        return BackingReference(parent, self.NAME) if parent else None

    def specific_info(self) -> VmdkInfo:
        """What the descriptor says, and its extents."""
        described: Descriptor = self._descriptor
        return VmdkInfo(
            cid=described.cid,
            parent_cid=described.parent_cid,
            create_type=described.create_type,
            extents=[_extent_info(extent) for extent in self._extents],
        )

    async def close(self) -> None:
        """Write back all tables."""
        await self._write_back()

    async def flush(self) -> None:
        """All tables, then everything in every file."""
        await self._write_back()
        for edge in list(self.node.children.values()):
            if edge.role is not Role.BACKING:
                await io.flush(edge.node)

    async def _write_back(self) -> None:
        for extent in self._extents:
            await extent.write_back()

    def _extent_at(self, offset: int) -> PlainExtent:
        return self._extents[bisect_right(self._starts, offset) - 1]

    async def map(self, offset: int, length: int) -> Extent:
        """What the extent at ``offset`` says."""
        part = self._extent_at(offset)
        extent = await part.map(offset, min(length, part.end - offset))
        opaque = extent.kind is Kind.OPAQUE and extent.writable
        if (opaque or extent.kind is Kind.UNALLOCATED) and not self._parent_checked:
            self._check_parent()
        if extent.writable and not self._identified and not opaque:
            return msgspec.structs.replace(extent, writable=False)
        return extent

    def _check_parent(self) -> None:
        """Raise unless the backing node is what this image was made on."""
        below = self.node.backing
        if below is None:
            return
        described = self._descriptor
        if isinstance(below.driver, VmdkDriver) and below.driver.cid != described.parent_cid:
            raise CorruptionError(
                f"'{below.filename}' has changed since '{self._storage.filename}' was made on it "
                f"(CID {below.driver.cid:08x}, not {described.parent_cid:08x})"
            )
        self._parent_checked = True

    async def _identify(self) -> None:
        """Give the content a new identity, once after opening."""
        async with self._turn:
            if self._identified:
                return
            cid = int.from_bytes(os.urandom(4), "little") & 0xFFFFFFFE
            data = text.with_cid(self._descriptor_data, cid)
            end = self._descriptor_place + len(data)
            if end > self._storage.size:
                await io.truncate(self._storage, end)
            await io.write(self._storage, self._descriptor_place, data)
            self._descriptor_data = data
            self._descriptor = msgspec.structs.replace(self._descriptor, cid=cid)
            self._identified = True
            self.node.mapping_changed()

    async def allocate(self, offset: int, length: int) -> Allocation:
        """A new grain; or, for the first write, the place where the data is."""
        await self._identify()
        part = self._extent_at(offset)
        # Not in commit: a grain whose table is only not written yet is not free again.
        if isinstance(part, SparseExtent) and part.full:
            await self._write_back()
        return await part.allocate(offset, min(length, part.end - offset))

    async def commit(self, allocation: Allocation) -> None:
        """Enter a new grain into its table."""
        part = self._extent_at(allocation.offset)
        if await part.commit(allocation):
            self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The grain stays free."""
        self._extent_at(allocation.offset).abort(allocation)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Decompress."""
        part = self._extent_at(offset)
        assert isinstance(part, CompressedExtent)
        await part.read(offset, view)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Compress and append."""
        await self._identify()
        part = self._extent_at(offset)
        assert isinstance(part, CompressedExtent)
        await part.write(offset, data)
        if part.full:
            await self._write_back()

    def pack(self, data: Buffer, level: int | None = None) -> bytes | None:
        """A grain of a stream; other extents store it as it is. There is one level."""
        if level is not None:
            raise UsageError("Compression levels are not offered for format 'vmdk'")
        streams = [part for part in self._extents if isinstance(part, CompressedExtent)]
        return streams[0].pack(data) if len(streams) == len(self._extents) == 1 else None

    async def write_packed(self, offset: int, parts: Sequence[bytes]) -> None:
        """Append grains that ``pack`` made."""
        await self._identify()
        for packed in parts:
            part = self._extent_at(offset)
            assert isinstance(part, CompressedExtent)
            await part.write_packed(offset, packed)
            if part.full:
                await self._write_back()
            offset += part.grain_size

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Whole grains of a stream; a plain write does the same."""
        part = self._extent_at(offset) if data else None
        if part is None:
            return
        if not isinstance(part, CompressedExtent):
            raise UnsupportedError(
                f"'{self._storage.filename}' has no compressed grains: create it with "
                "subformat=streamOptimized"
            )
        await self.write_opaque(offset, data)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeros in place where data is; elsewhere an entry that says so, where there is one."""
        await self._identify()
        end = offset + length
        while offset < end:
            extent = await self.map(offset, end - offset)
            step = min(extent.length, end - offset)
            part = self._extent_at(offset)
            if extent.kind is Kind.UNALLOCATED:
                if self.node.backing is not None and not (
                    isinstance(part, SparseExtent) and await part.zero(offset, step)
                ):
                    raise UnsupportedError(f"'{self._storage.filename}' cannot say zeros")
                self.node.mapping_changed()
            else:
                await super().zero(offset, step, unmap=unmap)
            offset += step

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Every grain where a grain can be."""
        await self._write_back()
        result = CheckResult(messages=[])
        for extent in self._extents:
            await extent.check(result)
        return result

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """A new disk: ``target`` becomes its descriptor, or its only extent."""
        assert isinstance(options, VmdkCreateOptions)
        parent_cid = text.NO_PARENT
        if options.backing_file:
            parent_cid = await _parent_cid(graph, target, options)
        await write_disk(graph, target, options, parent_cid)

    @classmethod
    def stream(
        cls, options: BaseCreateOptions, *, compress: bool, level: int | None
    ) -> ImageStream:
        """A disk with subformat=streamOptimized, whose grains are always compressed."""
        from blocklayer.drivers.vmdk.stream import VmdkStream

        assert isinstance(options, VmdkCreateOptions)
        return VmdkStream(options, level)


async def _parent_cid(graph: Graph, target: Node, options: VmdkCreateOptions) -> int:
    from blocklayer.graph.open import open_image

    assert options.backing_file is not None
    full = resolve_relative(target.filename, options.backing_file)
    node = await open_image(graph, full, format=options.backing_fmt or None, backing=False)
    try:
        if not isinstance(node.driver, VmdkDriver):
            raise UnsupportedError(
                f"'{full}' has format '{node.driver.NAME}': a VMDK can only have a VMDK as backing "
                "file"
            )
        return node.driver.cid
    finally:
        await graph.release(node)


def _extent_info(extent: PlainExtent) -> VmdkExtentInfo:
    child = extent.child.node.filename if isinstance(extent, (FlatExtent, SparseExtent)) else ""
    return VmdkExtentInfo(
        compressed=extent.compressed or None,
        virtual_size=extent.size,
        filename=child,
        cluster_size=extent.cluster_size or None,
        format=extent.type,
    )
