"""One cluster compressed or decompressed, as deflate or zstd; bytes to bytes, in any thread.

1. Decompressing never gives more than one cluster, whatever the data says, and less is an error.
2. The same data at the same level always gives the same bytes.
3. Deflate levels 1 to 3 are ISA-L's, 4 to 9 zlib's: the one is ten times as fast, the other packs
   a tenth tighter.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, Final

from blocklayer.errors import UsageError
from blocklayer.graph.driver import Buffer
from blocklayer.units import MIB

_WINDOW_BITS: Final = 12
_ISAL_LEVEL_MAX: Final = 3
_LEVELS: Final = {"zlib": (1, 9), "zstd": (1, 19)}
"""The lowest level, which is the default, and the highest."""
_ZSTD_WINDOW_MAX: Final = 8 * MIB
"""What every decoder is to support; an image cannot make us set more memory aside."""


def packing_level(compression_type: str, level: int | None) -> int:
    """``level`` if the compression has it, or its default. Raises UsageError."""
    least, most = _LEVELS[compression_type]
    if level is None:
        return least
    if not least <= level <= most:
        raise UsageError(
            f"Compression level {level} is not offered for {compression_type}: use {least} (the "
            f"fastest) to {most}"
        )
    return level


def pack_cluster(data: Buffer, size: int, *, zstd: bool, level: int) -> bytes | None:
    """A cluster of ``size`` bytes (``data``, then zeros) compressed; None if that gains nothing."""
    if len(data) < size:
        data = bytes(data) + bytes(size - len(data))
    packed = _pack_zstd(data, level) if zstd else _pack_deflate(data, level)
    return packed if len(packed) < size else None


def unpack_cluster(packed: Buffer, size: int, *, zstd: bool) -> bytes:
    """The ``size`` bytes of a cluster. Raises ValueError."""
    return _unpack_zstd(packed, size) if zstd else _unpack_deflate(packed, size)


def _pack_deflate(data: Buffer, level: int) -> bytes:
    if level > _ISAL_LEVEL_MAX:
        import zlib

        packer = zlib.compressobj(level, zlib.DEFLATED, -_WINDOW_BITS)
        return packer.compress(data) + packer.flush()
    from isal import igzip_lib

    return igzip_lib.compress(
        data, level, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_EXTRA_LARGE, _WINDOW_BITS
    )


def _unpack_deflate(packed: Buffer, size: int) -> bytes:
    from isal import isal_zlib
    from isal.igzip_lib import IsalError

    # Readers of other makers' images: take any window that deflate can have.
    unpacker = isal_zlib.decompressobj(-isal_zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(packed, size)
    except IsalError as error:  # type: ignore[misc]  # its stub says that it is no class
        raise ValueError(str(error)) from None
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, not {size}")
    return data


class _Zstd(threading.local):
    """What zstd needs to work in one thread; making it anew costs as much as a cluster."""

    def __init__(self) -> None:
        import zstandard

        self.packers: dict[int, Any] = {}
        self.unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)


@functools.cache
def _zstd() -> _Zstd:
    return _Zstd()


def _pack_zstd(data: Buffer, level: int) -> bytes:
    packers = _zstd().packers
    if level not in packers:
        import zstandard

        packers[level] = zstandard.ZstdCompressor(level=level)
    packed: bytes = packers[level].compress(data)
    return packed


def _unpack_zstd(packed: Buffer, size: int) -> bytes:
    import zstandard

    unpacker = _zstd().unpacker
    try:
        told = zstandard.frame_content_size(packed)
        if told > size:
            raise ValueError(f"it holds {told} bytes, not {size}")
        if told == size:
            data = unpacker.decompress(packed)
        else:
            # Several frames, or one that does not tell: take what fits, whatever else there is.
            with unpacker.stream_reader(packed, read_across_frames=True) as reader:
                data = reader.read(size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(data) != size:
        raise ValueError(f"it holds {len(data)} bytes, not {size}")
    return data
