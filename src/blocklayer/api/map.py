"""Where a disk's bytes live, run by run: typed results for ``map``.

1. Entries follow one another without a gap and cover just what was asked for.
2. Neighbours that differ in nothing but their place are one entry.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from blocklayer.graph.extent import Kind, Run
from blocklayer.graph.node import Node
from blocklayer.graph.resolve import status


class MapEntry(msgspec.Struct, frozen=True, gc=False, rename="kebab", omit_defaults=True):
    """One run of guest bytes; ``start`` and ``length`` in bytes.

    ``depth`` counts layers from the top; ``present`` is False where no layer has anything. ``zero``
    with ``data`` is reserved space that reads as zeros. ``offset`` is the place in ``filename``,
    None for what is not stored there as it is read (compressed, or nothing at all).
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None = None
    filename: str | None = None

    @property
    def end(self) -> int:
        """The first offset after the entry."""
        return self.start + self.length


async def map_entries(node: Node, offset: int, length: int) -> AsyncIterator[MapEntry]:
    """The entries of ``[offset, offset + length)`` of ``node``, in order."""
    names: dict[Node, str] = {}
    end = offset + length
    held: Run | None = None
    start = offset
    while offset < end:
        run = await status(node, offset, end - offset)
        # Most neighbours differ in kind: that is looked at first, and here.
        if held is None:
            held = run
        elif run.kind is not held.kind or not _continues(held, run, offset - start):
            yield _entry(held, start, offset - start, names)
            held, start = run, offset
        offset += run.length
    if held is not None:
        yield _entry(held, start, offset - start, names)


def _continues(one: Run, other: Run, length: int) -> bool:
    """Whether ``other``, of the same kind, goes on where ``one``, by now ``length`` long, ends."""
    if (
        one.layer is not other.layer
        or one.present != other.present
        or one.hole != other.hole
        or one.compressed != other.compressed
        or one.storage is not other.storage
    ):
        return False
    if one.kind is Kind.OPAQUE or one.host_offset is None or other.host_offset is None:
        return one.kind is Kind.OPAQUE or one.host_offset == other.host_offset
    return one.host_offset + length == other.host_offset


def _entry(run: Run, start: int, length: int, names: dict[Node, str]) -> MapEntry:
    opaque = run.kind is Kind.OPAQUE
    name = None
    place = None if opaque else run.host_offset
    if place is not None and run.storage is not None:
        name = names.get(run.storage)
        if name is None:
            name = names[run.storage] = run.storage.filename
    zero = run.kind is Kind.ZERO
    data = not zero or run.hole
    return MapEntry(start, length, run.depth, run.present, zero, data, run.compressed, place, name)
