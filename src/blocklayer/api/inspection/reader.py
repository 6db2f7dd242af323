"""Reading a file that may be hostile: positions as given, and no more bytes than allowed.

1. A file is opened without waiting and only if it is a regular file or a block device; pipes and
   other devices are refused before they are opened.
2. All reads together stay within ``LIMIT``; a read past an end of the file is short.
"""

from __future__ import annotations

import os
import stat
from types import TracebackType
from typing import Final

from blocklayer.errors import FormatError, StorageError, UsageError
from blocklayer.units import MIB

LIMIT: Final = 16 * MIB


class Reader:
    """One file, open for inspection; use with ``with``."""

    def __init__(self, path: str) -> None:
        doing = f"Could not open '{path}'"
        try:
            _check_kind(path, os.stat(path).st_mode)
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError.from_os(error, doing, path) from error
        except ValueError as error:
            raise UsageError(f"{doing}: {error}") from None
        self._left = LIMIT
        status = os.fstat(self._fd)
        try:
            # Once more: what the name stands for may have changed in between.
            _check_kind(path, status.st_mode)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise
        self.actual_size = status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``. Raises FormatError beyond the limit."""
        if offset < 0:
            offset, length = 0, length + offset
        length = max(0, min(length, self.size - offset))
        if not length:
            return b""
        self._left -= length
        if self._left < 0:
            raise FormatError(f"The headers take more than {LIMIT} bytes")
        try:
            return os.pread(self._fd, length, offset)
        except OSError as error:
            raise StorageError.from_os(error, f"Could not read at {offset:#x}") from error


def _check_kind(path: str, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(
            f"Could not open '{path}': it is neither a regular file nor a block device"
        )
