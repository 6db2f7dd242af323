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
    load_table,
    misplaced,
)
from blocklayer.drivers.qcow2.check_image import CheckedImage


def count_table(image: CheckedImage, data: bytes, l1_index: int) -> None:
    """Look at the L2 table ``data`` of ``l1_index``."""
    geometry, result = image.geometry, image.result
    table = load_table(data)
    start = geometry.join(l1_index, 0)
    first = COPIED | start
    step = geometry.cluster_size
    if table[0] == first and table == array("Q", range(first, first + len(table) * step, step)):
        result.allocated_clusters += len(table)
        image.data_end = max(image.data_end, start + len(table) * step)
        return
    expected = 0
    for index, entry in enumerate(table):
        if not entry or entry == ZERO:
            continue
        _judge(image, entry, start + index * step, index)
        host = entry & OFFSET_MASK
        if entry & COMPRESSED or not (host or entry & COPIED):
            continue
        result.allocated_clusters += 1
        result.fragmented_clusters += expected not in (0, host)
        expected = host + step
        if not entry & ZERO:
            image.data_end = max(image.data_end, start + (index + 1) * step)


def _judge(image: CheckedImage, entry: int, guest_offset: int, index: int) -> None:
    if entry & COMPRESSED:
        image.corruption(f" compressed cluster {index} with data file, entry={entry:#x}")
        return
    host = entry & OFFSET_MASK
    if entry & L2_RESERVED:
        image.corruption(f" found l2 entry with reserved bits set: {entry:x}")
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
