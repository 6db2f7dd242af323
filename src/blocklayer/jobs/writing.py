"""Writing segments to a target: places found or made on the loop, bytes moved in a thread.

1. ``place`` allocates whole units and never reads or writes guest data itself, but for what
   surrounds a unit that the segment covers in part.
2. What ``place`` allocated is invisible to readers until the caller commits it.
3. Where the new space or the target is known to read as zeros, zeros are not written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer, Driver, FormatDriver, ProtocolDriver, ThreadSafeIO
from blocklayer.graph.extent import Allocation, Kind
from blocklayer.graph.node import Node
from blocklayer.graph.resolve import runs
from blocklayer.jobs.plan import Chunk, Segment
from blocklayer.jobs.reading import located
from blocklayer.jobs.threads import Threads
from blocklayer.units import align_down, align_up

Ranges = list[tuple[int, int]]


class Store(msgspec.Struct, gc=False):
    """One write to one place in the target's storage."""

    node: Node
    host_offset: int
    view: memoryview
    offset: int
    """The guest offset, for messages."""
    at: int = -1
    """Where in the chunk's buffer ``view`` is, or -1."""
    seal: Callable[[Buffer], Buffer] | None = None
    """What must be done to ``view`` before it is stored (``Allocation.seal``)."""


class Writer:
    """Writes parts of a chunk, whose bytes are in ``buffer``, to ``node``."""

    def __init__(self, node: Node, buffer: memoryview, *, zeros_known: bool) -> None:
        self.node = node
        self.stores: list[Store] = []
        self.pending: list[Allocation] = []
        self._buffer = buffer
        self._zeros_known = zeros_known

    async def place(self, segment: Segment, start: int, end: int) -> None:
        """Find or make the places for ``[start, end)`` of ``segment``."""
        driver = self.node.driver
        if isinstance(driver, ProtocolDriver):
            self._add(self.node, start, segment, start, end)
            return
        if segment.packed:
            assert isinstance(driver, FormatDriver)
            await self._place_packed(driver, segment, start, end)
            return
        await self._place_plain(driver, segment, start, end)

    async def _place_packed(
        self, driver: FormatDriver, segment: Segment, start: int, end: int
    ) -> None:
        unit = driver.allocation_unit
        while start < end:
            parts: list[bytes] = []
            stop = start
            while stop < end and (packed := segment.packed.get(stop)) is not None:
                parts.append(packed)
                stop = min(stop + unit, end)
            if parts:
                await driver.write_packed(start, parts)
            else:
                stop = min(align_down(start, unit) + unit, end)
                await self._place_plain(driver, segment, start, stop)
            start = stop

    async def _place_plain(self, driver: Driver, segment: Segment, start: int, end: int) -> None:
        while start < end:
            extent = await driver.map(start, end - start)
            stop = start + min(extent.length, end - start)
            if not extent.writable:
                assert isinstance(driver, FormatDriver)
                stop = min(end, io.unit_end(driver, stop))
                allocation = await driver.allocate(start, stop - start)
                self.pending.append(allocation)
                stop = start + allocation.length
                await self._place_new(allocation, segment)
            elif extent.kind is Kind.OPAQUE or extent.child is None or extent.host_offset is None:
                await driver.write_opaque(start, self._view(segment, start, stop))
            else:
                wanted = segment.data if self._zeros_known else [(start, stop)]
                for first, last in clipped(wanted, start, stop):
                    place = extent.host_offset + (first - start)
                    self._add(extent.child.node, place, segment, first, last)
            start = stop

    async def _place_new(self, allocation: Allocation, segment: Segment) -> None:
        """Fill new space: the data, and around it what the guest reads there now."""
        if allocation.seal is not None:
            await self._place_sealed(allocation, segment)
            return
        child = allocation.child.node
        start, stop = allocation.offset, allocation.offset + allocation.length
        place = allocation.host_offset + allocation.head
        if allocation.head:
            await self._surround(
                allocation, start - allocation.head, allocation.head, -allocation.head
            )
        if allocation.tail:
            await self._surround(allocation, stop, allocation.tail, allocation.length)
        wanted = segment.data if allocation.reads_zero else [(start, stop)]
        for first, last in clipped(wanted, start, stop):
            self._add(child, place + (first - start), segment, first, last)

    async def _place_sealed(self, allocation: Allocation, segment: Segment) -> None:
        """Fill new space as a whole, since it is sealed as a whole."""
        start, stop = allocation.offset, allocation.offset + allocation.length
        whole = self._view(segment, start, stop)
        if allocation.head or allocation.tail:
            head = await io.read_around(self.node, start - allocation.head, allocation.head)
            tail = await io.read_around(self.node, stop, allocation.tail)
            whole = memoryview(b"".join((head, whole, tail)))
        self.stores.append(
            Store(allocation.child.node, allocation.host_offset, whole, start, seal=allocation.seal)
        )

    async def _surround(
        self, allocation: Allocation, offset: int, length: int, distance: int
    ) -> None:
        around = memoryview(await io.read_around(self.node, offset, length))
        if not (allocation.reads_zero and io.is_zero(around)):
            place = allocation.host_offset + allocation.head + distance
            self.stores.append(Store(allocation.child.node, place, around, offset))

    def _view(self, segment: Segment, start: int, end: int) -> memoryview:
        at = segment.at + (start - segment.offset)
        return self._buffer[at : at + (end - start)]

    def _add(self, node: Node, host_offset: int, segment: Segment, start: int, end: int) -> None:
        """Store ``[start, end)`` at ``host_offset``: with the store before, if it goes on there."""
        at = segment.at + (start - segment.offset)
        last = self.stores[-1] if self.stores else None
        if (
            last is not None
            and last.node is node
            and last.at >= 0
            and last.at + len(last.view) == at
            and last.host_offset + len(last.view) == host_offset
        ):
            last.view = self._buffer[last.at : at + (end - start)]
            return
        self.stores.append(Store(node, host_offset, self._view(segment, start, end), start, at))

    async def store_on_loop(self) -> list[tuple[ThreadSafeIO, Store]]:
        """Carry out the writes that only the loop can; the answer is what is left for a thread."""
        threaded: list[tuple[ThreadSafeIO, Store]] = []
        for store in self.stores:
            driver = store.node.driver
            direct = driver.thread_safe_io() if isinstance(driver, ProtocolDriver) else None
            if direct is not None:
                threaded.append((direct, store))
                continue
            try:
                await io.write_stored(store.node, store.host_offset, (store.view,))
            except BlockError as error:
                raise located("writing", store.offset, error, store.node.filename) from error
        return threaded


async def store_chunk(
    node: Node,
    chunk: Chunk,
    buffer: memoryview,
    storer: Threads,
    *,
    zeros_known: bool,
    look_for_zeros: bool = False,
    placed: Callable[[], None] = lambda: None,
) -> None:
    """Write ``chunk``, which was read into ``buffer``, to ``node``: allocate, store, commit.

    ``look_for_zeros``: what reads as zeros in ``node`` already is not made zero again, so that it
    stays unallocated. ``placed`` is called once all space is set aside: another chunk may take its
    turn.
    """
    node.check_writable()
    driver = node.driver
    unit = driver.allocation_unit if isinstance(driver, FormatDriver) else 1
    zeros = list(chunk.zeros)
    if not chunk.segments:
        placed()
    else:
        async with AsyncExitStack() as held:
            if isinstance(driver, FormatDriver) and driver.relocates:
                start, end = align_down(chunk.start, unit), align_up(chunk.end, unit)
                await held.enter_async_context(node.claims.claim(start, end))
            try:
                await _store_segments(
                    Writer(node, buffer, zeros_known=zeros_known), chunk, unit, storer, placed
                )
            finally:
                if node.watchers:
                    for segment in chunk.segments:
                        node.changed(segment.offset, segment.end - segment.offset)
        if not zeros_known:
            for segment in chunk.segments:
                zeros += gaps(segment, unit)
    for start, end in zeros:
        try:
            if look_for_zeros:
                await _zero_the_rest(node, start, end)
            else:
                await io.write_zeroes(node, start, end - start, unmap=True)
        except BlockError as error:
            raise located("writing", start, error) from error


async def _zero_the_rest(node: Node, start: int, end: int) -> None:
    async for run in runs(node, start, end - start):
        if run.kind is not Kind.ZERO:
            await io.write_zeroes(node, run.offset, run.length, unmap=True)


async def _store_segments(
    writer: Writer, chunk: Chunk, unit: int, storer: Threads, placed: Callable[[], None]
) -> None:
    driver = writer.node.driver
    try:
        for segment in chunk.segments:
            for start, end in spans(segment, unit):
                try:
                    await writer.place(segment, start, end)
                except (BlockError, OSError) as error:
                    raise located("writing", start, error) from error
        placed()
        if any(store.seal is not None for store in writer.stores):
            await storer.run(seal_all, writer.stores)
        stores = await writer.store_on_loop()
        if stores:
            try:
                await storer.run(store_all, stores)
            finally:
                tell_watchers(stores)
        if isinstance(driver, FormatDriver):
            while writer.pending:
                await driver.commit(writer.pending[0])
                del writer.pending[0]
    except BaseException:
        if isinstance(driver, FormatDriver):
            for allocation in writer.pending:
                await driver.abort(allocation)
        raise


def seal_all(stores: Sequence[Store]) -> None:
    """In a thread: make of what is to be stored what the storage must hold."""
    for store in stores:
        if store.seal is not None:
            store.view = memoryview(store.seal(store.view))


def tell_watchers(stores: Sequence[tuple[ThreadSafeIO, Store]]) -> None:
    """A thread has carried out the writes, or failed to: whoever watches the nodes must know."""
    for _, store in stores:
        if store.node.watchers:
            store.node.changed(store.host_offset, len(store.view))


def store_all(stores: Sequence[tuple[ThreadSafeIO, Store]]) -> None:
    """In a thread: carry out the writes."""
    for storage, store in stores:
        try:
            storage.write(store.host_offset, store.view)
        except (BlockError, OSError) as error:
            raise located("writing", store.offset, error, store.node.filename) from error


def spans(segment: Segment, unit: int) -> Ranges:
    """The data of ``segment``, rounded out to whole units as far as the segment goes."""
    found: Ranges = []
    for start, end in segment.data:
        start = max(align_down(start, unit), segment.offset)
        end = min(align_up(end, unit), segment.end)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def gaps(segment: Segment, unit: int) -> Ranges:
    """What of ``segment`` lies outside its ``spans``: zeros."""
    found, at = [], segment.offset
    for start, end in spans(segment, unit):
        if at < start:
            found.append((at, start))
        at = end
    if at < segment.end:
        found.append((at, segment.end))
    return found


def clipped(ranges: Ranges, start: int, end: int) -> Ranges:
    """The parts of ``ranges`` within ``[start, end)``."""
    return [
        (max(first, start), min(last, end))
        for first, last in ranges
        if first < end and last > start
    ]
