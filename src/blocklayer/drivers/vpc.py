"""VHD (``vpc``): fixed disks with a footer, dynamic ones with a block table, differencing ones.

1. Images that grow keep a copy of the footer in their first sector: while new blocks lie where the
   footer was and the new footer is not written yet (it is at every flush), that copy stands in.
2. A dynamic image's data counts as a whole block; in a differencing image the block's bitmap says
   for each sector whether it is here or in the parent. Differencing images are read only.
3. A table names a block only once it is on stable storage: QEMU refuses images that look cut off.
4. A parent is used only if it has the identity that the child names: anything else would show wrong
   data.
"""

from __future__ import annotations

import time
from array import array
from typing import Annotated, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec import vpc
from blocklayer.codec.vpc import UNUSED, DynamicHeader, Footer
from blocklayer.drivers.blocks import BlockFormatDriver, FileOptions, new_block, random_uuid
from blocklayer.drivers.tables import PAGE_SIZE, Part, Space, TableCache
from blocklayer.errors import CorruptionError, FormatError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import BackingReference
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions
from blocklayer.graph.options import Reference
from blocklayer.units import SECTOR, align_up

_PAGE_WORDS = PAGE_SIZE // 4
_BITMAP_PIECE = 512
"""Bytes of a sector bitmap that are looked at at once."""


class VpcOptions(FileOptions):
    """Options of an open image; ``backing`` is for differencing images."""

    backing: Reference | UnsetType | None = UNSET


class VpcCreateOptions(BaseCreateOptions):
    """``-o`` of ``qemu-img create -f vpc``."""

    subformat: Annotated[
        Literal["dynamic", "fixed"] | None,
        Meta(
            description="Type of virtual hard disk format. Supported formats are "
            "{dynamic (default) | fixed} "
        ),
    ] = None
    force_size: Annotated[
        bool | None,
        Meta(
            description="Force disk size calculation to use the actual size specified, rather than "
            "using the nearest CHS-based calculation"
        ),
    ] = None


class VpcDriver(BlockFormatDriver):
    """One VHD image."""

    NAME: ClassVar[str] = "vpc"
    Options = VpcOptions
    CreateOptions = VpcCreateOptions
    supports_backing = True

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Images that grow begin with a footer; fixed ones look like raw and must be named."""
        return 100 if head.startswith(vpc.COOKIE) else 0

    async def open(self) -> None:
        """Read the footer, and of images that grow the dynamic header and the parent's name."""
        self._storage = await self.open_file()
        self._header: DynamicHeader | None = None
        self._space: Space | None = None
        self._parent: BackingReference | None = None
        self._parent_checked = False
        self._footer = await self._read_footer()
        if self._footer.disk_type != vpc.TYPE_FIXED:
            await self._open_dynamic()
        elif self.node.options.backing not in (UNSET, None, ""):  # type: ignore[attr-defined]
            raise UsageError(f"'{self._storage.filename}' has no parent: it takes no backing node")

    async def _read_footer(self) -> Footer:
        size = self._storage.size
        if size < SECTOR:
            raise FormatError(f"invalid VPC image: '{self._storage.filename}' is too short")
        first = await io.read(self._storage, 0, SECTOR)
        if first.startswith(vpc.COOKIE):
            return vpc.decode_footer(first)
        footer = vpc.decode_footer(await io.read(self._storage, size - SECTOR, SECTOR))
        if footer.disk_type != vpc.TYPE_FIXED:
            raise FormatError("invalid VPC image: its first sector has no copy of the footer")
        if footer.size > size - SECTOR:
            raise FormatError(
                f"The VPC image '{self._storage.filename}' has been truncated: it ends at "
                f"{size:#x}, its disk at {footer.size:#x}"
            )
        return footer

    async def _open_dynamic(self) -> None:
        storage, place = self._storage, self._footer.data_offset
        if place > storage.size - DynamicHeader.SIZE:
            raise FormatError(f"The VPC image's dynamic header at {place:#x} is past its end")
        data = await io.read(storage, place, DynamicHeader.SIZE)
        header = vpc.decode_dynamic(data, self._footer)
        if header.table_offset + 4 * header.max_table_entries > storage.size:
            raise FormatError(
                f"The VPC image '{storage.filename}' has been truncated: its block allocation "
                f"table ends at {header.table_end:#x}, past the end {storage.size:#x}"
            )
        self._header = header
        self.allocation_unit = header.block_size
        self._table = TableCache(storage, "I", "big")
        if self._footer.disk_type == vpc.TYPE_DIFFERENCING:
            if not self.node.flags.read_only:
                raise UnsupportedError(
                    f"'{storage.filename}' is a differencing VHD: open it read-only"
                )
            self._parent = await self._find_parent(header)
        elif self.node.options.backing not in (UNSET, None, ""):  # type: ignore[attr-defined]
            raise UsageError(f"'{storage.filename}' has no parent: it takes no backing node")

    async def _find_parent(self, header: DynamicHeader) -> BackingReference:
        """The first path among the locators that means something here, else the name alone."""
        for locator in header.locators:
            if locator.data_offset + locator.data_length > self._storage.size:
                raise FormatError(
                    f"A parent locator of the VPC image at {locator.data_offset:#x} is past its end"
                )
            data = await io.read(self._storage, locator.data_offset, locator.data_length)
            path = vpc.locator_path(locator.code, data)
            if path:
                return BackingReference(path, self.NAME)
        name = vpc.file_name(header.parent_name)
        if not name:
            raise FormatError(f"The differencing VHD '{self._storage.filename}' names no parent")
        return BackingReference(name, self.NAME)

    @property
    def backing_reference(self) -> BackingReference | None:
        """The parent of a differencing image."""
        return self._parent

    @property
    def size(self) -> int:
        """The disk's size."""
        return self._footer.size

    async def close(self) -> None:
        """Write back the table and the footer."""
        await self._write_back()

    async def flush(self) -> None:
        """Table and footer, then everything to stable storage."""
        await self._write_back()
        await io.flush(self._storage)

    async def _write_back(self) -> None:
        if self._space is None:
            return
        await self._table.write_back(self._space.settle)
        if self._storage.size != self._space.end + Footer.SIZE:
            await self._space.grow(self._space.end + Footer.SIZE)
            await io.write(self._storage, self._space.end, self._footer.pack())

    async def map(self, offset: int, length: int) -> Extent:
        """A fixed disk is one run; blocks of others are separated by their bitmaps."""
        header, child = self._header, self.node.children["file"]
        if header is None:
            return Extent(offset, length, Kind.DATA, offset, child, writable=True, recurse=True)
        block, within = divmod(offset, header.block_size)
        part, first = await self._page(header, block)
        words = part.entries
        if words[block - first] != UNUSED:
            place = self._place(header, block, words[block - first])
            length = min(length, header.block_size - within)
            if self._parent is not None:
                return await self._map_sectors(header, place, offset, length)
            place += header.bitmap_size + within
            return Extent(offset, length, Kind.DATA, place, child, writable=True)
        index = block - first
        last = min(len(words), -(-(offset + length) // header.block_size) - first)
        while index < last and words[index] == UNUSED:
            index += 1
        length = min(length, (first + index) * header.block_size - offset)
        return Extent(offset, length, await self._absent())

    async def _page(self, header: DynamicHeader, block: int) -> tuple[Part, int]:
        """The part of the table that has ``block``, and the block of its first word."""
        first = block - block % _PAGE_WORDS
        count = min(_PAGE_WORDS, header.max_table_entries - first)
        return await self._table.load(header.table_offset + 4 * first, count), first

    def _place(self, header: DynamicHeader, block: int, word: int) -> int:
        """Where the block, its bitmap first, lies: nowhere near other metadata."""
        start = word * SECTOR
        end = start + header.bitmap_size + header.block_size
        dynamic = self._footer.data_offset
        for low, high in (
            (0, Footer.SIZE),
            (dynamic, dynamic + DynamicHeader.SIZE),
            (header.table_offset, header.table_offset + 4 * header.max_table_entries),
        ):
            if start < high and low < end:
                raise CorruptionError(
                    f"Block {block} of the VPC image '{self._storage.filename}' at {start:#x} "
                    f"overlaps metadata at {low:#x}"
                )
        if end > self._storage.size:
            raise CorruptionError(
                f"Block {block} of the VPC image '{self._storage.filename}' ends at {end:#x}, past "
                "the end of the file. The image has been truncated."
            )
        return start

    async def _absent(self) -> Kind:
        """What is not here: the parent's, or zeros."""
        if self._parent is None:
            return Kind.ZERO
        below = self.node.backing
        if below is not None and not self._parent_checked:
            header, driver = self._header, below.driver
            assert header is not None
            if isinstance(driver, VpcDriver) and driver._footer.uuid != header.parent_uuid:
                raise CorruptionError(
                    f"'{below.filename}' is not the parent of '{self._storage.filename}': it has "
                    f"the identity {driver._footer.uuid.hex()}, not {header.parent_uuid.hex()}"
                )
            self._parent_checked = True
        return Kind.UNALLOCATED

    async def _map_sectors(
        self, header: DynamicHeader, place: int, offset: int, length: int
    ) -> Extent:
        """The run of sectors from ``offset`` on that are all here, or all not."""
        sector, within = divmod(offset % header.block_size, SECTOR)
        start = sector // 8
        count = min(_BITMAP_PIECE, header.bitmap_size - start)
        bits = await io.read(self._storage, place + start, count)
        end = 8 * start + min(8 * count, -(-(within + length) // SECTOR) + sector % 8)
        here, stop = _bit(bits, sector % 8), sector + 1
        while stop < end and _bit(bits, stop - 8 * start) == here:
            stop += 1
        length = min(length, (stop - sector) * SECTOR - within)
        if not here:
            return Extent(offset, length, await self._absent())
        place += header.bitmap_size + offset % header.block_size
        return Extent(offset, length, Kind.DATA, place, self.node.children["file"])

    async def allocate(self, offset: int, length: int) -> Allocation:
        """A new block at the end, where the footer is now, with its bitmap filled in."""
        header = self._header
        assert header is not None
        # Not in commit: a block whose table is only not written yet is not free again.
        if self._table.full:
            await self._write_back()
        space = self._space or await self._find_space(header)
        start, zeros_from = await space.take(header.bitmap_size + header.block_size)
        try:
            await io.write(self._storage, start, b"\xff" * header.bitmap_size)
        except BaseException:
            space.give_back(start, header.bitmap_size + header.block_size)
            raise
        place = start + header.bitmap_size
        child, fresh = self.node.children["file"], place >= zeros_from
        return new_block(offset, length, header.block_size, child, place, fresh=fresh)

    async def _find_space(self, header: DynamicHeader) -> Space:
        end = max(self._footer.data_offset + DynamicHeader.SIZE, header.table_end)
        block_size = header.bitmap_size + header.block_size
        for base in range(0, header.max_table_entries, _PAGE_WORDS):
            part, _ = await self._page(header, base)
            words = part.entries
            used = [w for w in words if w != UNUSED] if not part.uniform else words[:1]
            for word in used:
                if word != UNUSED:
                    end = max(end, self._place(header, base, word) + block_size)
        if self._space is None:
            self._space = Space(self._storage, align_up(end, SECTOR))
        return self._space

    async def commit(self, allocation: Allocation) -> None:
        """Enter the block into the table."""
        header = self._header
        assert header is not None
        assert isinstance(allocation.token, int)
        block = allocation.offset // header.block_size
        part, first = await self._page(header, block)
        part.set(block - first, (allocation.token - header.bitmap_size) // SECTOR)
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The block stays free."""
        assert self._space is not None
        assert self._header is not None
        assert isinstance(allocation.token, int)
        bitmap_size = self._header.bitmap_size
        place = allocation.token - bitmap_size
        self._space.give_back(place, bitmap_size + self._header.block_size)

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """Footer, and for a dynamic image its copy, the dynamic header and an empty table."""
        assert isinstance(options, VpcCreateOptions)
        force = bool(options.force_size)
        size, geometry = vpc.disk_size(options.size, force=force)
        fixed = options.subformat == "fixed"
        footer = vpc.new_footer(
            size,
            geometry,
            fixed=fixed,
            force=force,
            timestamp=max(0, int(time.time()) - vpc.EPOCH),
            uuid=random_uuid(),
        ).pack_checked()
        if fixed:
            await io.truncate(target, size + Footer.SIZE)
            await io.write(target, size, footer)
            return
        header = vpc.new_dynamic(size)
        await io.truncate(target, header.table_end + Footer.SIZE)
        await io.write(target, Footer.SIZE, header.pack_checked())
        words = header.table_end - header.table_offset
        for offset in range(0, words, PAGE_SIZE):
            table = array("B", b"\xff") * min(PAGE_SIZE, words - offset)
            await io.write(target, header.table_offset + offset, table.tobytes())
        await io.write(target, header.table_end, footer)
        # Last, so that an image half made is none.
        await io.write(target, 0, footer)


def _bit(bits: bytes, index: int) -> int:
    return bits[index >> 3] >> (7 - (index & 7)) & 1
