"""Packed blocks of foreign formats made plain, bytes to bytes, in any thread.

1. Nothing gives more than ``size`` bytes, whatever the data says, and less is an error: ValueError.
"""

from __future__ import annotations

import importlib
from typing import Final, Protocol

from blocklayer.errors import UnsupportedError
from blocklayer.units import MIB

_LZMA_MEMORY_MAX: Final = 128 * MIB
_LZFSE_MATCH_MAX: Final = 2359 + 315
"""Bytes that one match of an LZFSE block can give, with the literals before it."""
_LZFSE_MEMORY_MAX: Final = 512 * MIB
_LZFSE_END: Final = b"bvx$"


class _Unpacker(Protocol):
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, not {size}")
    return data


def unpack_zlib(packed: bytes, size: int) -> bytes:
    """A zlib stream."""
    from isal import isal_zlib
    from isal.igzip_lib import IsalError

    try:
        return _whole(isal_zlib.decompressobj().decompress(packed, size), size)
    except IsalError as error:  # type: ignore[misc]  # its stub says that it is no class
        raise ValueError(str(error)) from None


def unpack_bzip2(packed: bytes, size: int) -> bytes:
    """A bzip2 stream."""
    import bz2

    try:
        return _whole(_run(bz2.BZ2Decompressor(), packed, size), size)
    except (OSError, EOFError) as error:
        raise ValueError(str(error)) from None


def unpack_lzma(packed: bytes, size: int) -> bytes:
    """An xz stream."""
    import lzma

    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_MAX)
        return _whole(_run(unpacker, packed, size), size)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(str(error)) from None


def _run(unpacker: _Unpacker, packed: bytes, size: int) -> bytes:
    return unpacker.decompress(packed, size)


def unpack_lzfse(packed: bytes, size: int) -> bytes:
    """LZFSE blocks; UnsupportedError where the package for them is missing."""
    try:
        lzfse = importlib.import_module("lzfse")
    except ImportError:
        raise UnsupportedError(
            "it is packed with LZFSE: install the package 'lzfse' to read it"
        ) from None
    _check_lzfse(packed, size)
    try:
        data: bytes = lzfse.decompress(packed)
    except lzfse.error as error:
        raise ValueError(str(error)) from None
    return _whole(data, size)


def _check_lzfse(packed: bytes, size: int) -> None:
    """Raise ValueError unless the blocks say that they give ``size`` bytes, and cannot give many
    more: the package takes as much room as they fill, whatever they say.
    """
    at = given = matches = 0
    while packed[at : at + 4] != _LZFSE_END:
        kind, said = packed[at : at + 4], int.from_bytes(packed[at + 4 : at + 8], "little")
        if kind == b"bvx-":
            at += 8 + said
        elif kind == b"bvxn":
            at += 12 + int.from_bytes(packed[at + 8 : at + 12], "little")
        elif kind == b"bvx2":
            block_size, count = _lzfse_block(packed[at : at + 32])
            at, matches = at + block_size, matches + count
        else:
            raise ValueError(f"an unknown block at {at:#x}")
        given += said
        if given > size or at > len(packed) or matches * _LZFSE_MATCH_MAX > _LZFSE_MEMORY_MAX:
            raise ValueError(f"it could give more than {size} bytes, or is cut off")


def _lzfse_block(header: bytes) -> tuple[int, int]:
    """Bytes and matches of the LZFSE block that begins so."""
    fields = [int.from_bytes(header[at : at + 8], "little") for at in (8, 16, 24)]
    literals, matches = fields[0] >> 20 & 0xFFFFF, fields[0] >> 40 & 0xFFFFF
    return (fields[2] & 0xFFFFFFFF) + literals + (fields[1] >> 40 & 0xFFFFF), matches
