"""The seam: every call that only some systems have, here and nowhere else.

1. A call that this system, or this file's file system, lacks raises UnsupportedError; any other
   failure is an OSError. Callers have a portable way for the first.
2. With the seam closed (``available`` False) all of these calls are lacking and bytes move by seek,
   read and write: what runs then runs everywhere. ``BLOCKLAYER_PORTABLE=1`` closes it from outside.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from blocklayer.errors import UnsupportedError

available = sys.platform == "linux" and os.environ.get("BLOCKLAYER_PORTABLE") != "1"

Buffer = bytes | bytearray | memoryview

_LACKING: Final = frozenset(
    getattr(errno, name)
    for name in ("EOPNOTSUPP", "ENOTSUP", "ENOSYS", "ENOTTY", "EINVAL")
    if hasattr(errno, name)
)
"""What kernels and file systems answer to a call that they do not know."""

_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2
_FALLOC_ZERO_RANGE: Final = 16

_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_BLKGETSIZE64: Final = 0x80081272
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW: Final = 0x00800000
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_XATTR: Final = struct.Struct("=IIIII8x")
"""Flags, extent size, extents, project, copy-on-write extent size."""
_XFLAG_EXTSIZE: Final = 0x800

_FLOCK: Final = struct.Struct("hhqqi4x")
"""``struct flock``: type, whence, start, length, process."""

_seeking = threading.Lock()


def _lacking(what: str) -> UnsupportedError:
    return UnsupportedError(f"This system cannot {what}")


def _translate(error: OSError, what: str) -> Exception:
    return _lacking(what) if error.errno in _LACKING else error


def unbuffered_flag() -> int:
    """The flag for ``os.open`` that leaves the page cache out."""
    if not available or not hasattr(os, "O_DIRECT"):
        raise _lacking("leave its page cache out (cache.direct)")
    return os.O_DIRECT


def read_at(fd: int, view: memoryview, offset: int) -> int:
    """Read up to ``len(view)`` bytes at ``offset``; 0 at the end of the file."""
    if available:
        return os.preadv(fd, [view], offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def read_at_once(fd: int, view: memoryview, offset: int) -> int | None:
    """Like ``read_at``, but None where that would wait for the disk."""
    if not available or not hasattr(os, "RWF_NOWAIT"):
        raise _lacking("read without waiting")
    try:
        return os.preadv(fd, [view], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        raise _translate(error, "read without waiting") from error


def is_in_memory(fd: int) -> bool:
    """Whether the file lives in memory (tmpfs): reads never wait there."""
    if not available:
        return False
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            lines = [line.split() for line in mounts]
    except OSError:
        return False
    kinds = {line[line.index("-") + 1] for line in lines if line[2] == wanted}
    return bool(kinds) and kinds <= {"tmpfs", "ramfs"}


def write_at(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Write some of ``buffers`` at ``offset``; the answer is how many bytes."""
    if available:
        return os.pwritev(fd, buffers, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, buffers[0])


def flush(fd: int) -> None:
    """Data, and what is needed to find it again, is on stable storage when this returns."""
    if sys.platform == "darwin":
        import fcntl

        # There, fsync leaves the data in the drive's own cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def next_data(fd: int, offset: int) -> int | None:
    """Where data begins at or after ``offset``; None if only holes follow."""
    return _seek(fd, offset, "SEEK_DATA")


def next_hole(fd: int, offset: int) -> int | None:
    """Where a hole begins at or after ``offset`` (the end counts as one); None past the end."""
    return _seek(fd, offset, "SEEK_HOLE")


def _seek(fd: int, offset: int, whence: str) -> int | None:
    if not available:
        raise _lacking("tell holes from data")
    try:
        return os.lseek(fd, offset, getattr(os, whence))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise _translate(error, "tell holes from data") from error


@cache
def _fallocate() -> Callable[[int, int, int, int], None]:
    """``fallocate`` with modes, which ``os.posix_fallocate`` lacks."""
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is None:
        raise _lacking("allocate or free parts of a file")
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def call(fd: int, mode: int, offset: int, length: int) -> None:
        while function(fd, mode, offset, length):
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    return call


def _change(fd: int, mode: int, offset: int, length: int, what: str) -> None:
    if not available:
        raise _lacking(what)
    try:
        _fallocate()(fd, mode, offset, length)
    except OSError as error:
        raise _translate(error, what) from error


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the range's space back; it reads as zeros. The size stays."""
    _change(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length, "punch holes")


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeros and stay allocated; the file grows to hold it."""
    _change(fd, _FALLOC_ZERO_RANGE, offset, length, "zero a range")


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve space for the range, keeping what it holds; the file grows to hold it."""
    _change(fd, 0, offset, length, "reserve space")


def lock(fd: int, byte: int, *, held: bool) -> None:
    """Hold, or give up, a shared lock on one byte; it belongs to the open file, not the process."""
    import fcntl

    kind = fcntl.F_RDLCK if held else fcntl.F_UNLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def locked_elsewhere(fd: int, byte: int) -> bool:
    """Whether another open file description holds a lock on ``byte``."""
    import fcntl

    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def can_lock(fd: int) -> bool:
    """Whether locks that belong to the open file work on ``fd``."""
    if not available:
        return False
    try:
        locked_elsewhere(fd, 0)
    except (ImportError, AttributeError, OSError):
        return False
    return True


def _ioctl(fd: int, request: int, argument: Any, what: str) -> bytes:
    if not available:
        raise _lacking(what)
    import fcntl

    try:
        return bytes(fcntl.ioctl(fd, request, argument))
    except OSError as error:
        raise _translate(error, what) from error


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    try:
        size = _ioctl(fd, _BLKGETSIZE64, bytes(8), "ask a device for its size")
        return int.from_bytes(size, sys.byteorder)
    except UnsupportedError:
        return os.lseek(fd, 0, os.SEEK_END)


def device_discard(fd: int, offset: int, length: int) -> None:
    """Tell a block device that the range is of no more use."""
    _ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length), "discard on a device")


def device_zero(fd: int, offset: int, length: int) -> None:
    """Have a block device zero the range."""
    _ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length), "zero on a device")


def forbid_copy_on_write(fd: int) -> None:
    """Let the file system overwrite the (empty) file in place."""
    flags = _ioctl(fd, _FS_IOC_GETFLAGS, bytes(8), "read file flags")
    changed = int.from_bytes(flags, sys.byteorder) | _FS_NOCOW
    _ioctl(fd, _FS_IOC_SETFLAGS, changed.to_bytes(8, sys.byteorder), "set file flags")


def extent_size_hint(fd: int) -> int:
    """How many bytes the file system allocates at once for this file; 0 if nobody said."""
    attributes = _ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_XATTR.size), "read file attributes")
    flags, hint, *_ = _XATTR.unpack(attributes)
    return int(hint) if flags & _XFLAG_EXTSIZE else 0


def set_extent_size_hint(fd: int, hint: int) -> None:
    """Ask the file system to allocate ``hint`` bytes at once for this file."""
    attributes = _ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_XATTR.size), "read file attributes")
    flags, _, extents, project, cow = _XATTR.unpack(attributes)
    wanted = _XATTR.pack(flags | _XFLAG_EXTSIZE, hint, extents, project, cow)
    _ioctl(fd, _FS_IOC_FSSETXATTR, wanted, "set file attributes")
