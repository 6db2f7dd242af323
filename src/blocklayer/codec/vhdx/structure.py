"""VHDX: headers, region table, metadata items, and the words of the block allocation table.

Public:
    Header, decode_header(data) -> Header | None, current_header(first, second) -> index
    decode_regions(data) -> Regions, encode_regions(table_offset, …)
    decode_metadata(region) -> Metadata, encode_metadata(metadata) -> bytes
    Geometry(metadata): `table_index(block)`, `table_words`, `blocks`
    STATE_* , word_state(word), word_offset(word), make_word(state, host_offset)
    FILE_IDENTIFIER, the fixed places *_OFFSET, ALIGNMENT

1. A structure with a checksum is used only if it is right.
2. Regions lie on whole MiB behind the first, overlap nothing, and have a size that fits the disk.
3. What is marked as required and not known makes the image unusable; other unknown items are left
   alone.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U16, U32, U64, Record
from blocklayer.units import KIB, MIB, TIB, align_up, div_up, is_power_of_two

ALIGNMENT: Final = MIB
"""Regions and blocks lie at multiples of this."""
FILE_MAGIC: Final = b"vhdxfile"
HEADER_OFFSETS: Final = (64 * KIB, 128 * KIB)
HEADER_SIZE: Final = 4 * KIB
REGION_OFFSETS: Final = (192 * KIB, 256 * KIB)
REGION_SIZE: Final = 64 * KIB
METADATA_TABLE_SIZE: Final = 64 * KIB

MAX_SIZE: Final = 64 * TIB
MAX_BLOCK_SIZE: Final = 256 * MIB
MAX_LOG_SIZE: Final = 4 << 30
_MAX_METADATA_SIZE: Final = 16 * MIB
_MAX_REGIONS: Final = 2047
_MAX_ITEMS: Final = 2047
_REQUIRED_ITEM: Final = 4
_VIRTUAL_DISK_ITEM: Final = 2

HAS_PARENT: Final = 2
LEAVE_BLOCKS_ALLOCATED: Final = 1

STATE_NOT_PRESENT: Final = 0
STATE_UNDEFINED: Final = 1
STATE_ZERO: Final = 2
STATE_UNMAPPED: Final = 3
STATE_UNMAPPED_OLD: Final = 5
STATE_FULLY_PRESENT: Final = 6
STATE_PARTIALLY_PRESENT: Final = 7
READS_ZERO: Final = frozenset(
    (STATE_NOT_PRESENT, STATE_UNDEFINED, STATE_ZERO, STATE_UNMAPPED, STATE_UNMAPPED_OLD)
)
_STATE_MASK: Final = 7
_RESERVED_MASK: Final = 0xFFFF8


def guid(text: str) -> bytes:
    """A GUID as the format stores it: its first three parts in little endian."""
    a, b, c, d, e = text.split("-")
    head = b"".join(bytes.fromhex(part)[::-1] for part in (a, b, c))
    return head + bytes.fromhex(d + e)


NO_GUID: Final = bytes(16)
_BAT: Final = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA: Final = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_FILE_PARAMETERS: Final = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE: Final = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_DISK_ID: Final = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
_LOGICAL_SECTOR: Final = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
_PHYSICAL_SECTOR: Final = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
_PARENT_LOCATOR: Final = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_NEEDED: Final = (_FILE_PARAMETERS, _DISK_SIZE, _LOGICAL_SECTOR)
_KNOWN: Final = (*_NEEDED, _DISK_ID, _PHYSICAL_SECTOR, _PARENT_LOCATOR)


def checksum(data: bytes | bytearray) -> int:
    """CRC-32C of ``data`` with the four bytes at 4, where checksums are stored, as zeros."""
    import google_crc32c

    head: int = google_crc32c.value(bytes(data[:4]) + bytes(4))
    whole: int = google_crc32c.extend(head, bytes(data[8:]))
    return whole


def with_checksum(data: bytes | bytearray) -> bytes:
    """``data`` with its checksum in place."""
    return bytes(data[:4]) + checksum(data).to_bytes(4, "little") + bytes(data[8:])


def _is_sound(data: bytes) -> bool:
    return checksum(data) == int.from_bytes(data[4:8], "little")


class Header(Record, byte_order="<"):
    """One of the two headers; the rest of its 4 KiB is reserved."""

    signature: Annotated[bytes, "4s"]
    checksum: U32
    sequence_number: U64
    file_write_guid: Annotated[bytes, "16s"]
    data_write_guid: Annotated[bytes, "16s"]
    log_guid: Annotated[bytes, "16s"]
    log_version: U16
    version: U16
    log_length: U32
    log_offset: U64

    def encode(self) -> bytes:
        """All 4 KiB."""
        return with_checksum(self.pack().ljust(HEADER_SIZE, b"\0"))


def new_header(sequence_number: int, log_offset: int, log_length: int, guids: bytes) -> Header:
    """The header of a new image; ``guids`` are 32 random bytes."""
    return Header(
        b"head", 0, sequence_number, guids[:16], guids[16:], NO_GUID, 0, 1, log_length, log_offset
    )


def decode_header(data: bytes) -> Header | None:
    """The header in ``data``, None if it is not valid."""
    if len(data) < HEADER_SIZE or not data.startswith(b"head") or not _is_sound(data):
        return None
    return Header.unpack(data)


def current_header(first: Header | None, second: Header | None) -> int:
    """Which of the two is in force: 0 or 1. Raises FormatError if neither can be."""
    if first is None and second is None:
        raise FormatError("No valid VHDX header found")
    if first is None or second is None:
        return int(first is None)
    if first.sequence_number == second.sequence_number and first != second:
        raise FormatError("No valid VHDX header found: both have the same sequence number")
    return int(second.sequence_number > first.sequence_number)


def judge_header(header: Header, file_size: int) -> None:
    """Raise unless the header's fields can be used with a file of ``file_size`` bytes."""
    if header.version != 1:
        raise UnsupportedError(f"Unsupported VHDX version {header.version}")
    if header.log_version != 0:
        raise UnsupportedError(f"Unsupported VHDX log version {header.log_version}")
    if header.log_length == 0 and header.log_guid == NO_GUID:
        return
    _check_region("log", header.log_offset, header.log_length, file_size)


def _check_region(what: str, offset: int, length: int, file_size: int) -> None:
    if offset < ALIGNMENT or offset % ALIGNMENT or length % ALIGNMENT or not length:
        raise FormatError(f"The VHDX {what} at {offset:#x}, {length:#x} bytes, is not aligned")
    if offset + length > file_size:
        raise FormatError(
            f"The VHDX {what} at {offset:#x}, {length:#x} bytes, is past the end of the file "
            f"({file_size:#x} bytes)"
        )


class _RegionHead(Record, byte_order="<"):
    signature: Annotated[bytes, "4s"]
    checksum: U32
    count: U32
    reserved: U32


class _RegionEntry(Record, byte_order="<"):
    guid: Annotated[bytes, "16s"]
    offset: U64
    length: U32
    required: U32


class Regions(msgspec.Struct, frozen=True):
    """Where the two regions are that every image has."""

    table_offset: int
    table_length: int
    metadata_offset: int
    metadata_length: int


def regions_sound(data: bytes) -> bool:
    """Whether ``data`` is a region table with its checksum right."""
    return len(data) == REGION_SIZE and data.startswith(b"regi") and _is_sound(data)


def decode_regions(data: bytes, header: Header, file_size: int) -> Regions:
    """The regions that the table in ``data`` names. Raises FormatError or UnsupportedError."""
    head = _RegionHead.unpack(data)
    if head.count > _MAX_REGIONS:
        raise FormatError(f"The VHDX region table has {head.count} entries")
    found: dict[bytes, _RegionEntry] = {}
    taken = [(header.log_offset, header.log_offset + header.log_length)]
    for index in range(head.count):
        entry = _RegionEntry.unpack(data, _RegionHead.SIZE + index * _RegionEntry.SIZE)
        _check_region("region", entry.offset, entry.length, file_size)
        for low, high in taken:
            if entry.offset < high and low < entry.offset + entry.length:
                raise FormatError(f"The VHDX region at {entry.offset:#x} overlaps another")
        taken.append((entry.offset, entry.offset + entry.length))
        if entry.guid in (_BAT, _METADATA):
            if entry.guid in found:
                raise FormatError(f"The VHDX region at {entry.offset:#x} is there twice")
            found[entry.guid] = entry
        elif entry.required & 1:
            raise UnsupportedError(f"Unknown required VHDX region {entry.guid.hex()}")
    if len(found) != 2:
        raise FormatError("The VHDX region table lacks the block table or the metadata")
    table, metadata = found[_BAT], found[_METADATA]
    return Regions(table.offset, table.length, metadata.offset, metadata.length)


def encode_regions(regions: Regions) -> bytes:
    """The region table of a new image."""
    data = _RegionHead(b"regi", 0, 2, 0).pack()
    data += _RegionEntry(_BAT, regions.table_offset, regions.table_length, 1).pack()
    data += _RegionEntry(_METADATA, regions.metadata_offset, regions.metadata_length, 1).pack()
    return with_checksum(data.ljust(REGION_SIZE, b"\0"))


class _MetadataHead(Record, byte_order="<"):
    signature: Annotated[bytes, "8s"]
    reserved: U16
    count: U16
    reserved2: Annotated[bytes, "20s"]


class _MetadataEntry(Record, byte_order="<"):
    item: Annotated[bytes, "16s"]
    offset: U32
    length: U32
    flags: U32
    reserved: U32


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata region says of the disk."""

    block_size: int
    has_parent: bool = False
    leave_blocks_allocated: bool = False
    size: int
    logical_sector_size: int = 512
    physical_sector_size: int = 512
    disk_id: bytes = NO_GUID

    @property
    def chunk_ratio(self) -> int:
        """Blocks for which there is one word of a sector bitmap in the table."""
        return (self.logical_sector_size << 23) // self.block_size

    @property
    def blocks(self) -> int:
        """Blocks that the disk has."""
        return div_up(self.size, self.block_size)

    @property
    def table_words(self) -> int:
        """Words that the table must have."""
        return self.table_index(self.blocks - 1) + 1 if self.blocks else 0

    def table_index(self, block: int) -> int:
        """The place of a block's word: sector bitmaps stand between those of blocks."""
        return block + block // self.chunk_ratio

    def first_block(self, index: int) -> int:
        """The first block whose word is at ``index`` or behind it."""
        chunk, place = divmod(index, self.chunk_ratio + 1)
        return chunk * self.chunk_ratio + min(place, self.chunk_ratio)


def metadata_length(data: bytes, region_length: int) -> int:
    """How much of the metadata region the items reach into; ``data`` is its table."""
    ends = [METADATA_TABLE_SIZE]
    for entry in _metadata_entries(data):
        end = entry.offset + entry.length
        if entry.item in _KNOWN and entry.length:
            if entry.offset < METADATA_TABLE_SIZE or end > min(region_length, _MAX_METADATA_SIZE):
                raise FormatError(f"A VHDX metadata item at {entry.offset:#x} is out of place")
            ends.append(end)
    return max(ends)


def _metadata_entries(data: bytes) -> list[_MetadataEntry]:
    head = _MetadataHead.unpack(data)
    if head.signature != b"metadata":
        raise FormatError("The VHDX metadata region has no metadata table")
    if head.count > _MAX_ITEMS:
        raise FormatError(f"The VHDX metadata table has {head.count} entries")
    places = range(_MetadataHead.SIZE, (head.count + 1) * _MetadataEntry.SIZE, _MetadataEntry.SIZE)
    return [_MetadataEntry.unpack(data, place) for place in places]


def decode_metadata(data: bytes) -> Metadata:
    """The items in the metadata region, of which ``data`` is the start up to the last item."""
    items: dict[bytes, bytes] = {}
    for entry in _metadata_entries(data):
        if entry.item in _KNOWN:
            items[entry.item] = data[entry.offset : entry.offset + entry.length]
        elif entry.flags & _REQUIRED_ITEM:
            raise UnsupportedError(f"Unknown required VHDX metadata item {entry.item.hex()}")
    missing = [item for item in _NEEDED if item not in items]
    if missing:
        raise FormatError(f"The VHDX metadata lacks the item {missing[0].hex()}")
    parameters = _number(items[_FILE_PARAMETERS], 8)
    flags = parameters >> 32
    metadata = Metadata(
        block_size=parameters & 0xFFFFFFFF,
        has_parent=bool(flags & HAS_PARENT),
        leave_blocks_allocated=bool(flags & LEAVE_BLOCKS_ALLOCATED),
        size=_number(items[_DISK_SIZE], 8),
        logical_sector_size=_number(items[_LOGICAL_SECTOR], 4),
        physical_sector_size=_number(items.get(_PHYSICAL_SECTOR, bytes(4)), 4),
        disk_id=items.get(_DISK_ID, NO_GUID),
    )
    _judge_metadata(metadata)
    return metadata


def _number(data: bytes, length: int) -> int:
    if len(data) < length:
        raise FormatError(f"A VHDX metadata item of {len(data)} bytes should have {length}")
    return int.from_bytes(data[:length], "little")


def _judge_metadata(metadata: Metadata) -> None:
    size, block_size = metadata.size, metadata.block_size
    if metadata.logical_sector_size not in (512, 4096):
        raise FormatError(f"Invalid VHDX logical sector size {metadata.logical_sector_size}")
    if not is_power_of_two(block_size) or not MIB <= block_size <= MAX_BLOCK_SIZE:
        raise FormatError(f"Invalid VHDX block size {block_size}")
    if size > MAX_SIZE or size % metadata.logical_sector_size:
        raise FormatError(f"Invalid VHDX disk size {size:#x}")


def encode_metadata(metadata: Metadata) -> bytes:
    """The metadata region of a new image, up to the last item."""
    disk = _REQUIRED_ITEM | _VIRTUAL_DISK_ITEM
    flags = LEAVE_BLOCKS_ALLOCATED if metadata.leave_blocks_allocated else 0
    parameters = metadata.block_size | flags << 32
    items = (
        (_FILE_PARAMETERS, parameters.to_bytes(8, "little"), _REQUIRED_ITEM),
        (_DISK_SIZE, metadata.size.to_bytes(8, "little"), disk),
        (_DISK_ID, metadata.disk_id, disk),
        (_LOGICAL_SECTOR, metadata.logical_sector_size.to_bytes(4, "little"), disk),
        (_PHYSICAL_SECTOR, metadata.physical_sector_size.to_bytes(4, "little"), disk),
    )
    head = _MetadataHead(b"metadata", 0, len(items), b"").pack()
    body = b""
    for item, value, item_flags in items:
        place = METADATA_TABLE_SIZE + len(body)
        head += _MetadataEntry(item, place, len(value), item_flags, 0).pack()
        body += value
    return head.ljust(METADATA_TABLE_SIZE, b"\0") + body


def default_block_size(size: int) -> int:
    """What QEMU takes where nobody chose."""
    if size > 32 * TIB:
        return 64 * MIB
    if size > 100 << 30:
        return 32 * MIB
    return 16 * MIB if size > 1 << 30 else 8 * MIB


def table_length(metadata: Metadata) -> int:
    """Bytes of the block allocation table's region."""
    return max(ALIGNMENT, align_up(8 * metadata.table_words, ALIGNMENT))


def word_state(word: int) -> int:
    """What a table word says of its block."""
    return word & _STATE_MASK


def word_offset(word: int) -> int:
    """Where the block is in the file."""
    return word >> 20 << 20


def word_problem(word: int) -> str | None:
    """Why a word cannot be followed, or None."""
    if word & _RESERVED_MASK:
        return f"reserved bits {word & _RESERVED_MASK:#x} are set"
    if word_state(word) not in READS_ZERO and word_state(word) != STATE_FULLY_PRESENT:
        return f"state {word_state(word)} does not belong in an image without parent"
    return None


def make_word(state: int, host_offset: int = 0) -> int:
    """A table word."""
    return state | host_offset
