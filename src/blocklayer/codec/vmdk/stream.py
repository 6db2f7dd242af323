"""A stream-optimised VMDK as a stream: header first, tables and footer behind the grains they name.

Public:
    StreamWriter(capacity, descriptor): `begin()`, `grain(index, compressed)`, `finish()`; what they
    give, in this order, is the file

1. Grains come in rising order, each once; those that do not come read as zeros.
2. Nothing that was given is ever changed: the file can go to a pipe.
"""

from __future__ import annotations

import sys
from array import array

from blocklayer.codec.vmdk.sparse import (
    AT_END,
    DESCRIPTOR_OFFSET,
    DESCRIPTOR_SIZE,
    GRAIN_SIZE,
    MARKER_DIRECTORY,
    MARKER_END,
    MARKER_FOOTER,
    MARKER_TABLE,
    TABLE_ENTRIES,
    Layout,
    Marker,
    new_header,
    pack_grain,
)
from blocklayer.units import SECTOR, align_up

_GRAIN_SECTORS = GRAIN_SIZE // SECTOR


def _pack_marker(sectors: int, type: int) -> bytes:
    return Marker(sectors, 0, type).pack().ljust(SECTOR, b"\0")


def _pack_entries(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    data = entries.tobytes()
    return data.ljust(align_up(len(data), SECTOR), b"\0")


class StreamWriter:
    """Writes one disk of ``capacity`` sectors."""

    def __init__(self, capacity: int, descriptor: bytes) -> None:
        assert len(descriptor) <= DESCRIPTOR_SIZE
        self._descriptor = descriptor
        layout = Layout(capacity)
        self._header = new_header(layout, compressed=True, zeroed=False)
        self._header.flags &= ~2  # no second directory
        self._header.redundant_offset = 0
        self._header.overhead = _GRAIN_SECTORS
        self._directory = array("I", bytes(4 * layout.table_count))
        self._table = array("I", bytes(4 * TABLE_ENTRIES))
        self._table_index = 0
        self._last = -1
        self._sector = 0

    def _count(self, data: bytes) -> bytes:
        self._sector += len(data) // SECTOR
        return data

    def begin(self) -> bytes:
        """Header and descriptor."""
        self._header.directory_offset = AT_END
        data = self._header.pack().ljust(DESCRIPTOR_OFFSET, b"\0") + self._descriptor
        return self._count(data.ljust(GRAIN_SIZE, b"\0"))

    def grain(self, index: int, compressed: bytes) -> bytes:
        """The grain ``index`` of the disk, and before it the table of those before, if done."""
        assert index > self._last
        self._last = index
        before = b""
        if index // TABLE_ENTRIES != self._table_index:
            before = self._end_table()
            self._table_index = index // TABLE_ENTRIES
        self._table[index % TABLE_ENTRIES] = self._sector
        return before + self._count(pack_grain(index * _GRAIN_SECTORS, compressed))

    def _end_table(self) -> bytes:
        if not any(self._table):
            return b""
        table = _pack_entries(self._table)
        marker = self._count(_pack_marker(len(table) // SECTOR, MARKER_TABLE))
        self._directory[self._table_index] = self._sector
        self._table = array("I", bytes(4 * TABLE_ENTRIES))
        return marker + self._count(table)

    def finish(self) -> bytes:
        """The last table, the directory, the footer and the end of the stream."""
        data = self._end_table()
        directory = _pack_entries(self._directory)
        data += self._count(_pack_marker(len(directory) // SECTOR, MARKER_DIRECTORY))
        self._header.directory_offset = self._sector
        data += self._count(directory)
        data += _pack_marker(1, MARKER_FOOTER) + self._header.pack()
        return data + _pack_marker(0, MARKER_END)
