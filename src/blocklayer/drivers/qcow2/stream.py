"""Streams of qcow2 images: ``codec.qcow2.stream`` fed with a copy's data.

1. What is compressed is compressed twice: to learn the lengths that the tables before the data
   need, and again to give the bytes. That costs processor time, where keeping the bytes would cost
   as much room as the image, and it tells the stream's length before its first byte.
2. A cluster that is compressed to another length than planned ends the stream with an error.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterable, Iterator

from blocklayer.codec.qcow2.stream import Cursor, StreamPlan
from blocklayer.drivers.qcow2.create import Qcow2CreateOptions, new_header
from blocklayer.drivers.qcow2.layout import Layout
from blocklayer.drivers.qcow2.packing import pack_cluster, packing_level
from blocklayer.errors import StorageError, UnsupportedError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.io import zeros
from blocklayer.graph.streams import ImageStream, Packed, unstreamable
from blocklayer.units import align_up

_STREAMED = frozenset(
    (
        "size", "cluster_size", "compression_type", "compat", "backing_file", "backing_fmt",
        "lazy_refcounts", "refcount_bits",
    )
)  # fmt: skip


class Qcow2Stream(ImageStream):
    """An image made with ``options``, which are valid."""

    def __init__(self, options: Qcow2CreateOptions, *, compress: bool, level: int | None) -> None:
        super().__init__(options.size)
        named = unstreamable(options, _STREAMED)
        if named:
            raise UnsupportedError(f"A qcow2 image with {named} cannot be written as a stream")
        self._options = options
        self._geometry = options.geometry
        self._bits = self._geometry.cluster_bits
        self.unit = self._geometry.cluster_size
        self.packs = self.measured = compress
        overlay = options.backing_file is not None
        self._shows_zeros = overlay and options.version > 2
        # Version 2 has no way to say that zeros hide what a backing file holds.
        self.materialised = overlay and options.version == 2
        self._pack = functools.partial(
            pack_cluster,
            size=self.unit,
            zstd=options.compression_type == "zstd",
            level=packing_level(options.compression_type, level),
        )
        self._plan = StreamPlan(self._geometry, self.size)
        self._cursor = Cursor(self._geometry)
        self._lengths: Iterator[int] = iter(())
        self._given = 0
        """Bytes of data that were given, the padding between them included."""

    def _span(self, start: int, end: int) -> tuple[int, int]:
        return start >> self._bits, self._geometry.cluster_count(end - start)

    def plan_data(self, start: int, end: int) -> None:
        """Clusters stored as they are."""
        self._plan.add_plain(*self._span(start, end))

    def plan_packed(self, start: int, length: int) -> None:
        """A compressed cluster."""
        self._plan.add_packed(start >> self._bits, length)

    def plan_zeros(self, start: int, end: int) -> None:
        """Clusters that hide what a backing file holds; without one there is nothing to do."""
        if self._shows_zeros:
            self._plan.add_zeros(*self._span(start, end))

    def settle(self) -> None:
        """Work out where everything goes."""
        self._plan.settle()
        self._lengths = self._plan.packed_lengths()
        self.length = self._plan.length

    def wants_packed(self, start: int) -> bool:
        """Whether compression gained anything when it was measured."""
        return self.packs and self._plan.is_packed(start >> self._bits)

    def pack(self, data: memoryview) -> bytes | None:
        """One cluster compressed."""
        return self._pack(data)

    def head(self) -> Iterator[bytes]:
        """Header and all tables."""
        plan, options = self._plan, self._options
        layout = Layout(
            geometry=self._geometry,
            size=self.size,
            table_clusters=plan.table_clusters,
            l1_offset=plan.l1_offset if plan.l1_size else 0,
            l1_size=plan.l1_size,
            l2_offset=plan.l2_offset,
            data_offset=plan.data_offset,
            data_clusters=0,
            blocks=[],
            used_clusters=plan.length >> self._bits,
            file_size=plan.length,
        )
        yield new_header(options, layout).encode()
        yield plan.refcount_table()
        yield from plan.refcount_blocks()
        yield plan.l1_table()
        yield from plan.l2_tables()

    def put(self, start: int, view: memoryview, packed: Packed) -> Iterable[Buffer]:
        """Clusters from ``start`` on."""
        if not self.packs:
            self._cursor.plain(self._geometry.cluster_count(len(view)))
            self._given += len(view)
            return (view,)
        found: list[Buffer] = []
        for at in range(0, len(view), self.unit):
            part = view[at : at + self.unit]
            data: Buffer = part
            if self.wants_packed(start + at):
                data = packed.get(start + at, b"")
                if len(data) != next(self._lengths):
                    raise StorageError(
                        f"The source changed at {start + at:#x} while it was streamed", errno.EIO
                    )
                place = self._cursor.packed(len(data))
            else:
                place = self._cursor.plain(1)
            if place > self._given:
                found.append(zeros(place - self._given))
            found.append(data)
            self._given = place + len(data)
        return found

    def tail(self) -> bytes:
        """Zeros up to the end of the last cluster."""
        return bytes(align_up(self._given, self.unit) - self._given)
