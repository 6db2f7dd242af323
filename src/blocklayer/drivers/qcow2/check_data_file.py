"""What ``check`` looks at in an image with a data file: entries without refcounts behind them.

Public:
    count_table(image, data, l1_index)     one L2 table: statistics, and what is wrong with it
    flagged(entry) -> int                  an entry, not compressed, with the copied flag right
    note_end(image, data_size)             says so if the data file ends before the data

1. A cluster that has a place lies at its guest offset, aligned, not compressed, and has the flag.
2. Only flags are repaired (``check_copied``): where a misplaced cluster's data are nobody knows.
"""

from __future__ import annotations

from array import array

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    misplaced,
)
from blocklayer.codec.qcow2.subclusters import ALLOCATED, bitmap_problem, load_l2_table
from blocklayer.drivers.qcow2.check_bitmaps import contradiction
from blocklayer.drivers.qcow2.check_image import CheckedImage


def count_table(image: CheckedImage, data: bytes, l1_index: int) -> None:
    """Look at the L2 table ``data`` of ``l1_index``."""
    geometry, result = image.geometry, image.result
    table, bitmaps = load_l2_table(data, geometry)
    start = geometry.join(l1_index, 0)
    first = COPIED | start
    step = geometry.cluster_size
    full = bitmaps is None or bitmaps.count(ALLOCATED) == len(bitmaps)
    in_place = full and table[0] == first
    if in_place and table == array("Q", range(first, first + len(table) * step, step)):
        result.allocated_clusters += len(table)
        image.data_end = max(image.data_end, start + len(table) * step)
        return
    expected = 0
    bits = geometry.subcluster_bits
    for index, entry in enumerate(table):
        bitmap = bitmaps[index] if bitmaps is not None else 0
        if not (entry or bitmap) or (bitmaps is None and entry == ZERO):
            continue
        _judge(image, entry, bitmap, start + index * step, index)
        host = entry & OFFSET_MASK
        if entry & COMPRESSED or not entry & geometry.held_mask:
            continue
        result.allocated_clusters += 1
        result.fragmented_clusters += expected not in (0, host)
        expected = host + step
        if bitmaps is not None:
            units = (bitmap & ALLOCATED).bit_length()
        else:
            units = 0 if entry & ZERO else 1
        if units:
            image.data_end = max(image.data_end, start + index * step + (units << bits))


def _judge(image: CheckedImage, entry: int, bitmap: int, guest_offset: int, index: int) -> None:
    if entry & COMPRESSED:
        image.corruption(f" compressed cluster {index} with data file, entry={entry:#x}")
        return
    host = entry & OFFSET_MASK
    if entry & (L2_RESERVED | (ZERO if image.geometry.extended_l2 else 0)):
        image.corruption(f" found l2 entry with reserved bits set: {entry:x}")
    if bitmap_problem(entry, bitmap, image.geometry):
        image.corruption(contradiction(entry, image.geometry))
    if host & image.geometry.cluster_mask:
        kind = "Preallocated" if entry & ZERO else "Data"
        image.corruption(
            f" offset={host:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
        )
    elif misplaced(entry, guest_offset):
        image.corruption(
            f" offset={host:x}: Data cluster is not at its guest offset {guest_offset:x} in the "
            "data file; L2 entry corrupted."
        )
    if flagged(entry) != entry:
        image.flags_suspect = True


def flagged(entry: int) -> int:
    """The entry as it should be: every cluster with a place has the copied flag."""
    return entry | COPIED if entry & OFFSET_MASK else entry


def note_end(image: CheckedImage, data_size: int) -> None:
    """Tell the user if clusters lie past the end of the data file: they read as zeros."""
    needed = min(image.data_end, image.header.size)
    if needed > data_size:
        image.note(
            f"WARNING the data file has {data_size} bytes, but the image has data up to {needed}: "
            "what is past its end reads as zeros"
        )
