"""VDI (VirtualBox): the header, and what the words of the block map mean.

Public:
    Header                          the first 512 bytes; `unpack`, `pack`
    decode_header(data) -> Header   judged: every field that is used is safe to use
    new_header(size, *, static, uuid_image, uuid_snapshot) -> Header
    UNALLOCATED, DISCARDED          block map words that name no block: both read as zeros
    is_block(word) -> bool, MAGIC, MAGIC_OFFSET, BLOCK_SIZE

1. The block map lies where it says, aligned to sectors, and has a word for every block of the disk.
2. Blocks are 1 MiB; images with parents (differencing, undo) are refused.
"""

from __future__ import annotations

from typing import Annotated, Final

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U32, U64, Record
from blocklayer.units import MIB, SECTOR, align_up, div_up

MAGIC: Final = b"\x7f\x10\xda\xbe"
MAGIC_OFFSET: Final = 0x40
_TEXT: Final = b"<<< QEMU VM Virtual Disk Image >>>\n"
_VERSION: Final = 0x00010001
_HEADER_SIZE: Final = 0x180
_NO_UUID: Final = bytes(16)

TYPE_DYNAMIC: Final = 1
TYPE_STATIC: Final = 2

BLOCK_SIZE: Final = MIB
UNALLOCATED: Final = 0xFFFFFFFF
DISCARDED: Final = 0xFFFFFFFE
MAX_BLOCKS: Final = 0x7FFFFE00 // 4
"""More than this the block map of no image may have."""
MAX_SIZE: Final = MAX_BLOCKS * BLOCK_SIZE


class Header(Record, byte_order="<"):
    """The first sector. Names are the specification's."""

    text: Annotated[bytes, "64s"]
    signature: Annotated[bytes, "4s"]
    version: U32
    header_size: U32
    image_type: U32
    image_flags: U32
    description: Annotated[bytes, "256s"]
    offset_bmap: U32
    offset_data: U32
    cylinders: U32
    heads: U32
    sectors: U32
    sector_size: U32
    unused1: U32
    disk_size: U64
    block_size: U32
    block_extra: U32
    blocks_in_image: U32
    blocks_allocated: U32
    uuid_image: Annotated[bytes, "16s"]
    uuid_last_snapshot: Annotated[bytes, "16s"]
    uuid_link: Annotated[bytes, "16s"]
    uuid_parent: Annotated[bytes, "16s"]
    unused2: Annotated[bytes, "56s"]

    @property
    def size(self) -> int:
        """The disk's size: whole sectors, whatever the header says."""
        return align_up(self.disk_size, SECTOR)


BLOCKS_ALLOCATED_OFFSET: Final = 0x184


def is_block(word: int) -> bool:
    """Whether a block map word is the index of a block."""
    return word < DISCARDED


def decode_header(data: bytes) -> Header:
    """The header at the start of ``data``. Raises FormatError or UnsupportedError."""
    header = Header.unpack(data)
    if header.signature != MAGIC:
        found = int.from_bytes(header.signature, "little")
        raise FormatError(f"Image not in VDI format (bad signature {found:08x})")
    problem = _problem(header)
    if problem is not None:
        raise UnsupportedError(f"unsupported VDI image ({problem})")
    if header.size > MAX_SIZE:
        raise UnsupportedError(
            f"Unsupported VDI image size (size is {header.disk_size:#x}, max supported is "
            f"{MAX_SIZE:#x})"
        )
    return header


def _problem(header: Header) -> str | None:
    if header.version != _VERSION:
        return f"version {header.version >> 16}.{header.version & 0xFFFF}"
    if header.offset_bmap % SECTOR:
        return f"unaligned block map offset {header.offset_bmap:#x}"
    if header.offset_data % SECTOR:
        return f"unaligned data offset {header.offset_data:#x}"
    if header.sector_size != SECTOR:
        return f"sector size {header.sector_size} is not {SECTOR}"
    if header.block_size != BLOCK_SIZE:
        return f"block size {header.block_size} is not {BLOCK_SIZE}"
    if header.size <= MAX_SIZE and header.size > header.blocks_in_image * BLOCK_SIZE:
        room = header.blocks_in_image * BLOCK_SIZE
        return f"disk size {header.size}, image bitmap has room for {room}"
    if header.uuid_link != _NO_UUID:
        return "non-NULL link UUID"
    if header.uuid_parent != _NO_UUID:
        return "non-NULL parent UUID"
    if header.blocks_in_image > MAX_BLOCKS:
        return f"too many blocks {header.blocks_in_image}, max is {MAX_BLOCKS}"
    return None


def new_header(size: int, *, static: bool, uuid_image: bytes, uuid_snapshot: bytes) -> Header:
    """The header of a new image of ``size`` bytes, which is rounded up to sectors."""
    size = align_up(size, SECTOR)
    blocks = div_up(size, BLOCK_SIZE)
    return Header(
        text=_TEXT,
        signature=MAGIC,
        version=_VERSION,
        header_size=_HEADER_SIZE,
        image_type=TYPE_STATIC if static else TYPE_DYNAMIC,
        image_flags=0,
        description=b"",
        offset_bmap=Header.SIZE,
        offset_data=Header.SIZE + align_up(4 * blocks, SECTOR),
        cylinders=0,
        heads=0,
        sectors=0,
        sector_size=SECTOR,
        unused1=0,
        disk_size=size,
        block_size=BLOCK_SIZE,
        block_extra=0,
        blocks_in_image=blocks,
        blocks_allocated=blocks if static else 0,
        uuid_image=uuid_image,
        uuid_last_snapshot=uuid_snapshot,
        uuid_link=_NO_UUID,
        uuid_parent=_NO_UUID,
        unused2=b"",
    )
