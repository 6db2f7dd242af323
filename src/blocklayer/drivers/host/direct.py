"""Unbuffered access: whole blocks through aligned memory.

1. Offsets, lengths and memory handed to the kernel are multiples of ``alignment``, which is found
   by trying. A write of part of a block reads it first; the caller keeps others off ``span``.
2. Padding written past the end of the file is cut off again; the caller then keeps all others off
   what follows, too.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable

from blocklayer.drivers.host import calls
from blocklayer.errors import StorageError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.io import zeros
from blocklayer.units import MIB, align_down, align_up

_ALIGNMENTS = (512, 1024, 2048, 4096)
_CHUNK = MIB


class DirectIO:
    """Access to a file that was opened with ``O_DIRECT``."""

    def __init__(self, fd: int, path: str, changed: Callable[[int], None]) -> None:
        self._fd = fd
        self._changed = changed
        self.alignment = _find_alignment(fd, path)

    def span(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks that the range meets."""
        return align_down(offset, self.alignment), align_up(offset + length, self.alignment)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; zeros past the end."""
        done, total = 0, len(view)
        with mmap.mmap(-1, min(_CHUNK, total + 2 * self.alignment)) as memory:
            room = align_down(len(memory), self.alignment)
            while done < total:
                start, stop = self.span(offset + done, total - done)
                stop = min(stop, start + room)
                with memoryview(memory) as buffer, buffer[: stop - start] as blocks:
                    self._read_blocks(start, blocks)
                    within = offset + done - start
                    length = min(stop - start - within, total - done)
                    view[done : done + length] = blocks[within : within + length]
                done += length

    def _read_blocks(self, offset: int, blocks: memoryview) -> None:
        done = 0
        while done < len(blocks):
            length = calls.read_at(self._fd, blocks[done:], offset + done)
            done += length
            # A read that ends inside a block has met the end of the file.
            if not length or length % self.alignment:
                blocks[done:] = zeros(len(blocks) - done)
                return

    def write(self, offset: int, data: Buffer) -> None:
        """Store all of ``data``; what else its blocks hold stays."""
        view = memoryview(data)
        done, total = 0, len(view)
        size = self._file_size()
        try:
            with mmap.mmap(-1, min(_CHUNK, total + 2 * self.alignment)) as memory:
                room = align_down(len(memory), self.alignment)
                while done < total:
                    start, stop = self.span(offset + done, total - done)
                    stop = min(stop, start + room)
                    within = offset + done - start
                    length = min(stop - start - within, total - done)
                    with memoryview(memory) as buffer, buffer[: stop - start] as blocks:
                        if length < len(blocks):
                            self._read_blocks(start, blocks)
                        blocks[within : within + length] = view[done : done + length]
                        self._write_blocks(start, blocks)
                    done += length
        finally:
            end = offset + total
            if size is not None and end % self.alignment and self._file_size() != size:
                os.ftruncate(self._fd, max(size, end))
            self._changed(offset + done)

    def _write_blocks(self, offset: int, blocks: memoryview) -> None:
        done = 0
        while done < len(blocks):
            length = calls.write_at(self._fd, (blocks[done:],), offset + done)
            if not length or length % self.alignment:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += length

    def _file_size(self) -> int | None:
        """The size of a regular file; a device's never changes."""
        status = os.fstat(self._fd)
        return status.st_size if stat.S_ISREG(status.st_mode) else None


def _find_alignment(fd: int, path: str) -> int:
    """The smallest block that the kernel reads from ``fd``."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
        for alignment in _ALIGNMENTS:
            with view[:alignment] as block:
                try:
                    calls.read_at(fd, block, 0)
                    return alignment
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise StorageError.from_os(
                            error, f"Could not read '{path}'", path
                        ) from error
    raise StorageError(
        f"Could not find working O_DIRECT alignment for '{path}': try cache.direct=off",
        errno.EINVAL,
        path,
    )
