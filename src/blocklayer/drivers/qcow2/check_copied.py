"""The copied flags of the active tables: set exactly where the refcount is one.

Public:
    check_copied(image, stored, *, fix)

1. A flag that is set on a shared cluster makes the next write change a snapshot: an error. One that
   is missing only costs a copy, but QEMU calls that an error too.
2. A flag is written after the refcount that it depends on is on stable storage, and only into
   clusters that are L2 tables and nothing else.
"""

from __future__ import annotations

from typing import Final

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    load_table,
    store_table,
)
from blocklayer.codec.qcow2.subclusters import load_l2_table, store_l2_table
from blocklayer.drivers.qcow2.check_data_file import flagged
from blocklayer.drivers.qcow2.check_image import CheckedImage, StoredRefcounts
from blocklayer.drivers.qcow2.recount import WINDOW_BITS
from blocklayer.errors import BlockError

_L1_CHUNK: Final = 64 * 1024
_ZEROS: Final = bytes(512)


async def check_copied(image: CheckedImage, stored: StoredRefcounts, *, fix: bool) -> None:
    """Report, and with ``fix`` repair, every flag that contradicts the refcount."""
    header = image.header
    if fix:
        await image.storage.flush()
    for start in range(0, header.l1_size * 8, _L1_CHUNK):
        length = min(_L1_CHUNK, header.l1_size * 8 - start)
        offset = header.l1_table_offset + start
        l1 = load_table(await image.storage.read(offset, length))
        faults = 0
        for index, entry in enumerate(l1):
            table_offset = entry & OFFSET_MASK
            if not table_offset:
                continue
            right, refcount = await _flagged(image, stored, entry)
            if right is None:
                continue
            if right != entry:
                _report(
                    image,
                    f"OFLAG_COPIED L2 cluster: l1_index={start // 8 + index} "
                    f"l1_entry={entry:x} refcount={refcount}",
                    fix,
                )
                l1[index] = right
                faults += 1
            await _check_table(image, stored, table_offset, fix)
        if fix and faults:
            await image.write(offset, store_table(l1))


async def _check_table(
    image: CheckedImage, stored: StoredRefcounts, offset: int, fix: bool
) -> None:
    geometry = image.geometry
    size = geometry.l2_entry_size
    fix = fix and image.may_write_table(offset)
    data = await image.storage.read(offset, geometry.cluster_size)
    table, bitmaps = load_l2_table(data, geometry)
    pieces = range(0, len(data), len(_ZEROS))
    used = [at // size for at in pieces if data[at : at + len(_ZEROS)] != _ZEROS]
    window_bits, sound = geometry.cluster_bits + WINDOW_BITS, image.sound_windows
    if geometry.data_file:
        sound = set()
    faults = 0
    for index in (index for start in used for index in range(start, start + len(_ZEROS) // size)):
        entry = table[index]
        if (entry & OFFSET_MASK) >> window_bits in sound:
            continue
        if not entry & OFFSET_MASK or entry & COMPRESSED:
            continue
        right: int | None
        if geometry.data_file:
            # It has no refcounts, and nobody shares its clusters.
            right, refcount = flagged(entry), 1
        else:
            right, refcount = await _flagged(image, stored, entry)
        if right is not None and right != entry:
            _report(
                image, f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}", fix
            )
            table[index] = right
            faults += 1
    if fix and faults:
        await image.write(offset, store_l2_table(table, bitmaps))


async def _flagged(
    image: CheckedImage, stored: StoredRefcounts, entry: int
) -> tuple[int | None, int]:
    """The entry with the flag as it should be, or None, and the refcount, if it can be read."""
    try:
        refcount = await stored.get((entry & OFFSET_MASK) >> image.geometry.cluster_bits)
    except BlockError:
        return None, 0
    return (entry | COPIED if refcount == 1 else entry & ~COPIED), refcount


def _report(image: CheckedImage, what: str, fixed: bool) -> None:
    if fixed:
        image.note(f"Repairing {what}")
        image.result.corruptions_fixed += 1
    else:
        image.corruption(f" {what}")
