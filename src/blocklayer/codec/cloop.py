"""Compressed loop devices (cloop, version 2): the header; the offsets of all blocks follow it.

Public:
    decode_header(data) -> Header   judged: every field that is used is safe to use
    HEADER_OFFSET, MAGIC

1. Block ``n`` lies between offsets ``n`` and ``n + 1``, as a zlib stream.
"""

from __future__ import annotations

from typing import Final

from blocklayer.errors import FormatError
from blocklayer.record import U32, Record
from blocklayer.units import MIB, SECTOR

MAGIC: Final = b"#!/bin/sh\n#V2.0 Format\n"
HEADER_OFFSET: Final = 128
_MAX_BLOCK_SIZE: Final = 64 * MIB
_MAX_BLOCKS: Final = (512 * MIB) // 8 - 1


class Header(Record, byte_order=">"):
    """What follows the shell script that the file begins with."""

    block_size: U32
    blocks: U32

    @property
    def size(self) -> int:
        """The disk's size."""
        return self.block_size * self.blocks

    @property
    def table_offset(self) -> int:
        """Where the table of offsets begins; it has ``blocks + 1`` entries."""
        return HEADER_OFFSET + Header.SIZE


def decode_header(data: bytes) -> Header:
    """The header in ``data``, a file's first bytes. Raises FormatError."""
    if not data.startswith(MAGIC):
        raise FormatError("Image not in cloop format")
    header = Header.unpack(data, HEADER_OFFSET)
    if not header.block_size or header.block_size % SECTOR:
        raise FormatError(f"block_size {header.block_size} must be a multiple of {SECTOR}")
    if header.block_size > _MAX_BLOCK_SIZE:
        raise FormatError(f"block_size {header.block_size} must be {_MAX_BLOCK_SIZE} or less")
    if header.blocks > _MAX_BLOCKS:
        raise FormatError("image requires too many offsets, try increasing block size")
    return header
