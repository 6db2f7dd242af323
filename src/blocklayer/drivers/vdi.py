"""VDI: blocks of 1 MiB, found through one block map.

1. A block's space is in the file before the block map names it, and the block map before the
   header's count of blocks. A crash in between leaves space nobody uses; it is not handed out
   twice, because the block map itself, not the count, says which space is in use.
2. Nothing is ever freed, so the place of a block never changes.
"""

from __future__ import annotations

from array import array
from typing import Annotated, ClassVar

from msgspec import Meta

from blocklayer.codec import vdi
from blocklayer.codec.vdi import BLOCK_SIZE, Header, is_block
from blocklayer.drivers.blocks import (
    MAX_MESSAGES,
    BlockFormatDriver,
    FileOptions,
    new_block,
    random_uuid,
)
from blocklayer.drivers.tables import PAGE_SIZE, Part, Space, TableCache
from blocklayer.errors import CorruptionError, FormatError, UsageError
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions as BaseCreateOptions

_PAGE_WORDS = PAGE_SIZE // 4


class VdiCreateOptions(BaseCreateOptions):
    """``-o`` of ``qemu-img create -f vdi``."""

    static: Annotated[bool, Meta(description="VDI static (pre-allocated) image")] = False


class VdiDriver(BlockFormatDriver):
    """One VDI image."""

    NAME: ClassVar[str] = "vdi"
    Options = FileOptions
    CreateOptions = VdiCreateOptions

    allocation_unit = BLOCK_SIZE

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """The signature stands at 0x40."""
        return 100 if head[vdi.MAGIC_OFFSET :].startswith(vdi.MAGIC) else 0

    async def open(self) -> None:
        """Read and judge the header; the block map is read when it is needed."""
        self._storage = await self.open_file()
        data = await io.read(self._storage, 0, min(Header.SIZE, self._storage.size))
        self._header = vdi.decode_header(data)
        end = self._header.offset_bmap + 4 * self._header.blocks_in_image
        if end > self._storage.size:
            raise FormatError(
                f"VDI block map at {self._header.offset_bmap:#x} ends at {end:#x}, past the end "
                f"of '{self._storage.filename}' ({self._storage.size:#x} bytes)"
            )
        self._table = TableCache(self._storage, "I", "little")
        self._space: Space | None = None

    async def close(self) -> None:
        """Write back the block map and the count."""
        await self._write_back()

    async def flush(self) -> None:
        """Block map and count, then everything to stable storage."""
        await self._write_back()
        await io.flush(self._storage)

    async def _write_back(self) -> None:
        if self._space is None:
            return
        await self._table.write_back(self._space.settle_reused)
        count = (self._space.end - self._header.offset_data) // BLOCK_SIZE
        if count != self._header.blocks_allocated:
            await io.write(self._storage, vdi.BLOCKS_ALLOCATED_OFFSET, count.to_bytes(4, "little"))
            self._header.blocks_allocated = count

    @property
    def size(self) -> int:
        """The disk's size."""
        return self._header.size

    async def _page(self, block: int) -> tuple[Part, int]:
        """The part of the block map that has ``block``, and the block of its first word."""
        first = block - block % _PAGE_WORDS
        count = min(_PAGE_WORDS, self._header.blocks_in_image - first)
        return await self._table.load(self._header.offset_bmap + 4 * first, count), first

    def _place(self, block: int, word: int) -> int:
        """Where the block that ``word`` names begins in the file."""
        if word >= self._header.blocks_in_image:
            raise CorruptionError(
                f"VDI block {block} is said to be stored as number {word} of "
                f"{self._header.blocks_in_image} in '{self._storage.filename}'"
            )
        return self._header.offset_data + word * BLOCK_SIZE

    async def map(self, offset: int, length: int) -> Extent:
        """Blocks that follow one another in the file, or that all read as zeros."""
        block, within = divmod(offset, BLOCK_SIZE)
        part, first = await self._page(block)
        words = part.entries
        word, index = words[block - first], block - first + 1
        last = min(len(words), -(-(offset + length) // BLOCK_SIZE) - first)
        stored = is_block(word)
        if stored:
            while index < last and words[index] == word + index - (block - first):
                index += 1
        else:
            while index < last and not is_block(words[index]):
                index += 1
        length = min(length, (first + index) * BLOCK_SIZE - offset)
        if not stored:
            return Extent(offset, length, Kind.ZERO)
        # Every word of the run is judged by the last one, which is the largest.
        self._place(first + index - 1, words[index - 1])
        place = self._place(block, word) + within
        static = self._header.image_type == vdi.TYPE_STATIC
        child = self.node.children["file"]
        return Extent(offset, length, Kind.DATA, place, child, writable=True, recurse=static)

    async def allocate(self, offset: int, length: int) -> Allocation:
        """The next free block of the file."""
        # Not in commit: a block whose table is only not written yet is not free again.
        if self._table.full:
            await self._write_back()
        space = self._space or await self._find_space()
        place, zeros_from = await space.take(BLOCK_SIZE)
        child = self.node.children["file"]
        return new_block(offset, length, BLOCK_SIZE, child, place, fresh=place >= zeros_from)

    async def _find_space(self) -> Space:
        used = self._header.blocks_allocated
        for first in range(0, self._header.blocks_in_image, _PAGE_WORDS):
            part, _ = await self._page(first)
            if part.uniform and not is_block(part.entries[0]):
                continue
            used = max(used, 1 + max(filter(is_block, part.entries), default=-1))
        if used > self._header.blocks_in_image:
            raise CorruptionError(
                f"VDI image '{self._storage.filename}' has {self._header.blocks_in_image} blocks, "
                f"but block number {used - 1} is in use: check it"
            )
        if self._space is None:
            end = self._header.offset_data + used * BLOCK_SIZE
            self._space = Space(self._storage, end)
        return self._space

    async def commit(self, allocation: Allocation) -> None:
        """Enter the block into the block map."""
        assert isinstance(allocation.token, int)
        block = allocation.offset // BLOCK_SIZE
        part, first = await self._page(block)
        part.set(block - first, (allocation.token - self._header.offset_data) // BLOCK_SIZE)
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        """The block stays free."""
        assert self._space is not None
        assert isinstance(allocation.token, int)
        self._space.give_back(allocation.token, BLOCK_SIZE)

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Every stored block once, within the image, and as many as the header says."""
        await self._write_back()
        result = CheckResult(messages=[])
        limit, allocated = self._header.blocks_in_image, 0
        seen = bytearray(-(-limit // 8))

        def report(message: str, count: int = 1) -> None:
            result.corruptions += count
            if len(result.messages) < MAX_MESSAGES:
                result.messages.append(f"ERROR: {message}")

        for base in range(0, limit, _PAGE_WORDS):
            part, _ = await self._page(base)
            words = part.entries
            if part.uniform and len(words) == _PAGE_WORDS:
                # A hostile image's map may be as long as it likes, if it is a hole of the file.
                if is_block(words[0]):
                    report(f"block index {base} and on all used by {words[0]}", len(words) - 1)
                    allocated += len(words)
                continue
            for block, word in enumerate(words, base):
                if not is_block(word):
                    continue
                if word >= limit:
                    report(f"block index {block} too large, is {word}")
                    continue
                allocated += 1
                if seen[word >> 3] & 1 << (word & 7):
                    report(f"block index {block} also used by {word}")
                seen[word >> 3] |= 1 << (word & 7)
        if allocated != self._header.blocks_allocated:
            report(
                f"allocated blocks mismatch, is {allocated}, should be "
                f"{self._header.blocks_allocated}"
            )
        return result

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: BaseCreateOptions) -> None:
        """Header and block map; a static image is as long as its disk from the start."""
        assert isinstance(options, VdiCreateOptions)
        if options.size > vdi.MAX_SIZE:
            raise UsageError(
                f"Unsupported VDI image size (size is {options.size:#x}, max supported is "
                f"{vdi.MAX_SIZE:#x})"
            )
        header = vdi.new_header(
            options.size,
            static=options.static,
            uuid_image=random_uuid(),
            uuid_snapshot=random_uuid(),
        )
        blocks = header.blocks_in_image
        end = header.offset_data + (blocks * BLOCK_SIZE if options.static else 0)
        await io.truncate(target, end)
        table = TableCache(target, "I", "little")
        for first in range(0, blocks, _PAGE_WORDS):
            count = min(_PAGE_WORDS, blocks - first)
            if options.static:
                words = array("I", range(first, first + count))
            else:
                words = array("I", [vdi.UNALLOCATED]) * count
            await io.write(target, header.offset_bmap + 4 * first, table.encode(words))
        # Last, so that an image half made is none.
        await io.write(target, 0, header.pack())
