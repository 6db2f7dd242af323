"""Changes of VHDX metadata, each whole or not at all: the log, its replay, and the two headers.

1. A header is written to the place of the older one, so that a valid one is there at all times.
2. A table is changed in place only after the log entry that says the same is on stable storage;
   and an entry is left behind only after the place itself is.
3. With a log that has not been replayed, nothing else of the image is read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import msgspec

from blocklayer.codec.vhdx import log as codec
from blocklayer.codec.vhdx import structure
from blocklayer.codec.vhdx.structure import HEADER_OFFSETS, HEADER_SIZE, NO_GUID, Header
from blocklayer.errors import BlockError, FormatError, UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.node import Node
from blocklayer.units import MIB

_MAX_REPLAY = 64 * MIB
"""A log larger than this is not replayed; those that exist have 1 MiB or a few."""
_MAX_FILE_SIZE = 2 * structure.MAX_SIZE
_MAX_BATCH = 60
"""Sectors in one entry: a quarter of the smallest log."""


class Headers:
    """The two headers of an open image."""

    def __init__(self, storage: Node) -> None:
        self._storage = storage
        self._slot = 0
        self.current: Header

    async def load(self) -> None:
        """Find the header in force."""
        size = self._storage.size
        found = []
        for offset in HEADER_OFFSETS:
            length = max(0, min(HEADER_SIZE, size - offset))
            data = await io.read(self._storage, offset, length) if length else b""
            found.append(structure.decode_header(data))
        self._slot = structure.current_header(*found)
        header = found[self._slot]
        assert header is not None
        structure.judge_header(header, size)
        self.current = header

    async def update(self, **changes: bytes) -> None:
        """Put a changed header in force; all that was written before is on stable storage."""
        await io.flush(self._storage)
        header = msgspec.structs.replace(
            self.current, sequence_number=self.current.sequence_number + 1, **changes
        )
        await io.write(self._storage, HEADER_OFFSETS[1 - self._slot], header.encode())
        await io.flush(self._storage)
        # Only now: after a failure the next attempt must not go to the place of the good header.
        self.current, self._slot = header, 1 - self._slot

    async def clear_log(self) -> None:
        """Nothing is left to replay, whichever header is read."""
        await self.update(log_guid=NO_GUID)
        await self.update(log_guid=NO_GUID)

    async def mark_written(self) -> None:
        """New identities: whoever remembers the old ones sees that the image has changed."""
        await self.update(file_write_guid=os.urandom(16), data_write_guid=os.urandom(16))


class Log:
    """Writes changes of 4 KiB sectors, through the log, to their places."""

    def __init__(self, node: Node, storage: Node, headers: Headers) -> None:
        self._node = node
        self._storage = storage
        self._headers = headers
        self._turn = asyncio.Lock()
        self._head = 0
        self._oldest = 0
        """Where the oldest entry begins whose places may not be on stable storage yet."""
        self._number = 1
        self._flushed_size = storage.size

    @property
    def _length(self) -> int:
        return self._headers.current.log_length

    async def write(
        self, updates: list[tuple[int, bytes]], settle: Callable[[], Awaitable[None]]
    ) -> None:
        """Make ``updates`` (place and 4 KiB each) so that a crash leaves all or none of a batch.

        What was written before is on stable storage afterwards; the places may not be, the log is.
        ``settle`` is called first: an error in it, too, ends all writing.
        """
        async with self._turn:
            try:
                await settle()
                if self._headers.current.log_guid == NO_GUID:
                    self._head = self._oldest = 0
                    await self._headers.update(log_guid=os.urandom(16))
                for start in range(0, len(updates), _MAX_BATCH):
                    await self._write_batch(updates[start : start + _MAX_BATCH])
            except BlockError as error:
                self._node.poison(f"its log could not be written ({error})")
                raise

    async def _write_batch(self, updates: list[tuple[int, bytes]]) -> None:
        length = codec.encoded_length(len(updates))
        if self._head + length > self._length:
            # Begin again at the start, with nothing left to replay of what was before. (An entry
            # may run over the log's end; but QEMU does not find its way out of such a log.)
            await io.flush(self._storage)
            self._head = self._oldest = 0
        place, size = self._head, self._storage.size
        entry = codec.encode_entry(
            updates,
            log_guid=self._headers.current.log_guid,
            sequence_number=self._number,
            tail=self._oldest,
            flushed_file_size=self._flushed_size,
            last_file_size=size,
        )
        await io.write(self._storage, self._headers.current.log_offset + place, entry)
        await io.flush(self._storage)
        self._flushed_size = size
        # The flush covered the places of all entries before this one.
        self._oldest = place
        self._head = place + length
        self._number += 1
        for host_offset, data in updates:
            await io.write(self._storage, host_offset, data)

    async def finish(self) -> None:
        """All is in its place: the next one to open the image finds no log."""
        async with self._turn:
            if self._headers.current.log_guid != NO_GUID:
                await self._headers.clear_log()


async def replay(node: Node, storage: Node, headers: Headers) -> bool:
    """Bring what the log holds to its places; whether there was a log."""
    header = headers.current
    if header.log_guid == NO_GUID:
        return False
    if node.flags.read_only:
        raise UnsupportedError(
            f"VHDX image file '{storage.filename}' opened read-only, but contains a log that needs "
            f"to be replayed. To replay the log, run: blk img check -r all '{storage.filename}'"
        )
    if header.log_length > _MAX_REPLAY:
        raise UnsupportedError(
            f"The VHDX log of '{storage.filename}' has {header.log_length:#x} bytes: too large to "
            "be replayed"
        )
    ring = await io.read(storage, header.log_offset, header.log_length)
    entries = codec.active_entries(ring, header.log_guid)
    if entries:
        newest = entries[-1]
        _judge(storage, header, ring, entries)
        if newest.last_file_size > storage.size:
            await io.truncate(storage, newest.last_file_size)
    for entry in entries:
        for update in codec.entry_updates(ring, entry):
            if update.data is None:
                await io.write_zeroes(storage, update.host_offset, update.length)
            else:
                await io.write(storage, update.host_offset, update.data)
    await headers.clear_log()
    return True


def _judge(storage: Node, header: Header, ring: bytes, entries: list[codec.Entry]) -> None:
    """Raise before anything is replayed that should not be."""
    newest = entries[-1]
    if newest.flushed_file_size > storage.size:
        raise FormatError(
            f"The VHDX image '{storage.filename}' has been truncated: its log was written when it "
            f"had {newest.flushed_file_size:#x} bytes, now it has {storage.size:#x}"
        )
    if newest.last_file_size > _MAX_FILE_SIZE:
        raise FormatError(f"The VHDX log asks for a file of {newest.last_file_size:#x} bytes")
    end = max(storage.size, newest.last_file_size)
    log_end = header.log_offset + header.log_length
    for entry in entries:
        for update in codec.entry_updates(ring, entry):
            last = update.host_offset + update.length
            if last > end or (update.host_offset < log_end and header.log_offset < last):
                raise FormatError(
                    f"The VHDX log wants to write {update.length:#x} bytes at "
                    f"{update.host_offset:#x}: outside the file, or in the log itself"
                )
            for place in HEADER_OFFSETS:
                if update.host_offset < place + HEADER_SIZE and place < last:
                    raise FormatError("The VHDX log wants to write to a header")
