"""Pipes: reading and writing a descriptor that cannot seek, without blocking the loop.

1. Who waits for the other end can be cancelled: pipes, sockets and terminals are made non-blocking
   for that time, and are as before afterwards. Files never wait for another process.
2. A write is whole, or an error that says how much went before it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from types import TracebackType

from blocklayer.errors import StorageError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.waiting import offload
from blocklayer.units import MIB

_SET_PIPE_SIZE = getattr(fcntl, "F_SETPIPE_SZ", None)


class Pipe:
    """One end of a pipe, or whatever else ``descriptor`` is; use with ``with``. Names it ``name``
    in errors."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self.name = name
        self.done = 0
        """Bytes read or written so far."""
        mode = os.fstat(descriptor).st_mode
        self._waits = not (stat.S_ISREG(mode) or stat.S_ISBLK(mode))
        self._was_blocking = True
        if stat.S_ISFIFO(mode) and _SET_PIPE_SIZE is not None:
            try:
                fcntl.fcntl(descriptor, _SET_PIPE_SIZE, MIB)
            except OSError:
                # The user has no more room for large pipes: a small one does the same, slower.
                return

    def __enter__(self) -> Pipe:
        if self._waits:
            self._was_blocking = os.get_blocking(self.descriptor)
            os.set_blocking(self.descriptor, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waits:
            os.set_blocking(self.descriptor, self._was_blocking)

    async def read(self, view: memoryview) -> int:
        """Fill ``view``; less than its length is what there was before the end."""
        done = 0
        while done < len(view):
            try:
                count = await self._read_some(view[done:])
            except BlockingIOError:
                await self._ready(write=False)
                continue
            except OSError as error:
                raise StorageError.from_os(error, f"Could not read from {self.name}") from error
            if not count:
                break
            done += count
        self.done += done
        return done

    async def _read_some(self, view: memoryview) -> int:
        if self._waits:
            return os.readv(self.descriptor, [view])
        return await offload(os.readv, self.descriptor, [view])

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``. Raises StorageError."""
        view = memoryview(data)
        while view:
            try:
                count = await self._write_some(view)
            except BlockingIOError:
                await self._ready(write=True)
                continue
            except OSError as error:
                raise self._write_error(error) from error
            self.done += count
            view = view[count:]

    async def _write_some(self, view: memoryview) -> int:
        if self._waits:
            return os.write(self.descriptor, view)
        return await offload(os.write, self.descriptor, view)

    def _write_error(self, error: OSError) -> StorageError:
        if error.errno == errno.EPIPE:
            return StorageError(
                f"{self.name} was closed by its reader after {self.done} bytes", errno.EPIPE
            )
        return StorageError.from_os(
            error, f"Could not write to {self.name} after {self.done} bytes"
        )

    async def _ready(self, *, write: bool) -> None:
        """Wait until the other end has taken or given something, or is gone."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def note() -> None:
            if not ready.done():
                ready.set_result(None)

        add, remove = (
            (loop.add_writer, loop.remove_writer)
            if write
            else (loop.add_reader, loop.remove_reader)
        )
        add(self.descriptor, note)
        try:
            await ready
        finally:
            remove(self.descriptor)
