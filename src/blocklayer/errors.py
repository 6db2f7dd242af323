"""The error tree: what went wrong, told apart by what the caller can do about it.

    BlockError                 anything this package reports on purpose
    ├── UsageError             the request itself is wrong: option, name, size, combination
    ├── PolicyError            the gate refused to open what an image names
    ├── LockedError            another process or another user of the node holds it
    ├── UnsupportedError       valid, but this driver or this image cannot do it
    ├── FormatError            the image's structure is invalid where it was read
    │   └── CorruptionError    metadata contradicts itself; the image was, or should be, marked
    │                          corrupt
    ├── CancelledError         the caller called a long operation off
    ├── ProtocolError          a peer on the network does not speak its protocol
    └── StorageError           the host refused: errno kept (EIO, ENOSPC, ENOENT, …)

1. A message names the file or node, the offset in hex where there is one, and what to do next if
   that is known.
2. ``StorageError.errno`` is always set, so that servers can answer in their wire's terms.
"""

from __future__ import annotations

import errno as _errno
import os


class BlockError(Exception):
    """Base of everything this package raises on purpose. ``str()`` is one line for a person."""

    errno: int = _errno.EIO

    def reworded(self, message: str) -> BlockError:
        """The same kind of error, with ``message`` in place of its own."""
        return type(self)(message)


class UsageError(BlockError):
    """The caller asked for something that cannot be asked: nothing was touched."""

    errno = _errno.EINVAL


class PolicyError(BlockError):
    """The policy in force forbids opening a file that an image names."""

    errno = _errno.EPERM


class LockedError(BlockError):
    """A lock or permission of another user stands in the way."""

    errno = _errno.EAGAIN


class UnsupportedError(BlockError):
    """A valid request that this driver, version or image cannot carry out."""

    errno = _errno.ENOTSUP


class CancelledError(BlockError):
    """The caller called the operation off; what it leaves is what the operation's own page says."""

    errno = _errno.ECANCELED


class FormatError(BlockError):
    """The image is not what its format requires."""

    errno = _errno.EINVAL


class CorruptionError(FormatError):
    """Metadata that contradicts itself: reading on would return wrong data."""

    errno = _errno.EIO


class ProtocolError(BlockError):
    """A peer does not speak as the protocol requires: nothing more it says can be trusted."""

    errno = _errno.EPROTO


class StorageError(BlockError):
    """The host's storage failed; ``errno`` says how, ``path`` where."""

    def __init__(self, message: str, errno: int, path: str | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.path = path

    def reworded(self, message: str) -> StorageError:
        """The same failure, with ``message`` in place of its own."""
        return StorageError(message, self.errno, self.path)

    @classmethod
    def from_os(cls, error: OSError, doing: str, path: str | None = None) -> StorageError:
        """Wrap ``error`` met while ``doing`` ("Could not open 'a.raw'")."""
        number = error.errno or _errno.EIO
        return cls(f"{doing}: {os.strerror(number)}", number, path)
