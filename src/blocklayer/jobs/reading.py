"""Reading pieces of guest data into a buffer: in a thread where the source allows it.

1. A piece is read where its run says only while the source's mapping has not changed since, or
   its place is fixed.
2. With ``salvage``, sectors that cannot be read become zeros and are reported, one by one.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable

import msgspec

from blocklayer.errors import BlockError, StorageError
from blocklayer.graph import io
from blocklayer.graph.driver import ProtocolDriver, ThreadSafeIO
from blocklayer.graph.extent import Kind
from blocklayer.jobs.plan import FIXED, Piece
from blocklayer.units import SECTOR

Warn = Callable[[str], None]


def new_buffer(size: int) -> memoryview:
    """Memory for ``size`` bytes that starts on a page, as direct I/O wants it."""
    return memoryview(mmap.mmap(-1, size))


class TransferError(StorageError):
    """Reading or writing failed at a place in the disk."""

    offset = 0


def located(
    doing: str, offset: int, error: BlockError | OSError, path: str | None = None
) -> TransferError:
    """``error`` with where it happened: the guest offset, and the file if that is known."""
    number = error.errno or errno.EIO
    said = str(error)
    if isinstance(error, OSError | StorageError):
        path = getattr(error, "path", None) or path
        said = os.strerror(number) + (f" (file '{path}')" if path else "")
    failure = TransferError(f"error while {doing} at byte {offset}: {said}", number, path)
    failure.offset = offset
    return failure


class Load(msgspec.Struct, gc=False):
    """One read from one place in a source's storage to ``[start, end)`` of the buffer."""

    storage: ThreadSafeIO
    host_offset: int
    start: int
    end: int
    offset: int
    path: str
    """The guest offset and the storage's name, for messages."""

    def follows(self, last: Load) -> bool:
        """Whether it goes on where ``last`` ends, in the storage as in the buffer."""
        return (
            last.storage is self.storage
            and last.end == self.start
            and last.host_offset + (last.end - last.start) == self.host_offset
        )


class Reader:
    """Fills buffers with pieces."""

    def __init__(self, salvage: Warn | None = None) -> None:
        self._salvage = salvage

    async def prepare(self, placed: Iterable[tuple[int, Piece]], buffer: memoryview) -> list[Load]:
        """Read what only the loop can read; the answer is what is left for a thread.

        ``placed`` says where in ``buffer`` each piece goes.
        """
        loads: list[Load] = []
        for at, piece in placed:
            view = buffer[at : at + piece.length]
            if piece.source is None:
                view[:] = io.zeros(piece.length) if piece.data is None else piece.data
                continue
            load = _direct(piece, at)
            if load is None:
                await self._read_on_loop(piece, view)
            elif loads and load.follows(loads[-1]):
                loads[-1].end = load.end
            else:
                loads.append(load)
        return loads

    def fill(self, loads: list[Load], buffer: memoryview) -> None:
        """In a thread: carry out the reads."""
        for load in loads:
            try:
                load.storage.read_into(load.host_offset, buffer[load.start : load.end])
            except (BlockError, OSError) as error:
                if self._salvage is None:
                    raise located("reading", load.offset, error, load.path) from error
                self._fill_by_sectors(load, buffer, self._salvage)

    @staticmethod
    def _fill_by_sectors(load: Load, buffer: memoryview, warn: Warn) -> None:
        for start in range(load.start, load.end, SECTOR):
            sector = buffer[start : min(start + SECTOR, load.end)]
            done = start - load.start
            try:
                load.storage.read_into(load.host_offset + done, sector)
            except (BlockError, OSError) as error:
                _give_up(load.offset + done, sector, error, warn)

    async def _read_on_loop(self, piece: Piece, view: memoryview) -> None:
        """Read through the graph, from sources that transform their data or have moved it."""
        assert piece.source is not None
        node = piece.source.node
        try:
            await io.read_into(node, piece.source_offset, view)
        except BlockError as error:
            if self._salvage is None:
                raise located("reading", piece.offset, error, node.filename) from error
            for at in range(0, len(view), SECTOR):
                sector = view[at : at + SECTOR]
                try:
                    await io.read_into(node, piece.source_offset + at, sector)
                except BlockError as lost:
                    _give_up(piece.offset + at, sector, lost, self._salvage)


def _give_up(offset: int, view: memoryview, error: BlockError | OSError, warn: Warn) -> None:
    view[:] = io.zeros(len(view))
    warn(f"error while reading offset {offset}: {os.strerror(error.errno or errno.EIO)}")


def _direct(piece: Piece, at: int) -> Load | None:
    """How a thread can read ``piece``; None if it cannot, or no longer."""
    run, source = piece.run, piece.source
    if run is None or source is None or run.kind is not Kind.DATA or run.storage is None:
        return None
    driver = run.storage.driver
    if piece.generation not in (FIXED, source.node.generation):
        return None
    if not isinstance(driver, ProtocolDriver):
        return None
    storage = driver.thread_safe_io()
    if storage is None or run.host_offset is None:
        return None
    place = run.host_offset + (piece.source_offset - run.offset)
    path = run.storage.filename
    return Load(storage, place, at, at + piece.length, piece.offset, path)
