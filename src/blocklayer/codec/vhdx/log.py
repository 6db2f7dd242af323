"""The VHDX log: entries that say which 4 KiB sectors of the file to write, made whole by checksums.

Public:
    Update(host_offset, data | None, length)     a write of 4 KiB, or zeros of any length
    active_entries(ring, log_guid) -> list[Entry]     what must be replayed, oldest first
    entry_updates(ring, entry) -> list[Update]
    encode_entry(updates, …) -> bytes, encoded_length(count)

1. An entry counts only as a whole: signature, checksum, identity of the log, sequence numbers in
   every sector.
2. The active sequence is the longest run of valid entries, each one's number one above the last's,
   that ends in the highest number and reaches back to what its newest entry calls the tail.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from blocklayer.codec.vhdx.structure import checksum, with_checksum
from blocklayer.errors import FormatError
from blocklayer.record import U32, U64, Record
from blocklayer.units import align_up

SECTOR: Final = 4096
"""The log's own unit."""
_MAX_LAPS: Final = 16


class _EntryHead(Record, byte_order="<"):
    signature: Annotated[bytes, "4s"]
    checksum: U32
    length: U32
    tail: U32
    sequence_number: U64
    count: U32
    reserved: U32
    log_guid: Annotated[bytes, "16s"]
    flushed_file_size: U64
    last_file_size: U64


class _Descriptor(Record, byte_order="<"):
    """Of data: the last 4 and first 8 bytes of the sector. Of zeros: nothing, and the length."""

    signature: Annotated[bytes, "4s"]
    trailing: U32
    leading: U64
    host_offset: U64
    sequence_number: U64


class _DataSector(Record, byte_order="<"):
    signature: Annotated[bytes, "4s"]
    sequence_high: U32
    data: Annotated[bytes, "4084s"]
    sequence_low: U32


class Update(msgspec.Struct, frozen=True):
    """A change of the file; ``data`` None stands for zeros."""

    host_offset: int
    length: int
    data: bytes | None


class Entry(msgspec.Struct, frozen=True):
    """One valid entry of the log, at ``offset`` in its ring."""

    offset: int
    length: int
    tail: int
    sequence_number: int
    flushed_file_size: int
    last_file_size: int


def _in_ring(ring: bytes, offset: int, length: int) -> bytes:
    """``length`` bytes of the ring from ``offset`` on."""
    piece = ring[offset : offset + length]
    return piece if len(piece) == length else piece + ring[: length - len(piece)]


def _descriptor_area(count: int) -> int:
    return align_up(_EntryHead.SIZE + count * _Descriptor.SIZE, SECTOR)


def _plausible(head: _EntryHead, ring: bytes, log_guid: bytes) -> bool:
    """Whether the entry's head alone speaks for it."""
    return (
        head.log_guid == log_guid
        and head.length % SECTOR == 0
        and SECTOR <= head.length <= len(ring)
        and head.sequence_number != 0
        and head.tail % SECTOR == 0
        and head.tail < len(ring)
        and _descriptor_area(head.count) <= head.length
    )


def entry_updates(ring: bytes, entry: Entry) -> list[Update]:
    """What a valid entry changes."""
    data = _in_ring(ring, entry.offset, entry.length)
    updates = _decode_updates(data, _EntryHead.unpack(data))
    assert updates is not None
    return updates


def _decode_updates(data: bytes, head: _EntryHead) -> list[Update] | None:
    updates: list[Update] = []
    place = _descriptor_area(head.count)
    for index in range(head.count):
        found = _Descriptor.unpack(data, _EntryHead.SIZE + index * _Descriptor.SIZE)
        if found.sequence_number != head.sequence_number or found.host_offset % SECTOR:
            return None
        if found.signature == b"zero":
            if found.leading % SECTOR:
                return None
            updates.append(Update(found.host_offset, found.leading, None))
            continue
        if found.signature != b"desc" or place + SECTOR > len(data):
            return None
        sector = _DataSector.unpack(data, place)
        number = sector.sequence_high << 32 | sector.sequence_low
        if sector.signature != b"data" or number != head.sequence_number:
            return None
        whole = found.leading.to_bytes(8, "little") + sector.data
        updates.append(
            Update(found.host_offset, SECTOR, whole + found.trailing.to_bytes(4, "little"))
        )
        place += SECTOR
    return updates


def encoded_length(count: int) -> int:
    """Bytes of an entry with ``count`` data sectors."""
    return _descriptor_area(count) + count * SECTOR


def encode_entry(
    updates: list[tuple[int, bytes]],
    *,
    log_guid: bytes,
    sequence_number: int,
    tail: int,
    flushed_file_size: int,
    last_file_size: int,
) -> bytes:
    """An entry that writes each of ``updates``: a place and its 4 KiB."""
    length = encoded_length(len(updates))
    head = _EntryHead(
        b"loge", 0, length, tail, sequence_number, len(updates), 0, log_guid,
        flushed_file_size, last_file_size,
    )  # fmt: skip
    parts, sectors = [head.pack()], []
    for host_offset, data in updates:
        assert len(data) == SECTOR
        assert host_offset % SECTOR == 0
        leading, trailing = int.from_bytes(data[:8], "little"), int.from_bytes(data[-4:], "little")
        parts.append(_Descriptor(b"desc", trailing, leading, host_offset, sequence_number).pack())
        high, low = sequence_number >> 32, sequence_number & 0xFFFFFFFF
        sectors.append(_DataSector(b"data", high, data[8:-4], low).pack())
    descriptors = b"".join(parts).ljust(_descriptor_area(len(updates)), b"\0")
    return with_checksum(descriptors + b"".join(sectors))


def active_entries(ring: bytes, log_guid: bytes) -> list[Entry]:
    """The entries to replay, oldest first; none if the log holds no whole sequence."""
    valid = _valid_entries(ring, log_guid)
    preceded = {
        after.offset for entry in valid.values() if (after := _after(valid, entry, len(ring)))
    }
    best: list[Entry] = []
    for entry in valid.values():
        if entry.offset not in preceded:
            sequence = _complete(valid, entry, len(ring))
            if sequence and (not best or sequence[-1].sequence_number > best[-1].sequence_number):
                best = sequence
    return best


def _valid_entries(ring: bytes, log_guid: bytes) -> dict[int, Entry]:
    """All entries that are whole, by their place."""
    valid: dict[int, Entry] = {}
    looked_at = 0
    for offset in range(0, len(ring), SECTOR):
        if not ring.startswith(b"loge", offset):
            continue
        head = _EntryHead.unpack(ring, offset)
        if not _plausible(head, ring, log_guid):
            continue
        looked_at += head.length
        if looked_at > _MAX_LAPS * len(ring):
            # Entries lie one after another, old ones partly overwritten: never so many times.
            raise FormatError("The VHDX log holds more entries than it has room for")
        data = _in_ring(ring, offset, head.length)
        if checksum(data) == head.checksum and _decode_updates(data, head) is not None:
            valid[offset] = Entry(
                offset, head.length, head.tail, head.sequence_number, head.flushed_file_size,
                head.last_file_size,
            )  # fmt: skip
    return valid


def _after(valid: dict[int, Entry], entry: Entry, ring_length: int) -> Entry | None:
    """The entry that continues ``entry``."""
    after = valid.get((entry.offset + entry.length) % ring_length)
    follows = after is not None and after.sequence_number == entry.sequence_number + 1
    return after if follows else None


def _complete(valid: dict[int, Entry], first: Entry, ring_length: int) -> list[Entry]:
    """From ``first`` on, the entries between the newest whose tail is among them and its tail."""
    run, places = [first], {first.offset: 0}
    while (after := _after(valid, run[-1], ring_length)) is not None:
        places[after.offset] = len(run)
        run.append(after)
    while run:
        start = places.get(run[-1].tail)
        if start is not None and start < len(run):
            return run[start:]
        run.pop()
    return []
