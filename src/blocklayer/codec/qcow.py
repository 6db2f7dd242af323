"""qcow, version 1: the header, and what entries of its tables mean.

Public:
    Header                          the first 48 bytes; `unpack`, `pack`
    decode_header(data, file_size) -> Header   judged: every field that is used is safe to use
    new_header(size, backing) -> Header
    encode_compressed, decode_compressed       L2 entries of compressed clusters
    COMPRESSED, CRYPT_NONE, CRYPT_AES

1. The L1 table has an entry for every ``table_span`` bytes of the disk, and lies within the file.
2. A compressed cluster's entry names its first byte and its exact length, which is less than a
   cluster's.
"""

from __future__ import annotations

from typing import Final

from blocklayer.errors import FormatError
from blocklayer.record import U8, U16, U32, U64, Record
from blocklayer.units import SECTOR, align_up, div_up

MAGIC: Final = b"QFI\xfb"
_MAGIC: Final = int.from_bytes(MAGIC, "big")
VERSION: Final = 1
CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
COMPRESSED: Final = 1 << 63
MAX_NAME_SIZE: Final = 1023
_MAX_L1_ENTRIES: Final = (1 << 31) // 8 - 1


class Header(Record, byte_order=">"):
    """The start of the file. Names are those of QEMU's documentation for version 2."""

    magic: U32
    version: U32
    backing_file_offset: U64
    backing_file_size: U32
    mtime: U32
    size: U64
    cluster_bits: U8
    l2_bits: U8
    padding: U16
    crypt_method: U32
    l1_table_offset: U64

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return 1 << self.l2_bits

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table."""
        return div_up(self.size, 1 << (self.cluster_bits + self.l2_bits))

    @property
    def l1_end(self) -> int:
        """Where the L1 table ends in the file."""
        return self.l1_table_offset + 8 * self.l1_entries


def decode_header(data: bytes, file_size: int) -> Header:
    """The header at the start of ``data``. Raises FormatError."""
    header = Header.unpack(data)
    if header.magic != _MAGIC:
        raise FormatError("Image not in qcow format")
    if header.version != VERSION:
        raise FormatError(f"qcow (v{header.version}) does not support qcow version {VERSION}")
    problem = _problem(header, file_size)
    if problem is not None:
        raise FormatError(problem)
    return header


def _problem(header: Header, file_size: int) -> str | None:
    if header.size <= 1:
        return "Image size is too small (must be at least 2 bytes)"
    if not 9 <= header.cluster_bits <= 16:
        return "Cluster size must be between 512 and 64k"
    if not 6 <= header.l2_bits <= 13:
        return "L2 table size must be between 512 and 64k"
    if header.crypt_method > CRYPT_AES:
        return "invalid encryption method in qcow header"
    if header.l1_entries > _MAX_L1_ENTRIES:
        return "Image too large"
    if header.l1_table_offset < Header.SIZE or header.l1_end > file_size:
        return f"The L1 table at {header.l1_table_offset:#x} is past the end of the file"
    if header.backing_file_offset:
        if header.backing_file_size > MAX_NAME_SIZE:
            return "Backing file name too long"
        if header.backing_file_offset + header.backing_file_size > file_size:
            return f"The backing file name at {header.backing_file_offset:#x} is past the end"
    return None


def new_header(size: int, backing: bytes) -> Header:
    """The header of a new image; ``backing`` is its backing file's name, empty for none.

    With one, clusters are small: little of the backing file is copied with each first write.
    Raises FormatError when no table can describe the disk.
    """
    size = align_up(size, SECTOR)
    header = Header(
        magic=_MAGIC,
        version=VERSION,
        backing_file_offset=Header.SIZE if backing else 0,
        backing_file_size=len(backing),
        mtime=0,
        size=size,
        cluster_bits=9 if backing else 12,
        l2_bits=12 if backing else 9,
        padding=0,
        crypt_method=CRYPT_NONE,
        l1_table_offset=align_up(Header.SIZE + len(backing), 8),
    )
    problem = _problem(header, header.l1_end)
    if problem is not None:
        raise FormatError(problem)
    return header


def encode_compressed(offset: int, length: int, cluster_bits: int) -> int:
    """The L2 entry of ``length`` compressed bytes at ``offset``."""
    return COMPRESSED | length << (63 - cluster_bits) | offset


def decode_compressed(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Offset and length of the compressed bytes that ``entry`` names."""
    shift = 63 - cluster_bits
    return entry & ((1 << shift) - 1), entry >> shift & ((1 << cluster_bits) - 1)
