"""The one choke point: every byte that moves through the graph moves here.

1. Requests lie within the node's size; anything else fails before any effect.
2. A write reaches readers as a whole once it returned; what it did not touch of a cluster stays
   what it was. Data is in its place before ``commit`` shows it.
3. Requests that change the mapping of one allocation unit run one after the other (``Claims``); all
   others run side by side.
4. Zeros and discards that no driver can do quickly are written, or dropped, here, for every driver
   alike. A discard never makes old data of a lower layer visible: that is the drivers' duty.
5. An error reaches the caller of the request it happened in (R6).
6. Whoever watches a node hears of each change to it after it has ended, well or not, and before
   its caller does. A node without watchers pays one look.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from blocklayer.errors import StorageError, UnsupportedError, UsageError
from blocklayer.graph.driver import Buffer, FormatDriver, ProtocolDriver
from blocklayer.graph.extent import Allocation, Kind
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Node
from blocklayer.graph.registry import PROBE_SIZE
from blocklayer.graph.request import Claim
from blocklayer.graph.resolve import locate, status
from blocklayer.graph.waiting import offload
from blocklayer.units import MIB, align_down, align_up

_ZERO_CHUNK = 2 * MIB
_zeros = [bytes(64 * 1024)]
"""One block of zeros, replaced by a larger one when a request needs it."""


def zeros(length: int) -> memoryview:
    """``length`` zero bytes, shared: never write to them."""
    if length > _ZERO_CHUNK:
        # Not kept: one huge request would hold its size in memory for good.
        return memoryview(bytes(length))
    if len(_zeros[0]) < length:
        _zeros[0] = bytes(_ZERO_CHUNK)
    return memoryview(_zeros[0])[:length]


def is_zero(data: Buffer) -> bool:
    """Whether all bytes of ``data`` are zero."""
    view, block = memoryview(data), _zeros[0]
    if len(view) <= len(block):
        # bytes.startswith compares as memcmp does; comparing memoryviews goes byte by byte.
        return block.startswith(view)
    return all(is_zero(view[at : at + len(block)]) for at in range(0, len(view), len(block)))


def check_range(node: Node, offset: int, length: int) -> None:
    """Raise StorageError (EIO) unless the range lies within ``node``."""
    if offset < 0 or length < 0 or offset + length > node.size:
        raise StorageError(
            f"Request for {length:#x} bytes at {offset:#x} is outside '{node.filename}' "
            f"({node.size:#x} bytes)",
            errno.EIO,
        )


async def read(node: Node, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``."""
    check_range(node, offset, length)
    data = bytearray(length)
    await read_into(node, offset, memoryview(data))
    return bytes(data)


async def read_into(node: Node, offset: int, view: memoryview) -> None:
    """Fill ``view`` from ``offset``: each run from the first layer that has it."""
    driver = node.driver
    if node.graph.budget is not None:
        node.graph.budget.spend(len(view))
    if isinstance(driver, ProtocolDriver):
        await driver.read(offset, view)
        return
    done, total = 0, len(view)
    while done < total:
        at = offset + done
        run = await locate(node, at, total - done)
        length = min(run.end - at, total - done)
        piece = view[done : done + length]
        if run.kind is Kind.ZERO or run.storage is None or run.host_offset is None:
            piece[:] = zeros(length)
        elif run.kind is Kind.OPAQUE:
            await run.storage.driver.read_opaque(run.host_offset + (at - run.offset), piece)
        else:
            storage = run.storage.driver
            assert isinstance(storage, ProtocolDriver)
            await storage.read(run.host_offset + (at - run.offset), piece)
        done += length


async def write(node: Node, offset: int, data: Buffer) -> None:
    """Store ``data`` at ``offset``. Zeros are written as zeros if ``detect-zeroes`` says so."""
    view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
    check_range(node, offset, len(view))
    node.check_writable()
    detect = node.flags.detect_zeroes
    if detect != "off" and len(view) and is_zero(view):
        await write_zeroes(node, offset, len(view), unmap=detect == "unmap")
        return
    await _write(node, offset, view)


async def _write_first_sectors(node: Node, offset: int, view: memoryview) -> None:
    """Write, but refuse to make a disk that was guessed to be raw look like another format.

    A guest could otherwise plant a header that names any file of the host as its backing file, to
    be opened the next time somebody guesses the format.
    """
    # One at a time: a header may come in several writes, each harmless alone.
    async with node.claims.claim(0, PROBE_SIZE):
        head = bytearray(await read(node, 0, min(PROBE_SIZE, node.size)))
        room = len(head) - offset
        head[offset : offset + len(view)] = view[:room]
        if node.graph.registry.probe(bytes(head), node.filename) != "raw":
            raise StorageError(
                f"Writing an image header to sector 0 of '{node.filename}' is refused: its format "
                "was only guessed to be raw. Name the format ('raw') to allow it",
                errno.EPERM,
            )
        await write_runs(node, offset, view)


async def _write(node: Node, offset: int, view: memoryview) -> None:
    driver = node.driver
    try:
        if isinstance(driver, ProtocolDriver):
            await driver.write(offset, (view,))
        elif node.probed and offset < PROBE_SIZE and driver.NAME == "raw":
            await _write_first_sectors(node, offset, view)
        else:
            await write_runs(node, offset, view)
    finally:
        if node.watchers:
            node.changed(offset, len(view))


async def write_runs(node: Node, offset: int, view: memoryview) -> None:
    """Store ``view`` run by run, in new space where that is needed. The range was checked."""
    driver = node.driver
    done, total = 0, len(view)
    while done < total:
        at = offset + done
        extent = await driver.map(at, total - done)
        length = min(extent.length, total - done)
        if not extent.writable:
            assert isinstance(driver, FormatDriver)
            length = await _write_allocating(driver, at, view[done:])
        elif extent.kind is Kind.OPAQUE:
            await driver.write_opaque(at, view[done : done + length])
        else:
            assert extent.child is not None
            assert extent.host_offset is not None
            await _write(extent.child.node, extent.host_offset, view[done : done + length])
        done += length


async def _write_allocating(driver: FormatDriver, offset: int, view: memoryview) -> int:
    """Write the start of ``view`` to new space; the answer is how many bytes were written."""
    node = driver.node
    async with _claimed(node, offset, offset + len(view)):
        extent = await driver.map(offset, len(view))
        if extent.writable:
            # Somebody allocated it while we waited for the claim: take the plain way.
            return 0
        length = min(len(view), unit_end(driver, extent.offset + extent.length) - offset)
        allocation = await driver.allocate(offset, length)
        try:
            await _fill(node, allocation, view[: allocation.length])
            await driver.commit(allocation)
        except BaseException:
            await driver.abort(allocation)
            raise
        return allocation.length


def _claimed(node: Node, start: int, end: int) -> Claim:
    """A claim on all allocation units that ``[start, end)`` touches, to be entered."""
    driver = node.driver
    unit = driver.allocation_unit if isinstance(driver, FormatDriver) else 1
    return node.claims.claim(align_down(start, unit), align_up(end, unit))


def unit_end(driver: FormatDriver, offset: int) -> int:
    """Where the allocation unit ends that the byte before ``offset`` is in.

    An allocation goes on to there: one unit can have several extents, but is allocated once.
    """
    return align_up(offset, driver.allocation_unit)


async def _fill(node: Node, allocation: Allocation, view: memoryview) -> None:
    """Write ``view`` and, around it, what the guest reads there now, to the allocated space."""
    buffers: list[Buffer] = [view]
    place = allocation.host_offset
    start, end = allocation.offset, allocation.offset + allocation.length
    if allocation.head:
        head = await read_around(node, start - allocation.head, allocation.head)
        if allocation.reads_zero and is_zero(head):
            place += allocation.head
        else:
            buffers.insert(0, head)
    if allocation.tail:
        tail = await read_around(node, end, allocation.tail)
        if not (allocation.reads_zero and is_zero(tail)):
            buffers.append(tail)
    if allocation.seal is not None:
        buffers = [await offload(allocation.seal, b"".join(buffers))]
    await write_stored(allocation.child.node, place, buffers)


async def read_around(node: Node, offset: int, length: int) -> bytearray:
    """What the guest reads in ``[offset, offset + length)``, zeros past the end of the disk."""
    data = bytearray(length)
    within = max(0, min(length, node.size - offset))
    if within:
        await read_into(node, offset, memoryview(data)[:within])
    return data


async def write_stored(node: Node, offset: int, buffers: Sequence[Buffer]) -> None:
    """For a parent that stores things in ``node``: write ``buffers``, one after the other."""
    if not isinstance(node.driver, ProtocolDriver):
        await _write(node, offset, memoryview(b"".join(buffers)))
        return
    try:
        await node.driver.write(offset, buffers)
    finally:
        if node.watchers:
            node.changed(offset, sum(map(len, buffers)))


async def write_zeroes(
    node: Node, offset: int, length: int, *, unmap: bool = False, fallback: bool = True
) -> None:
    """Make the range read as zeros; ``unmap`` allows giving its space back.

    Without ``fallback``, raises UnsupportedError rather than writing zeros.
    """
    check_range(node, offset, length)
    node.check_writable()
    if not length:
        return
    unmap = unmap and node.flags.discard_unmap
    end = offset + length
    try:
        if isinstance(node.driver, FilterDriver):
            await node.driver.write_zeroes(offset, length, unmap=unmap, fallback=fallback)
            return
        start, stop = await _zero_units(node, offset, end, unmap, fallback)
        await _zero_by_writing(node, offset, start)
        await _zero_by_writing(node, stop, end)
    finally:
        if node.watchers:
            node.changed(offset, length)


async def _zero_units(
    node: Node, offset: int, end: int, unmap: bool, fallback: bool
) -> tuple[int, int]:
    """Let the driver zero all units it can; the answer is the part that reads as zeros now."""
    driver, unit = node.driver, node.driver.zero_alignment
    low, high = align_down(offset, unit), min(align_up(end, unit), node.size)
    # Claimed before it is looked at: a write that makes the rest of a unit non-zero waits.
    async with _claimed(node, low, high):
        start = low if await _is_spare(node, low, offset) else align_up(offset, unit)
        stop = high if await _is_spare(node, end, high) else align_down(end, unit)
        if not fallback and (start > offset or stop < end):
            raise UnsupportedError(
                f"'{node.filename}' cannot zero {end - offset:#x} bytes at {offset:#x} fast"
            )
        if start < stop:
            try:
                await driver.zero(start, stop - start, unmap=unmap)
                return start, stop
            except UnsupportedError:
                if not fallback:
                    raise
    return end, end


async def _is_spare(node: Node, offset: int, end: int) -> bool:
    """Whether the driver may zero these neighbours of a range as well: they read as zeros.

    Not where only the storage says so: those may be written to at this moment without a claim.
    """
    while offset < end:
        run = await status(node, offset, end - offset)
        if run.kind is not Kind.ZERO or run.hole:
            return False
        offset = run.end
    return True


async def _zero_by_writing(node: Node, offset: int, end: int) -> None:
    while offset < end:
        chunk = min(end - offset, _ZERO_CHUNK)
        await _write(node, offset, zeros(chunk))
        offset += chunk


async def discard(node: Node, offset: int, length: int) -> None:
    """The guest has no more use for the range: give its space back if ``discard=unmap``.

    Parts of clusters stay as they are. Never an error for want of support.
    """
    check_range(node, offset, length)
    node.check_writable()
    if not node.flags.discard_unmap:
        return
    driver, end = node.driver, offset + length
    unit = driver.discard_alignment
    start = align_up(offset, unit)
    stop = end if end == node.size else align_down(end, unit)
    if stop <= start:
        return
    try:
        if isinstance(driver, FormatDriver):
            async with _claimed(node, start, stop):
                await driver.discard(start, stop - start)
        elif isinstance(driver, FilterDriver):
            start, stop = offset, end
            await driver.discard(offset, length)
        else:
            await driver.discard(start, stop - start)
    except UnsupportedError:
        return
    finally:
        if node.watchers:
            node.changed(start, stop - start)


async def write_compressed(node: Node, offset: int, data: Buffer) -> None:
    """Store ``data`` compressed: whole clusters, or the tail of the image."""
    check_range(node, offset, len(data))
    node.check_writable()
    driver = node.driver
    if isinstance(driver, FilterDriver):
        try:
            await driver.write_compressed(offset, data)
        finally:
            if node.watchers:
                node.changed(offset, len(data))
        return
    if not isinstance(driver, FormatDriver):
        raise UnsupportedError(f"Driver '{driver.NAME}' does not support compressed writes")
    unit = driver.allocation_unit
    if offset % unit or (len(data) % unit and offset + len(data) != node.size):
        raise UsageError(
            f"Compressed writes to '{node.filename}' must cover whole clusters of {unit} bytes "
            f"({len(data):#x} bytes at {offset:#x})"
        )
    try:
        async with node.claims.claim(offset, offset + len(data)):
            await driver.write_compressed(offset, data)
    finally:
        if node.watchers:
            node.changed(offset, len(data))


async def flush(node: Node) -> None:
    """When it returns, all that was acknowledged before survives a crash (R3)."""
    if node.flags.no_flush and isinstance(node.driver, ProtocolDriver):
        return
    await node.driver.flush()


async def truncate(
    node: Node, size: int, *, preallocation: str = "off", shrink: bool = False
) -> None:
    """Change the node's size; a grown area reads as zeros, also over a longer backing file."""
    node.check_writable()
    for bitmap in node.dirty_bitmaps.values():
        bitmap.check_resize(size)
    async with node.claims.claim(0, max(size, node.size)):
        try:
            await node.driver.truncate(size, preallocation=preallocation, shrink=shrink)
        finally:
            node.resized()
    node.mapping_changed()
