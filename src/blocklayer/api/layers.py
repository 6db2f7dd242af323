"""Who owns how much of a disk: typed results for pictures of its layers, and of its chain.

1. Every byte of the disk is counted once: for the layer that shows it, by how that layer has it, or
   as nobody's.
2. What a commit or a stream would move follows from the same counts: data and compressed data are
   read and written, zeros are only noted.
"""

from __future__ import annotations

import msgspec

from blocklayer.api.info import allocated_size
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.extent import Kind, Run
from blocklayer.graph.node import Node
from blocklayer.graph.resolve import runs

__all__ = ["Chain", "ChainLayer", "Held", "LayerMap", "LayerUse", "chain", "layer_map"]

DEFAULT_CELLS = 512


class Held(msgspec.Struct, kw_only=True):
    """Bytes of a disk that a layer has: as they are, compressed, or as zeros it knows of."""

    data: int = 0
    compressed: int = 0
    zero: int = 0

    @property
    def stored(self) -> int:
        """Guest bytes that take storage."""
        return self.data + self.compressed

    @property
    def total(self) -> int:
        """All together."""
        return self.data + self.compressed + self.zero


class LayerUse(msgspec.Struct, kw_only=True, rename="kebab"):
    """One layer, and what of the disk it shows; ``depth`` 0 is the active layer."""

    depth: int
    filename: str
    format: str
    shown: Held


class LayerMap(msgspec.Struct, kw_only=True, rename="kebab"):
    """A part of a disk, layer by layer.

    ``cells`` are parts of (nearly) equal size, in order; each has, by depth, what that layer shows
    in it. Cell ``i`` of ``n`` begins at ``offset + i * length // n``.
    """

    offset: int
    length: int
    layers: list[LayerUse]
    absent: int
    """Bytes that no layer has; they read as zeros."""
    cells: list[dict[int, Held]]


async def layer_map(
    node: Node, *, cells: int = DEFAULT_CELLS, offset: int = 0, length: int | None = None
) -> LayerMap:
    """Which layer shows what of ``[offset, offset + length)`` of ``node``, in ``cells`` parts."""
    end = node.size if length is None else min(node.size, offset + length)
    length = max(0, end - offset)
    count = max(1, min(cells, length))
    found = LayerMap(
        offset=offset,
        length=length,
        layers=[
            LayerUse(depth=depth, filename=layer.filename, format=layer.driver.NAME, shown=Held())
            for depth, layer in enumerate(node.chain())
        ],
        absent=0,
        cells=[{} for _ in range(count)],
    )
    async for run in runs(node, offset, length):
        if not run.present:
            found.absent += run.length
            continue
        _add(found.layers[run.depth].shown, run, run.length)
        _spread(found, run, count)
    return found


def _spread(found: LayerMap, run: Run, count: int) -> None:
    """Add a run to the cells that it meets."""
    start, end = run.offset - found.offset, run.end - found.offset
    index = start * count // found.length
    while start < end:
        stop = min(end, (index + 1) * found.length // count)
        if stop > start:
            _add(found.cells[index].setdefault(run.depth, Held()), run, stop - start)
            start = stop
        index += 1


def _add(held: Held, run: Run, length: int) -> None:
    if run.kind is Kind.ZERO:
        held.zero += length
    elif run.compressed:
        held.compressed += length
    else:
        held.data += length


class ChainLayer(LayerUse, kw_only=True, rename="kebab"):
    """One image of a chain. Sizes in bytes; None where there is nothing to tell."""

    virtual_size: int
    actual_size: int | None
    cluster_size: int | None
    backing_format: str | None
    """The format that the image has stored for the one below it."""
    dirty: bool
    encrypted: bool
    snapshots: int
    own: Held
    """What the layer has itself, whether layers above hide it or not."""
    commit_down: int | None
    """Bytes moved when this layer alone is committed into the one below."""
    commit_into: int | None
    """Bytes moved when all layers above are committed into this one."""
    stream_onto: int | None
    """Bytes moved when the active layer takes in those between it and this one."""

    @property
    def hidden(self) -> int:
        """Stored bytes that nobody sees through the active layer."""
        return self.own.stored - self.shown.stored


class Chain(msgspec.Struct, kw_only=True, rename="kebab"):
    """A disk's images, the active one first."""

    virtual_size: int
    layers: list[ChainLayer]
    absent: int
    stream_all: int
    """Bytes moved when the active layer takes in all others and stands alone."""


async def chain(node: Node) -> Chain:
    """Describe the chain of ``node``; reads the metadata of every layer, and no data."""
    found = await layer_map(node, cells=1)
    nodes = node.chain()
    stored = [layer.shown.stored for layer in found.layers]
    layers = []
    for depth, (layer, use) in enumerate(zip(nodes, found.layers, strict=True)):
        own = await _own(layer)
        info = layer.driver.info()
        driver = layer.driver
        reference = driver.backing_reference if isinstance(driver, FormatDriver) else None
        layers.append(
            ChainLayer(
                depth=depth,
                filename=use.filename,
                format=use.format,
                shown=use.shown,
                virtual_size=layer.size,
                actual_size=allocated_size(layer),
                cluster_size=(info.cluster_size or None) if info else None,
                backing_format=reference.format if reference else None,
                dirty=bool(info and info.dirty),
                encrypted=bool(info and info.encrypted),
                snapshots=len(info.snapshots) if info else 0,
                own=own,
                commit_down=own.stored if layer.backing is not None else None,
                commit_into=sum(stored[:depth]) if depth else None,
                stream_onto=sum(stored[1:depth]) if depth else None,
            )
        )
    return Chain(
        virtual_size=node.size, layers=layers, absent=found.absent, stream_all=sum(stored[1:])
    )


async def _own(layer: Node) -> Held:
    """What a layer has itself."""
    held = Held()
    if layer.backing is None:
        async for run in runs(layer, 0, layer.size):
            if run.present:
                _add(held, run, run.length)
        return held
    offset = 0
    while offset < layer.size:
        extent = await layer.driver.map(offset, layer.size - offset)
        if extent.kind is Kind.ZERO:
            held.zero += extent.length
        elif extent.compressed:
            held.compressed += extent.length
        elif extent.kind is not Kind.UNALLOCATED:
            held.data += extent.length
        offset += extent.length
    return held
