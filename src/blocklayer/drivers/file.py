"""``file`` and ``host_device``: images in files and on block devices of this machine.

1. A read or write moves all of its bytes or raises; past the end of the file there are zeros. The
   size shown is rounded up to whole sectors.
2. Where other tasks run on the loop, nothing waits for the disk on it: what the page cache cannot
   serve goes to a thread. (So ``aio`` changes nothing: all of its values mean this.)
3. After a failed flush nobody knows which pages reached the disk: no more writes are taken (R4).
4. The permissions in use are shown as locks to other processes, and theirs are respected (R9).
5. What is remembered of holes is dropped by every change that this node makes.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from blocklayer.drivers.host import calls
from blocklayer.drivers.host.fileio import BlockingIO, FileIO, resize
from blocklayer.drivers.host.locks import FileLocks
from blocklayer.errors import StorageError, UnsupportedError, UsageError
from blocklayer.graph.driver import Buffer, DriverInfo, ProtocolDriver, ThreadSafeIO
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.io import zeros
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.graph.options import NodeOptions, Size
from blocklayer.graph.permission import Permission
from blocklayer.graph.request import Claim, Claims
from blocklayer.graph.waiting import in_place, offload
from blocklayer.units import KIB, MAX_SIZE, MIB, SECTOR, align_up

if TYPE_CHECKING:
    from blocklayer.drivers.host.direct import DirectIO
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

_INLINE_WRITE = 64 * KIB
"""A write up to this size goes to the page cache at once; copying more would hold up the loop."""

_DEFAULT_EXTENT_SIZE_HINT = MIB


class FileOptions(NodeOptions):
    """``locking``: show and respect locks, which ``auto`` does wherever the system can."""

    filename: str = ""
    locking: Literal["auto", "on", "off"] = "auto"
    aio: Literal["threads", "native", "io_uring"] = "threads"


class FileCreateOptions(AnyCreateOptions):
    """What creating a file takes."""

    extent_size_hint: Annotated[
        Size, Meta(description="Extent size hint for the image file, 0 to disable")
    ] = _DEFAULT_EXTENT_SIZE_HINT
    nocow: Annotated[bool, Meta(description="Turn off copy-on-write (valid only on btrfs)")] = False
    preallocation: Annotated[
        Literal["off", "metadata", "falloc", "full"],
        Meta(description="Preallocation mode (allowed values: off, falloc, full)"),
    ] = "off"


class FileInformation(msgspec.Struct, rename="kebab", omit_defaults=True):
    """What only the file system knows of an image."""

    extent_size_hint: int | None = None


class FileDriver(ProtocolDriver):
    """A regular file."""

    NAME = "file"
    Options = FileOptions
    CreateOptions: ClassVar[type[AnyCreateOptions] | None] = FileCreateOptions

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        options = node.options
        assert isinstance(options, FileOptions)
        self._path = options.filename
        self._fd = -1
        self._size = 0
        self._growing = threading.Lock()
        self._locks: FileLocks | None = None
        self._direct: DirectIO | None = None
        self._blocks = Claims()
        """Blocks that unbuffered access is reading, changing and writing back."""
        self._reads_at_once = True
        self._never_waits = False
        # The last answer of `map`, good while `_state` is the object that it was made with.
        self._state = object()
        self._run: tuple[object, int, int, Kind] = (None, 0, 0, Kind.DATA)
        self._lacking: set[Callable[[int, int], None]] = set()

    async def open(self) -> None:
        """Open the file as the node's flags say."""
        options = self.node.options
        assert isinstance(options, FileOptions)
        if not self._path:
            raise UsageError(f"The '{self.NAME}' block driver requires a file name")
        if options.aio == "native" and not self.node.flags.direct:
            raise UsageError("aio=native was specified, but it requires cache.direct=on")
        self._fd = self._open_file()
        try:
            self._check_kind(os.fstat(self._fd).st_mode)
            self._size = self._measure()
            if options.locking != "off":
                self._locks = self._prepare_locks(options.locking == "on")
            if self.node.flags.direct:
                from blocklayer.drivers.host.direct import DirectIO

                self._direct = DirectIO(self._fd, self._path, self._changed)
                self.request_alignment = self._direct.alignment
        except BaseException:
            os.close(self._fd)
            raise
        self._io = FileIO(self._fd, self._changed)
        self._access: BlockingIO = self._direct or self._io

    def _open_file(self) -> int:
        flags, doing = self.node.flags, f"Could not open '{self._path}'"
        try:
            # Looked at first: opening a pipe would wait, opening a device may do things.
            self._check_kind(os.stat(self._path).st_mode)
            mode = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            if flags.direct:
                mode |= calls.unbuffered_flag()
            if flags.read_only:
                return os.open(self._path, mode | os.O_RDONLY)
            try:
                return os.open(self._path, mode | os.O_RDWR)
            except OSError as error:
                refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
                if not (refused and flags.auto_read_only):
                    raise
                file = os.open(self._path, mode | os.O_RDONLY)
                flags.read_only = True
                return file
        except OSError as error:
            raise StorageError.from_os(error, doing, self._path) from error
        except ValueError as error:
            raise StorageError(f"{doing}: {error}", errno.EINVAL, self._path) from None

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise StorageError(
                f"'{self.NAME}' driver requires '{self._path}' to be a regular file",
                errno.EINVAL,
                self._path,
            )

    def _measure(self) -> int:
        return align_up(os.fstat(self._fd).st_size, SECTOR)

    def _prepare_locks(self, required: bool) -> FileLocks | None:
        if calls.can_lock(self._fd):
            return FileLocks(self._fd, self._path)
        if required:
            raise UnsupportedError(f"'{self._path}' cannot be locked here (locking=on)")
        return None

    async def close(self) -> None:
        """Close the file, which gives its locks back."""
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:
            # Some file systems report here that an earlier write was lost.
            raise StorageError.from_os(error, f"Closing '{self._path}'", self._path) from error

    @property
    def size(self) -> int:
        """Bytes in the file, in whole sectors."""
        return self._size

    @property
    def filename(self) -> str:
        """The path, as given."""
        return self._path

    def identity(self) -> object:
        """The file's place in its file system."""
        status = os.fstat(self._fd)
        return status.st_dev, status.st_ino

    @classmethod
    def identity_of(cls, options: Mapping[str, Any]) -> object | None:
        """The file's place in its file system."""
        try:
            status = os.stat(str(options.get("filename")))
        except (OSError, ValueError):
            return None
        return status.st_dev, status.st_ino

    def actual_size(self) -> int:
        """Bytes that the file system has allocated."""
        status = os.fstat(self._fd)
        return getattr(status, "st_blocks", -(-status.st_size // SECTOR)) * SECTOR

    def info(self) -> DriverInfo:
        """No clusters, nothing dirty."""
        return DriverInfo()

    def specific_info(self) -> msgspec.Struct:
        """The extent size hint, where one is set."""
        try:
            return FileInformation(calls.extent_size_hint(self._fd) or None)
        except (UnsupportedError, OSError):
            return FileInformation()

    def apply_permissions(self, taken: int, shared: int) -> None:
        """Show them as locks. With ``force-share`` nobody is kept from anything."""
        if self._locks is not None:
            self._locks.apply(taken, Permission.ALL if self.node.flags.force_share else shared)

    def take_over(self, old: ProtocolDriver) -> None:
        """The locks."""
        assert isinstance(old, FileDriver)
        if self._locks is not None and old._locks is not None:
            self._locks.adopt(old._locks)

    def thread_safe_io(self) -> ThreadSafeIO | None:
        """The file itself, unless its accesses need care with alignment."""
        return None if self._direct is not None else self._io

    def _changed(self, end: int = 0) -> None:
        """Contents have changed, up to ``end`` at most; any thread may say so."""
        self._state = object()
        if end > self._size:
            with self._growing:
                self._size = max(self._size, align_up(end, SECTOR))

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``: from the page cache at once, else in a thread."""
        try:
            if self._direct is not None:
                await offload(self._direct.read_into, offset, view)
                return
            if in_place() or self._never_waits:
                self._io.read_into(offset, view)
                return
            done = self._read_at_once(offset, view)
            if done < len(view):
                await offload(self._io.read_into, offset + done, view[done:])
        except OSError as error:
            raise self._failure(error, "Reading", offset, len(view)) from error

    def _read_at_once(self, offset: int, view: memoryview) -> int:
        """Read what needs no waiting; the answer is how many bytes that was."""
        done = 0
        while done < len(view) and self._reads_at_once:
            try:
                length = calls.read_at_once(self._fd, view[done:], offset + done)
            except UnsupportedError:
                self._reads_at_once = False
                self._never_waits = calls.is_in_memory(self._fd)
                break
            if length is None:
                break
            if not length:
                view[done:] = zeros(len(view) - done)
                return len(view)
            done += length
        return done

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache, if it has all of it."""
        if self._direct is not None:
            return False
        try:
            if self._reads_at_once:
                return self._read_at_once(offset, view) == len(view)
            if self._never_waits:
                self._io.read_into(offset, view)
        except OSError as error:
            raise self._failure(error, "Reading", offset, len(view)) from error
        return self._never_waits

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store ``data`` in the page cache, unless it is so much that others would have to wait."""
        # Memory takes as much as fits in a moment; a disk's page cache may make us wait for room.
        if self._direct is not None or len(data) > (MIB if self._never_waits else _INLINE_WRITE):
            return False
        try:
            self._io.write_all(offset, (data,))
        except OSError as error:
            raise self._failure(error, "Writing", offset, len(data)) from error
        return True

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store all of ``buffers``."""
        self.node.check_writable()
        length = sum(len(data) for data in buffers)
        try:
            if self._direct is not None:
                await self._write_direct(self._direct, offset, b"".join(buffers))
            elif length <= _INLINE_WRITE or in_place():
                self._io.write_all(offset, buffers)
            else:
                await offload(self._io.write_all, offset, buffers)
        except OSError as error:
            raise self._failure(error, "Writing", offset, length) from error

    async def _write_direct(self, direct: DirectIO, offset: int, data: bytes) -> None:
        async with self._hold(offset, len(data)):
            await offload(direct.write, offset, data)

    def _hold(self, offset: int, length: int) -> Claim:
        """Keep others off blocks that are read, changed and written back."""
        if self._direct is None:
            return self._blocks.claim(0, 0)
        start, end = self._direct.span(offset, length)
        # Past the end of the file padding is cut off again: nobody may write behind it.
        return self._blocks.claim(start, end if end <= self._size else MAX_SIZE)

    def _failure(self, error: OSError, doing: str, offset: int, length: int) -> StorageError:
        return StorageError.from_os(
            error, f"{doing} {length:#x} bytes at {offset:#x} of '{self._path}'", self._path
        )

    async def map(self, offset: int, length: int) -> Extent:
        """Data and holes, as the file system tells them."""
        if offset >= self._size:
            return Extent(offset, length, Kind.ZERO, offset, writable=True)
        state, start, end, kind = self._run
        if state is not self._state or not start <= offset < end:
            state = self._state
            kind, end = self._find_run(offset)
            self._run = (state, offset, end, kind)
        return Extent(offset, min(length, end - offset), kind, offset, writable=True)

    def _find_run(self, offset: int) -> tuple[Kind, int]:
        """What is at ``offset``, and where that ends."""
        size = self._size
        try:
            data = calls.next_data(self._fd, offset)
            if data is None or data > offset:
                return Kind.ZERO, size if data is None else min(data, size)
            hole = calls.next_hole(self._fd, offset)
        except UnsupportedError:
            return Kind.DATA, size
        except OSError as error:
            raise self._failure(error, "Looking for holes in", offset, 0) from error
        # The end of the file counts as a hole, even one within its last sector.
        return Kind.DATA, size if hole is None else min(hole, size)

    async def flush(self) -> None:
        """``fdatasync``."""
        if self.node.poisoned is not None:
            self.node.check_writable()
        try:
            await offload(calls.flush, self._fd)
        except OSError as error:
            self.node.poison(f"flushing it failed ({os.strerror(error.errno or errno.EIO)})")
            raise StorageError.from_os(error, f"Flushing '{self._path}'", self._path) from error

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero in the file system's records, without moving data."""
        ways: list[Callable[[int, int], None]] = [self._zero_in_place, self._free_and_reserve]
        if unmap:
            ways.insert(0, self._free)
        await self._modify("Zeroing", ways, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Punch a hole."""
        await self._modify("Discarding", [self._punch], offset, length)

    async def _modify(
        self, doing: str, ways: list[Callable[[int, int], None]], offset: int, length: int
    ) -> None:
        """Go the first of ``ways`` that the file system has."""
        self.node.check_writable()
        if not length:
            return
        for way in ways:
            if way in self._lacking:
                continue
            try:
                async with self._hold(offset, length):
                    await offload(way, offset, length)
                return
            except UnsupportedError:
                self._lacking.add(way)
            except OSError as error:
                raise self._failure(error, doing, offset, length) from error
            finally:
                self._changed()
        raise UnsupportedError(f"The file system of '{self._path}' has no fast way: {doing}")

    def _punch(self, offset: int, length: int) -> None:
        calls.punch_hole(self._fd, offset, length)

    def _free(self, offset: int, length: int) -> None:
        self._extend(offset + length)
        calls.punch_hole(self._fd, offset, length)

    def _zero_in_place(self, offset: int, length: int) -> None:
        calls.zero_range(self._fd, offset, length)
        self._changed(offset + length)

    def _free_and_reserve(self, offset: int, length: int) -> None:
        # A hole alone would give space back that nobody allowed to give.
        self._free(offset, length)
        calls.allocate(self._fd, offset, length)

    def _extend(self, end: int) -> None:
        """Let the file reach ``end``. Not by ``truncate``: others may be writing past it."""
        if end > os.fstat(self._fd).st_size:
            calls.allocate(self._fd, end - 1, 1)
            self._changed(end)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the file's size."""
        self.node.check_writable()
        if preallocation == "metadata":
            raise UnsupportedError(f"Unsupported preallocation mode '{preallocation}'")
        if size < os.fstat(self._fd).st_size:
            if not shrink:
                raise UsageError(
                    f"Shrinking '{self._path}' from {self._size} to {size} bytes would lose data"
                )
            if preallocation != "off":
                raise UsageError("Preallocation can't be used for shrinking files")
        try:
            async with self._hold(0, MAX_SIZE):
                await offload(resize, self._fd, self._access, size, preallocation)
        except OSError as error:
            raise StorageError.from_os(
                error, f"Could not resize '{self._path}' to {size} bytes", self._path
            ) from error
        finally:
            with self._growing:
                self._size = self._measure()
            self._changed()

    @classmethod
    async def create(cls, graph: Graph, filename: str, options: AnyCreateOptions) -> None:
        """Make an empty file of ``options.size`` zeros, or empty one that exists."""
        assert isinstance(options, FileCreateOptions)
        if options.preallocation == "metadata":
            raise UsageError(f"Unsupported preallocation mode '{options.preallocation}'")
        try:
            existed = os.path.lexists(filename)
            # Not emptied while it is opened: it may be somebody's running disk.
            mode = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            fd = os.open(filename, os.O_RDWR | os.O_CREAT | mode, 0o644)
            try:
                await offload(_fill_new, fd, filename, options)
            except BaseException:
                if not existed:
                    os.unlink(filename)
                raise
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            doing = f"Could not create '{filename}'"
            if isinstance(error, ValueError):
                raise UsageError(f"{doing}: {error}") from None
            raise StorageError.from_os(error, doing, filename) from error


def _fill_new(fd: int, path: str, options: FileCreateOptions) -> None:
    if calls.can_lock(fd):
        taken = Permission.WRITE | Permission.RESIZE
        FileLocks(fd, path).apply(taken, Permission.ALL & ~Permission.RESIZE)
    os.ftruncate(fd, 0)
    try:
        if options.nocow:
            calls.forbid_copy_on_write(fd)
        if options.extent_size_hint:
            calls.set_extent_size_hint(fd, options.extent_size_hint)
    except (UnsupportedError, OSError):
        # Hints: a file system that has no such thing stores the file in its own way.
        pass
    resize(fd, FileIO(fd, lambda end: None), align_up(options.size, SECTOR), options.preallocation)
