"""Disks for synchronous callers: the same coroutines, driven in place.

1. A request that need not wait costs no loop and no thread: its coroutine runs to its end in place.
2. Operations that may take long can be called off (``cancel=``, Ctrl-C): see ``cancellation``.
3. One loop, made when first needed, serves all synchronous disks of a process; a lock lets one
   thread at a time drive it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from blocklayer.api import disk as aio
from blocklayer.api.bitmaps import Bitmaps as AsyncBitmaps
from blocklayer.api.cancellation import Cancellation, run_cancellable
from blocklayer.api.map import MapEntry
from blocklayer.graph import waiting
from blocklayer.graph.dirty_bitmap import BlockDirtyInfo
from blocklayer.graph.driver import Buffer, SnapshotInfo

if TYPE_CHECKING:
    from blocklayer.api.check import ImageCheck
    from blocklayer.api.info import ImageInfo
    from blocklayer.api.inspection.report import Inspection
    from blocklayer.api.results import Committed, Compared, Converted, Rebased
    from blocklayer.api.serving import Server
    from blocklayer.api.stream import Stream as AsyncStream
    from blocklayer.graph.driver import Measurement

T = TypeVar("T")


class _Driver:
    """Drives coroutines for synchronous callers of all threads, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result."""
        with self._lock:
            return waiting.run(coroutine, self._own_loop())

    def run_long(self, coroutine: Coroutine[Any, Any, T], cancel: Cancellation | None) -> T:
        """The result of a coroutine that can be called off."""
        with self._lock:
            return run_cancellable(self._own_loop(), coroutine, cancel)

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._pid != os.getpid():
            # A loop inherited over fork() would share its epoll descriptor with the parent.
            self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
        return self._loop


_driver = _Driver()
run = _driver.run
run_long = _driver.run_long


class Bitmaps:
    """The dirty bitmaps of a disk; see ``blocklayer.api.bitmaps.Bitmaps`` for each method."""

    def __init__(self, bitmaps: AsyncBitmaps) -> None:
        self._aio = bitmaps
        self.names = bitmaps.names
        self.add = bitmaps.add
        self.clear = bitmaps.clear
        self.enable = bitmaps.enable
        self.disable = bitmaps.disable

    def query(self) -> list[BlockDirtyInfo]:
        """What is known of each, newest first."""
        return run(self._aio.query())

    def remove(self, name: str) -> None:
        """Drop it, from the image as well."""
        run(self._aio.remove(name))

    def merge(self, name: str, *sources: str, of: Disk | None = None) -> None:
        """What any of ``sources`` calls changed is so in ``name``."""
        run(self._aio.merge(name, *sources, of=None if of is None else of.aio))

    def dirty(self, name: str, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """The changed parts (offset, length) of the range, in order, in bytes."""
        return run(self._aio.dirty(name, offset, length))


class Disk:
    """An open disk for synchronous callers; see ``blocklayer.aio.Disk`` for each method."""

    def __init__(self, disk: aio.Disk) -> None:
        self.aio = disk
        self.bitmaps = Bitmaps(disk.bitmaps)

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write back and close. Raises what could not be written."""
        run(self.aio.close())

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.aio.size

    @property
    def format(self) -> str:
        """The driver's name: ``"qcow2"``, ``"raw"``, …"""
        return self.aio.format

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``. Raises StorageError outside the disk."""
        return run(self.aio.read(offset, length))

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        run(self.aio.read_into(offset, buffer))

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Store ``data`` at ``offset``; with ``fua`` on stable storage when this returns."""
        run(self.aio.write(offset, data, fua=fua))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make the range read as zeros; ``unmap`` allows giving the space back to the host."""
        run(self.aio.write_zeroes(offset, length, unmap=unmap))

    def discard(self, offset: int, length: int) -> None:
        """The range's contents are of no more use."""
        run(self.aio.discard(offset, length))

    def flush(self) -> None:
        """All that was written before is on stable storage when this returns."""
        run(self.aio.flush())

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the size; ``shrink`` allows losing the tail."""
        run(self.aio.resize(size, preallocation=preallocation, shrink=shrink))

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots, oldest first."""
        return self.aio.snapshots()

    def create_snapshot(self, name: str) -> SnapshotInfo:
        """Keep what the disk holds now inside the image."""
        return run(self.aio.create_snapshot(name))

    def apply_snapshot(self, snapshot: str) -> None:
        """Let the disk hold, and be as large as, what it was at the snapshot of this id or name."""
        run(self.aio.apply_snapshot(snapshot))

    def delete_snapshot(self, snapshot: str) -> None:
        """Drop the internal snapshot of this id or, if there is none, of this name."""
        run(self.aio.delete_snapshot(snapshot))

    def amend(self, *, cancel: Cancellation | None = None, **options: Any) -> None:
        """Change what the image is; ``options`` go by the names of ``amend -o``."""
        run_long(self.aio.amend(**options), cancel)

    def info(self, *, limits: bool = False) -> ImageInfo:
        """What the image is: everything but guest data."""
        return self.aio.info(limits=limits)

    def check(self, *, repair: str | None = None, cancel: Cancellation | None = None) -> ImageCheck:
        """Whether the metadata is sound; ``repair`` "leaks" or "all" mends it."""
        return run_long(self.aio.check(repair=repair), cancel)

    def measure(self, format: str, **options: Any) -> Measurement:
        """How large the file of a new image of ``format`` with this disk's contents would be."""
        return run(self.aio.measure(format, **options))

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[MapEntry]:
        """Where the bytes of ``[offset, offset + length)`` live, run by run."""
        entries = self.aio.map(offset, length)
        while True:
            try:
                yield run(entries.__anext__())  # type: ignore[arg-type]
            except StopAsyncIteration:
                return


def open(image: aio.Image, **options: Any) -> Disk:
    """Open ``image`` for synchronous use; ``options`` as for ``blocklayer.aio.Disk.open``.

    >>> with blocklayer.open("overlay.qcow2", writable=True) as disk:
    ...     disk.write(0, b"hello")
    """
    return Disk(run(aio.Disk.open(image, **options)))


def create(filename: str | os.PathLike[str], size: int | str | None = None, **options: Any) -> None:
    """Make a new image; ``options`` as for ``blocklayer.aio.create``."""
    run(aio.create(filename, size, **options))


class Stream:
    """A new image as chunks of bytes: ``for chunk in stream``. Made by ``stream``."""

    def __init__(self, stream: AsyncStream) -> None:
        self.aio = stream

    @property
    def size(self) -> int | None:
        """Bytes of all chunks together (HTTP's Content-Length); None for vmdk, where only the end
        tells."""
        return self.aio.size

    def __iter__(self) -> Iterator[bytes]:
        chunks = self.aio.__aiter__()
        try:
            while True:
                try:
                    yield run(chunks.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            run(chunks.aclose())
            self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the disk, wherever the stream is."""
        run(self.aio.close())


def stream(disk: Disk, format: str = "qcow2", **options: Any) -> Stream:
    """What ``disk`` shows, as the bytes of a new image; see ``blocklayer.aio.stream``.

    >>> with blocklayer.open("disk.qcow2") as disk, blocklayer.stream(disk, compress=True) as image:
    ...     response.headers["Content-Length"] = image.size
    ...     for chunk in image:
    ...         response.write(chunk)
    """
    return Stream(run(aio.stream(disk.aio, format, **options)))


def inspect(path: str | os.PathLike[str], format: str | None = None, **options: Any) -> Inspection:
    """Look at an image without trusting it; ``options`` as for ``blocklayer.aio.inspect``."""
    from blocklayer.api.inspection.inspect import inspect as inspect_image

    return run(inspect_image(path, format, **options))


def clone(
    base: str | os.PathLike[str], *names: str | os.PathLike[str], **options: Any
) -> list[str]:
    """Make a qcow2 overlay of ``base`` under each of ``names``, in microseconds each; ``options``
    as for ``blocklayer.aio.clone``.
    """
    return run(aio.clone(base, *names, **options))


def convert(
    sources: aio.Image | Sequence[aio.Image],
    target: str | os.PathLike[str],
    *,
    cancel: Cancellation | None = None,
    **options: Any,
) -> Converted:
    """Make ``target`` hold what ``sources`` do; ``options`` as for ``blocklayer.aio.convert``."""
    from blocklayer.api.convert import convert

    return run_long(convert(sources, target, **options), cancel)


def commit(image: aio.Image, *, cancel: Cancellation | None = None, **options: Any) -> Committed:
    """Write an overlay into a base; ``options`` as for ``blocklayer.aio.commit``."""
    from blocklayer.api.commit import commit

    return run_long(commit(image, **options), cancel)


def rebase(
    image: aio.Image, backing: str | None, *, cancel: Cancellation | None = None, **options: Any
) -> Rebased:
    """Put an overlay on another backing file; ``options`` as for ``blocklayer.aio.rebase``."""
    from blocklayer.api.rebase import rebase

    return run_long(rebase(image, backing, **options), cancel)


def compare(
    one: aio.Image, other: aio.Image, *, cancel: Cancellation | None = None, **options: Any
) -> Compared:
    """Whether two disks hold the same; ``options`` as for ``blocklayer.aio.compare``."""
    from blocklayer.api.compare import compare

    return run_long(compare(one, other, **options), cancel)


def serve(image: aio.Image, uri: str, **options: Any) -> Server:
    """Serve ``image`` by NBD at ``uri`` until the server is closed; see ``blocklayer.aio.serve``.

    >>> with blocklayer.serve("disk.qcow2", "nbd+unix:///?socket=/tmp/disk.sock") as server:
    ...     subprocess.run(["nbdinfo", server.uri])
    """
    from blocklayer.api.serving import Server

    return Server(image, uri, **options)
