"""Resolving: which layer holds a run of guest bytes, and where in which file it is.

1. ``locate`` follows DATA down to a protocol node and UNALLOCATED down the backing chain, in a
   loop. It never asks a protocol node about holes: a read of a hole gives zeros anyway.
2. What it found is kept per node until the node's ``generation`` moves, so that reading on through
   a deep chain costs what reading through one layer costs. Dropping it changes nothing but speed.
3. A layer that has nothing in a range is not asked again within it: see ``Node.gap``.
4. ``status`` also asks protocol nodes for holes where the driver says that they know better.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator

from blocklayer.graph.driver import FormatDriver, ProtocolDriver
from blocklayer.graph.extent import Extent, Kind, Run
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Node
from blocklayer.units import GIB

_LOOKAHEAD = GIB
_MAX_RUNS = 4096


def _start(run: Run) -> int:
    return run.offset


def cached(node: Node, offset: int) -> Run | None:
    """The kept run that covers ``offset``, if it is still true."""
    if node.runs_generation != node.generation:
        node.runs.clear()
        node.runs_generation = node.generation
        return None
    runs = node.runs
    position = bisect_right(runs, offset, key=_start) - 1
    if position >= 0 and runs[position].end > offset:
        return runs[position]
    return None


async def locate(node: Node, offset: int, length: int) -> Run:
    """The run that covers ``offset``; it may begin before it and end after ``length``."""
    run = cached(node, offset)
    if run is None:
        generation = node.generation
        run = await _walk(node, offset, max(length, min(_LOOKAHEAD, node.size - offset)))
        if generation == node.generation == node.runs_generation:
            _keep(node.runs, run)
    return run


def _keep(runs: list[Run], run: Run) -> None:
    if len(runs) >= _MAX_RUNS:
        runs.clear()
    position = bisect_right(runs, run.offset, key=_start)
    runs.insert(position, run)


async def _walk(node: Node, offset: int, length: int, holes: bool = False) -> Run:
    """Follow ``offset`` from ``node`` down to where its bytes end."""
    layer, depth, reach = node, 0, offset + length
    while True:
        if isinstance(layer.driver, FilterDriver) and (
            layer.driver.shows_child if holes else not layer.driver.sees_reads
        ):
            # It shows what is below as it is: no layer of its own.
            layer = layer.driver.child
            continue
        if not holes and isinstance(layer.driver, ProtocolDriver):
            # Its holes fill by writes that change no mapping: they must not be kept.
            length = min(length, layer.size - offset)
            return Run(offset, length, Kind.DATA, layer, depth, layer, offset)
        generation, start, end, below = layer.gap
        if generation != layer.generation or not start <= offset < end:
            generation = layer.generation
            # Asked as far as the request goes, not as the layers above let it show: what a layer
            # lacks is then known for the next runs too.
            extent = await layer.driver.map(offset, reach - offset)
            length = min(length, extent.length)
            if extent.kind is not Kind.UNALLOCATED:
                return await _settle(layer, depth, extent, offset, length, holes)
            lower = layer.backing
            if lower is None or offset >= lower.size:
                return _nothing(layer, depth, extent, length)
            below, end = lower, min(offset + extent.length, lower.size)
            # It need not be asked again for each run of the layers below.
            layer.gap = (generation, offset, end, below)
        length = min(length, end - offset)
        layer, depth, reach = below, depth + 1, min(reach, below.size)


def _nothing(layer: Node, depth: int, extent: Extent, length: int) -> Run:
    """The run where no layer has anything; the lowest may have reserved space all the same."""
    home = extent.child.node if extent.child is not None else None
    return Run(
        extent.offset, length, Kind.ZERO, layer, depth, home, extent.host_offset, present=False
    )


async def _settle(
    layer: Node, depth: int, extent: Extent, offset: int, length: int, holes: bool
) -> Run:
    """The run for an extent that ``layer`` of the chain holds: follow DATA to its storage."""
    kind, place = extent.kind, extent.host_offset
    if kind is Kind.OPAQUE:
        return Run(offset, length, kind, layer, depth, layer, offset, extent.compressed)
    storage = extent.child.node if extent.child else layer
    if kind is not Kind.DATA or place is None or extent.child is None:
        home = None if place is None else storage
        return Run(offset, length, kind, layer, depth, home, place)
    assert isinstance(layer.driver, FormatDriver)
    holes = holes and extent.recurse and await layer.driver.storage_has_holes()
    if isinstance(storage.driver, ProtocolDriver):
        if holes and place >= storage.size:
            kind = Kind.ZERO
        elif holes:
            below = await storage.driver.map(place, min(length, storage.size - place))
            kind, length = below.kind, min(length, below.length)
        inner = Run(place, length, kind, storage, 0, storage, place)
    elif place >= storage.size:
        inner = Run(place, length, Kind.ZERO, storage, 0)
    else:
        length = min(length, storage.size - place)
        inner = await _walk(storage, place, length, holes)
    # A driver that moves nothing shows its child as it is; elsewhere a hole is mapped all the same.
    hole = inner.kind is Kind.ZERO and layer.driver.relocates
    return Run(
        offset, min(length, inner.length), inner.kind, layer, depth, inner.storage,
        inner.host_offset, extent.compressed, hole=hole,
    )  # fmt: skip


async def status(node: Node, offset: int, length: int) -> Run:
    """Like ``locate``, but never longer than asked, and with holes of the storage told apart."""
    if isinstance(node.driver, FormatDriver | FilterDriver):
        return await _walk(node, offset, length, holes=True)
    extent = await node.driver.map(offset, length)
    kind = extent.kind
    return Run(offset, min(length, extent.length), kind, node, 0, node, extent.host_offset)


async def runs(node: Node, offset: int, length: int) -> AsyncIterator[Run]:
    """All runs of ``[offset, offset + length)``, one after the other, as ``status`` sees them."""
    end = offset + length
    while offset < end:
        run = await status(node, offset, end - offset)
        yield run
        offset = run.end
