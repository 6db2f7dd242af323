"""How large a qcow2 image would be, before it is made.

1. Counted are metadata for the whole disk, as small as they can be, and a cluster for every one
   that holds a byte of data. (Tables that had to move while they grew may add a little.)
2. What is measured may be larger than a file can be; nothing here depends on the size but numbers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2 import bitmaps
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.errors import UsageError
from blocklayer.graph.driver import BitmapShape, Measured, Measurement
from blocklayer.units import align_up

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.create import Qcow2CreateOptions

_DIRECTORY_ENTRY: Final = 24
"""Bytes of a bitmap's directory entry before its name."""


async def measure(options: Qcow2CreateOptions, size: int, source: Measured | None) -> Measurement:
    """The size of a new image made with ``options``, filled from ``source``."""
    options.validate_units()
    if options.version < 3 and options.refcount_bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use compat=1.1 or greater)"
        )
    geometry = options.geometry
    whole = geometry.align_up(size)
    if whole > geometry.max_size:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    metadata = _metadata_size(geometry, whole, options.encryption_header_size)
    if options.preallocation in ("falloc", "full"):
        data = whole
    elif source is None:
        data = 0
    elif options.backing_file is not None:
        # What the new backing file holds is not known: perhaps nothing of this disk.
        data = whole
    else:
        data = await _clusters_with_data(source.data, geometry) << geometry.cluster_bits
    extra = None
    if source is not None and source.bitmaps is not None and options.version >= 3:
        extra = _bitmaps_size(source.bitmaps, size, geometry)
    return Measurement(
        bitmaps=extra, required=metadata + min(data, whole), fully_allocated=metadata + whole
    )


def _metadata_size(geometry: Geometry, size: int, crypto: int) -> int:
    """Bytes of the headers and all tables of a disk of ``size`` bytes that is fully allocated;
    ``crypto`` is what encryption adds.
    """
    l1_entries = geometry.l1_entries(size)
    known = 1 + l1_entries + geometry.cluster_count(l1_entries * 8) + geometry.cluster_count(crypto)
    blocks, tables = geometry.refcount_clusters(known + geometry.cluster_count(size))
    return (known + blocks + tables) << geometry.cluster_bits


async def _clusters_with_data(ranges: AsyncIterator[tuple[int, int]], geometry: Geometry) -> int:
    """How many clusters the ranges touch, which come in order."""
    bits = geometry.cluster_bits
    count = end = 0
    async for offset, length in ranges:
        first = max(offset >> bits, end)
        last = (offset + length - 1) >> bits
        if last >= first:
            count += last - first + 1
            end = last + 1
    return count


def _bitmaps_size(shapes: Sequence[BitmapShape], size: int, geometry: Geometry) -> int:
    """Bytes of the directory, the tables and all data of the bitmaps."""
    clusters = directory = 0
    for shape in shapes:
        needed = bitmaps.table_entries_needed(size, shape.granularity.bit_length() - 1, geometry)
        clusters += needed + geometry.cluster_count(needed * 8)
        directory += align_up(_DIRECTORY_ENTRY + len(shape.name.encode()), 8)
    return (clusters << geometry.cluster_bits) + geometry.align_up(directory)
