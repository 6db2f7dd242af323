"""The one order in which metadata reaches the file.

    A  refcount blocks │ then table entries of new blocks
    B  L2 slices
    C  L1 sectors
    D  references that nothing on file has any more are dropped (in memory: the next A writes that)

"│" and the step from one letter to the next, where there is something on both sides, is a barrier.
The barrier before B also makes guest data durable before an entry points at it, so that what was
not flushed reads as old or new after a crash, never as what the space held before.

1. A step that fails leaves what it did not write dirty: the next flush does it again.
2. With lazy refcounts, A is only: the dirty bit is on stable storage. The counts follow at close.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image


async def flush(image: Image) -> None:
    """All that was acknowledged is on stable storage. Needs the image's lock."""
    image.node.check_writable()
    if image.slices.dirty or image.l1_dirty:
        await write_mapping(image)
        if image.l1_dirty:
            await image.barrier()
            await image.write_l1()
        await image.barrier()
    else:
        if not image.settings.lazy_refcounts:
            await write_refcounts(image)
        await image.data_barrier()
    image.frees.settled()
    await image.frees.apply()


async def write_mapping(image: Image) -> None:
    """A and B."""
    if not image.settings.lazy_refcounts:
        await write_refcounts(image)
    elif image.refcounts.dirty:
        await image.set_dirty(True)
    # Guest data, new L2 tables and what A wrote come before the entries that point at them.
    await image.data_barrier()
    await image.slices.write()


async def write_refcounts(image: Image) -> None:
    """A, without the barrier that follows."""
    refcounts = image.refcounts
    await refcounts.write_blocks()
    if refcounts.table_dirty:
        await image.barrier()
        await refcounts.write_table()


async def settle(image: Image) -> None:
    """Everything, with the refcounts that were left out, all of it durable."""
    await flush(image)
    await _settle_refcounts(image)


async def write_all(image: Image) -> None:
    """For a close: like ``settle``, and nothing that was given up is kept."""
    await flush(image)
    # Nobody is left who could use what was given up.
    await image.frees.apply(force=True)
    await _settle_refcounts(image)
    if image.trim:
        await _trim(image)


async def _settle_refcounts(image: Image) -> None:
    if image.refcounts.dirty:
        await write_refcounts(image)
    await image.barrier()


async def _trim(image: Image) -> None:
    """Cut the file to what is in use."""
    await image.refcounts.drop_empty_blocks()
    await image.refcounts.write_table()
    await image.barrier()
    end = await image.refcounts.end_of_use()
    if end < image.storage.size:
        await image.storage.truncate(end)
    if image.geometry.data_file:
        await _trim_data_file(image)
    image.trim = False


async def _trim_data_file(image: Image) -> None:
    """Cut what requests may have written past a new end, and free what an emptied layer held."""
    if image.data.size > image.header.size:
        await image.data.truncate(image.header.size)
    if not any(image.l1) and not image.data_file_raw:
        await image.data.free(0, image.header.size)
