"""Blocking access to an open file: whole reads, whole writes, and its size.

1. All or an error: short reads and writes go on where they stopped; past the end there are zeros.
2. A resize that fails leaves the size as it was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from blocklayer.drivers.host import calls
from blocklayer.errors import UnsupportedError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.io import zeros
from blocklayer.units import MIB

_IOV_MAX = 1024
"""Buffers that one call takes."""
_CHUNK = 2 * MIB


class BlockingIO(Protocol):
    """Buffered (``FileIO``) or unbuffered (``DirectIO``) access."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; zeros past the end."""

    def write(self, offset: int, data: Buffer) -> None:
        """Store all of ``data``."""


class FileIO:
    """Access through the page cache; any thread may use it at any time.

    ``changed`` is told of every write, with the offset where it ended.
    """

    __slots__ = ("_changed", "_fd")

    def __init__(self, fd: int, changed: Callable[[int], None]) -> None:
        self._fd = fd
        self._changed = changed

    def fileno(self) -> int:
        """The descriptor, for reading only: what is written past ``write`` is not noticed."""
        return self._fd

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; zeros past the end."""
        while len(view):
            length = calls.read_at(self._fd, view, offset)
            if not length:
                view[:] = zeros(len(view))
                return
            offset, view = offset + length, view[length:]

    def write(self, offset: int, data: Buffer) -> None:
        """Store all of ``data``."""
        self.write_all(offset, (data,))

    def write_all(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store all of ``buffers``, one after the other."""
        pending = [memoryview(data) for data in buffers if len(data)]
        try:
            while pending:
                written = calls.write_at(self._fd, pending[:_IOV_MAX], offset)
                if not written:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                offset += written
                while pending and written >= len(pending[0]):
                    written -= len(pending.pop(0))
                if written:
                    pending[0] = pending[0][written:]
        finally:
            self._changed(offset)


def resize(fd: int, access: BlockingIO, size: int, preallocation: str) -> None:
    """Give the file its new size; what grows is a hole, reserved or written, as asked."""
    old = os.fstat(fd).st_size
    try:
        if preallocation == "off" or size <= old:
            os.ftruncate(fd, size)
        else:
            _preallocate(fd, access, old, size, preallocation)
    except OSError:
        if os.fstat(fd).st_size > old:
            os.ftruncate(fd, old)
        raise


def _preallocate(fd: int, access: BlockingIO, old: int, size: int, preallocation: str) -> None:
    if preallocation == "falloc":
        try:
            calls.allocate(fd, old, size - old)
            return
        except UnsupportedError:
            # Where space cannot be reserved, writing zeros is what reserves it.
            pass
    for offset in range(old, size, _CHUNK):
        access.write(offset, zeros(min(_CHUNK, size - offset)))
    calls.flush(fd)
