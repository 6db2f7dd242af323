"""The translation cache: where a node's bytes are, so that most requests need not ask the graph.

A table from guest granules to places in files, filled by what the graph found (``learn``) after a
request that the table could not serve. Like an MMU's, it decides nothing: whatever is not in it, or
not allowed by it, takes the way through the graph.

1. An entry is true as long as the node's ``generation`` stands; then all are dropped. So is the
   table when the root leads to another node.
2. A write is served only where the graph would write the same bytes to the same place, and nothing
   else would happen: no guard on the first sectors, no zero detection, no write-through, every node
   on the way writable. What may change without a new generation is looked at each time. Whoever
   watches the node or its storage hears of the write, as ever.
3. Nothing is served while the root is drained, nor what its storage cannot do without waiting, nor
   while a device has limits; what is served for a device is counted as ever.
4. A request is served between two waits of the loop: nothing can change while it is.
5. ``MAX_GRANULES`` are known at most.
"""

from __future__ import annotations

import time
from array import array
from typing import Final

import msgspec

from blocklayer.errors import BlockError
from blocklayer.graph.driver import Buffer, FormatDriver, ProtocolDriver
from blocklayer.graph.extent import Kind
from blocklayer.graph.node import Node
from blocklayer.graph.registry import PROBE_SIZE
from blocklayer.graph.resolve import locate
from blocklayer.graph.root import Root
from blocklayer.units import KIB, MIB, align_up

MAX_GRANULES: Final = 16 * MIB
_LEAF: Final = 1024
"""Granules in one leaf of the table."""
_LEARNT: Final = 1024
"""Granules entered at once, where one run covers more than was asked for."""
_GRANULE: Final = 64 * KIB
_LEAST_GRANULE: Final = 4 * KIB
_PLACE_UNIT: Final = 512
_WRITABLE: Final = 1
_TARGET_SHIFT: Final = 1
_TARGETS: Final = 4095
_PLACE_SHIFT: Final = 13
# An entry: place in units of 512 bytes, number of the target, writable. Target 0: nothing known.


class _Target(msgspec.Struct, gc=False):
    """Where bytes are, and for writes the nodes that they pass on the way, the file's included."""

    driver: ProtocolDriver
    path: tuple[Node, ...] = ()


class Translation:
    """The table of one root."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._node: Node | None = None
        self._generation = -1
        self._seen = -1
        self._shift = _GRANULE.bit_length() - 1
        self._leaves: dict[int, array[int]] = {}
        self._targets: list[_Target | None] = [None]

    def read(self, offset: int, length: int) -> bytearray | None:
        """The bytes, or None: ask the graph."""
        front_end = self._root.front_end
        if front_end is None:
            return self._read(offset, length)
        if front_end.limited:
            return None
        began_ns = time.monotonic_ns()
        data = self._read(offset, length)
        if data is not None:
            front_end.done("rd", offset, length, began_ns, None)
        return data

    def _read(self, offset: int, length: int) -> bytearray | None:
        root = self._root
        node = root.node
        if node is not self._node or node.generation != self._generation or root.quiesced:
            return None
        shift = self._shift
        first = offset >> shift
        leaf = self._leaves.get(first // _LEAF)
        if leaf is None:
            return None
        entry = leaf[first % _LEAF]
        if entry <= 1 or not length:
            return None
        if (offset + length - 1) >> shift != first and not self._contiguous(
            first, (offset + length - 1) >> shift, entry
        ):
            return None
        target = self._targets[(entry >> _TARGET_SHIFT) & _TARGETS]
        assert target is not None
        place = (entry >> _PLACE_SHIFT) * _PLACE_UNIT + offset - (first << shift)
        data = bytearray(length)
        try:
            return data if target.driver.read_now(place, memoryview(data)) else None
        except BlockError:
            return None  # asked again through the graph, the error has its proper words

    def write(self, offset: int, data: Buffer) -> bool:
        """Store ``data``; False: nothing was done, ask the graph."""
        front_end = self._root.front_end
        if front_end is None:
            return self._write(offset, data)
        if front_end.limited:
            return False
        began_ns, length = time.monotonic_ns(), len(data)
        try:
            done = self._write(offset, data)
        except BlockError as error:
            if not front_end.done("wr", offset, length, began_ns, error):
                raise
            return True
        if done:
            front_end.done("wr", offset, length, began_ns, None)
        return done

    def _write(self, offset: int, data: Buffer) -> bool:
        root = self._root
        node = root.node
        if (
            node is not self._node
            or node.generation != self._generation
            or root.quiesced
            or root.write_through
        ):
            return False
        shift = self._shift
        first, last = offset >> shift, (offset + len(data) - 1) >> shift
        leaf = self._leaves.get(first // _LEAF)
        if leaf is None or not len(data):
            return False
        entry = leaf[first % _LEAF]
        if not entry & _WRITABLE or (first != last and not self._contiguous(first, last, entry)):
            return False
        target = self._targets[(entry >> _TARGET_SHIFT) & _TARGETS]
        assert target is not None
        watched = False
        for each in target.path:
            flags = each.flags
            if each.poisoned is not None or flags.read_only or flags.detect_zeroes != "off":
                return False
            if each.watchers:
                watched = True
        place = (entry >> _PLACE_SHIFT) * _PLACE_UNIT + offset - (first << shift)
        if watched:
            return self._write_watched(target, offset, place, data)
        return target.driver.write_now(place, data)

    def _write_watched(self, target: _Target, offset: int, place: int, data: Buffer) -> bool:
        """Write, and tell those who watch: of a write that failed half way, too."""
        path = target.path
        if any(each.watchers for each in path[1:-1]):
            # Their offsets are known to the graph only.
            return False
        done = True
        try:
            done = target.driver.write_now(place, data)
        finally:
            if done and path[-1].watchers:
                path[-1].changed(place, len(data))
            if done and len(path) > 1 and path[0].watchers:
                path[0].changed(offset, len(data))
        return done

    def _contiguous(self, first: int, last: int, entry: int) -> bool:
        """Whether the granules after ``first`` lie behind it, in the same place and as writable."""
        step = (1 << self._shift) // _PLACE_UNIT << _PLACE_SHIFT
        leaves = self._leaves
        for granule in range(first + 1, last + 1):
            entry += step
            leaf = leaves.get(granule // _LEAF)
            if leaf is None or leaf[granule % _LEAF] != entry:
                return False
        return True

    def is_settled(self) -> bool:
        """Whether ``learn`` is worth its time: no mapping has changed since this was last asked.

        While new space is allocated all the time, whatever is learnt is soon dropped again.
        """
        seen, self._seen = self._seen, self._root.node.generation
        return seen == self._seen

    async def learn(self, offset: int, length: int, *, writing: bool) -> None:
        """Enter what the graph knows of the range; within a request of the root."""
        root = self._root
        node = root.node
        if node is not self._node or node.generation != self._generation:
            self._reset(node)
        generation, end = node.generation, min(offset + length, node.size)
        # From the granule's start: else a run that is found from its middle on cannot enter it.
        offset -= offset % (1 << self._shift)
        while offset < end:
            found = await self._find(node, offset, end - offset, writing)
            if node.generation != generation or root.node is not node or found is None:
                return
            target, place, start, stop = found
            self._enter(target, place, start, stop, offset, end, writing)
            offset = stop

    async def _find(
        self, node: Node, offset: int, length: int, writing: bool
    ) -> tuple[_Target, int, int, int] | None:
        """(target, place of start, start, stop) of a run that covers ``offset``."""
        if writing:
            return await _find_writable(node, offset)
        run = await locate(node, offset, length)
        if run.kind is not Kind.DATA or run.storage is None or run.host_offset is None:
            return None
        storage = run.storage.driver
        assert isinstance(storage, ProtocolDriver)
        return _Target(storage), run.host_offset, run.offset, run.end

    def _reset(self, node: Node) -> None:
        self._node, self._generation = node, node.generation
        self._leaves.clear()
        self._targets = [None]
        sizes = [info.cluster_size for each in node.chain() if (info := each.driver.info())]
        granule = min([_GRANULE, *(size for size in sizes if size)])
        self._shift = max(granule, _LEAST_GRANULE).bit_length() - 1

    def _enter(
        self, target: _Target, place: int, start: int, stop: int, offset: int, end: int, write: bool
    ) -> None:
        """Enter the run's whole granules: those in [offset, end), and some that follow."""
        assert self._node is not None
        granule = 1 << self._shift
        stop = min(stop, self._node.size)
        low = max(align_up(start, granule), offset // granule * granule)
        high = min(stop, max(end, low + _LEARNT * granule)) // granule * granule
        number = self._number(target)
        if low >= high or (place + low - start) % _PLACE_UNIT or not number:
            return
        entry = ((place + low - start) // _PLACE_UNIT) << _PLACE_SHIFT
        entry |= number << _TARGET_SHIFT | (_WRITABLE if write else 0)
        step = granule // _PLACE_UNIT << _PLACE_SHIFT
        for index in range(low // granule, high // granule):
            leaf = self._leaves.get(index // _LEAF)
            if leaf is None:
                if len(self._leaves) >= MAX_GRANULES // _LEAF:
                    self._leaves.clear()
                leaf = self._leaves[index // _LEAF] = array("q", bytes(8 * _LEAF))
            if write or not leaf[index % _LEAF] & _WRITABLE:
                leaf[index % _LEAF] = entry
            entry += step

    def _number(self, target: _Target) -> int:
        """The number of ``target``; 0 if there are too many."""
        for number, known in enumerate(self._targets):
            if known is not None and (known.driver, known.path) == (target.driver, target.path):
                return number
        if len(self._targets) > _TARGETS:
            return 0
        self._targets.append(target)
        return len(self._targets) - 1


async def _find_writable(node: Node, offset: int) -> tuple[_Target, int, int, int] | None:
    """Follow writable data down from ``node`` to the storage, as a write would go."""
    start, length, at, path = offset, node.size - offset, offset, [node]
    layer = node
    if layer.probed:
        # The guard on the first sectors looks at what is written there.
        granule = align_up(PROBE_SIZE, _GRANULE)
        if offset < granule:
            return None
    while isinstance(layer.driver, FormatDriver):
        extent = await layer.driver.map(at, length)
        if (
            extent.kind is not Kind.DATA
            or not extent.writable
            or extent.child is None
            or extent.host_offset is None
        ):
            return None
        length = min(length, extent.length)
        layer, at = extent.child.node, extent.host_offset
        path.append(layer)
    if not isinstance(layer.driver, ProtocolDriver):
        return None
    return _Target(layer.driver, tuple(path)), at, start, start + length
