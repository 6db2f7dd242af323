"""The snapshot table: entries of variable length, one after another.

Public:
    Snapshot(...)                                        one entry; `.l1_table_offset`, `.l1_size`,
                                                         `.id`, `.name`, the times, `.extra_data`
      .vm_state_size, .disk_size, .icount                what the extra data say, None if absent
      .encode() -> bytes
    extra_data(vm_state_size, disk_size, icount) -> bytes
    decode_snapshot(data, offset, *, extra_data_limit) -> (Snapshot, next_offset)
    decode_table(data, count) -> (list[Snapshot], length), encode_table(snapshots) -> bytes
    table_size_bound(count) -> int                       how much to read, at most
    validate_snapshot(snapshot, geometry) -> None
    MAX_SNAPSHOTS, MAX_TABLE_SIZE, MAX_EXTRA_DATA_SIZE

1. decode then encode gives the same bytes, unknown extra data included; only padding is
   written as zeros.
2. Every length is compared with its limit and with the bytes at hand before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2.geometry import MAX_L1_TABLE_SIZE
from blocklayer.errors import FormatError, UsageError
from blocklayer.record import U16, U32, U64, Record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blocklayer.codec.qcow2.geometry import Geometry

MAX_SNAPSHOTS: Final = 65536
MAX_TABLE_SIZE: Final = 64 << 20
MAX_EXTRA_DATA_SIZE: Final = 1024
_MAX_STRING_SIZE: Final = 0xFFFF
_ICOUNT_DISABLED: Final = (1 << 64) - 1

_SHOWN_MAX: Final = 60
"""Characters of a name that a message quotes; an image may hold 64 KiB of them."""


class _FixedFields(Record, byte_order=">"):
    l1_table_offset: U64
    l1_size: U32
    id_size: U16
    name_size: U16
    date_s: U32
    date_ns: U32
    vm_clock_ns: U64
    vm_state_size_32: U32
    extra_data_size: U32


class Snapshot(msgspec.Struct, kw_only=True):
    """One internal snapshot as the table describes it."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_s: int = 0
    date_ns: int = 0
    vm_clock_ns: int = 0
    # The old 32-bit field; ignored by readers when the extra data have the wide one.
    vm_state_size_32: int = 0
    # Verbatim. Version 3 wants at least the first two words.
    extra_data: bytes = b""

    @property
    def vm_state_size(self) -> int:
        wide = self._extra_word(0)
        return self.vm_state_size_32 if wide is None else wide

    @property
    def disk_size(self) -> int | None:
        return self._extra_word(1)

    @property
    def icount(self) -> int | None:
        word = self._extra_word(2)
        return None if word == _ICOUNT_DISABLED else word

    def _extra_word(self, index: int) -> int | None:
        word = self.extra_data[index * 8 : index * 8 + 8]
        return int.from_bytes(word, "big") if len(word) == 8 else None

    def encode(self) -> bytes:
        """The entry, padded to a multiple of 8; UsageError when a string is too long."""
        identifier = self.id.encode("utf-8", "surrogateescape")
        name = self.name.encode("utf-8", "surrogateescape")
        if max(len(identifier), len(name)) > _MAX_STRING_SIZE:
            raise UsageError(f"snapshot name or id is longer than {_MAX_STRING_SIZE} bytes")
        fixed = _FixedFields(
            l1_table_offset=self.l1_table_offset,
            l1_size=self.l1_size,
            id_size=len(identifier),
            name_size=len(name),
            date_s=self.date_s,
            date_ns=self.date_ns,
            vm_clock_ns=self.vm_clock_ns,
            vm_state_size_32=self.vm_state_size_32,
            extra_data_size=len(self.extra_data),
        )
        entry = fixed.pack() + self.extra_data + identifier + name
        return entry + bytes(-len(entry) % 8)


def extra_data(vm_state_size: int, disk_size: int, icount: int | None = None) -> bytes:
    """The extra data that a new entry has."""
    words = (vm_state_size, disk_size, _ICOUNT_DISABLED if icount is None else icount)
    return b"".join(word.to_bytes(8, "big") for word in words)


def decode_snapshot(
    data: bytes | bytearray | memoryview,
    offset: int = 0,
    *,
    extra_data_limit: int = MAX_EXTRA_DATA_SIZE,
) -> tuple[Snapshot, int]:
    """The entry at `offset`, and the offset of the next; repair passes a larger limit."""
    fixed = _FixedFields.unpack(data, offset)
    if fixed.extra_data_size > extra_data_limit:
        raise FormatError(
            f"snapshot table entry at {offset:#x}: extra data of {fixed.extra_data_size} bytes, "
            f"more than {extra_data_limit}; 'check -r all' trims them"
        )
    extra_start = offset + _FixedFields.SIZE
    id_start = extra_start + fixed.extra_data_size
    name_start = id_start + fixed.id_size
    end = name_start + fixed.name_size
    if end > len(data):
        raise FormatError(
            f"snapshot table entry at {offset:#x} ends at {end:#x}, past the table ({len(data):#x})"
        )
    snapshot = Snapshot(
        l1_table_offset=fixed.l1_table_offset,
        l1_size=fixed.l1_size,
        id=bytes(data[id_start:name_start]).decode("utf-8", "surrogateescape"),
        name=bytes(data[name_start:end]).decode("utf-8", "surrogateescape"),
        date_s=fixed.date_s,
        date_ns=fixed.date_ns,
        vm_clock_ns=fixed.vm_clock_ns,
        vm_state_size_32=fixed.vm_state_size_32,
        extra_data=bytes(data[extra_start:id_start]),
    )
    return snapshot, end + (-(end - offset) % 8)


def decode_table(data: bytes | bytearray | memoryview, count: int) -> tuple[list[Snapshot], int]:
    """The first `count` entries of `data`, and the table's length in bytes.

    At the end of a file the last entry's padding may be missing: it counts in the length all
    the same.
    """
    snapshots: list[Snapshot] = []
    offset = 0
    for _ in range(count):
        snapshot, offset = decode_snapshot(data, offset)
        if offset > MAX_TABLE_SIZE:
            raise FormatError(f"snapshot table is larger than {MAX_TABLE_SIZE} bytes")
        snapshots.append(snapshot)
    return snapshots, offset


def encode_table(snapshots: Iterable[Snapshot]) -> bytes:
    """The whole table; UsageError when it exceeds the format's limits."""
    entries = [snapshot.encode() for snapshot in snapshots]
    table = b"".join(entries)
    if len(entries) > MAX_SNAPSHOTS or len(table) > MAX_TABLE_SIZE:
        raise UsageError(
            f"too many snapshots: {len(entries)} entries, {len(table)} bytes; the limits are "
            f"{MAX_SNAPSHOTS} and {MAX_TABLE_SIZE}"
        )
    return table


def table_size_bound(count: int) -> int:
    """No valid table of `count` entries is larger, so no reader needs more bytes."""
    entry = _FixedFields.SIZE + MAX_EXTRA_DATA_SIZE + 2 * _MAX_STRING_SIZE + 7
    return min(count * entry, MAX_TABLE_SIZE)


def _shown(name: str) -> str:
    """A name from an image, fit for a message: no control characters, and not endless."""
    cut = name if len(name) <= _SHOWN_MAX else name[:_SHOWN_MAX] + "…"
    return cut if cut.isprintable() else repr(cut)[1:-1]


def validate_snapshot(snapshot: Snapshot, geometry: Geometry) -> None:
    """FormatError unless the entry's L1 table could be loaded."""
    where = f"snapshot '{_shown(snapshot.id)}' ({_shown(snapshot.name)}): "
    if snapshot.l1_size * 8 > MAX_L1_TABLE_SIZE:
        raise FormatError(f"{where}L1 table of {snapshot.l1_size} entries is too large")
    if snapshot.l1_table_offset & geometry.cluster_mask:
        raise FormatError(f"{where}l1_table_offset {snapshot.l1_table_offset:#x} is not aligned")
    if snapshot.l1_table_offset >= geometry.max_host_offset:
        raise FormatError(f"{where}l1_table_offset {snapshot.l1_table_offset:#x} is too large")
    if geometry.version > 2 and snapshot.disk_size is None:
        raise FormatError(f"{where}extra data lack the disk size that version 3 requires")
