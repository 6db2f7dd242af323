"""Locks on files that other processes, QEMU among them, see and respect (R9).

Byte ``100 + i`` is held by everybody who uses permission ``i``, byte ``200 + i`` by everybody who
does not let others use it. All locks are shared; whether one is in the way is found by looking.

1. New bytes are held before anybody else's are looked for: of two that come at once, at least one
   sees the other.
2. A refused change leaves the locks as they were.
"""

from __future__ import annotations

from typing import Final

from blocklayer.drivers.host import calls
from blocklayer.errors import LockedError, StorageError
from blocklayer.graph.permission import NAMES, Permission

_TAKEN_BASE: Final = 100
_UNSHARED_BASE: Final = 200


class FileLocks:
    """The locks of one open file."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._held: frozenset[int] = frozenset()

    def apply(self, taken: int, shared: int) -> None:
        """Hold what this needs. Raises LockedError, having changed nothing, if others forbid it."""
        wanted = _bytes(_TAKEN_BASE, taken) | _bytes(_UNSHARED_BASE, Permission.ALL & ~shared)
        added = wanted - self._held
        try:
            for byte in sorted(added):
                calls.lock(self._fd, byte, held=True)
            for byte in sorted(added):
                self._check(byte)
        except OSError as error:
            self._release(added)
            raise StorageError.from_os(
                error, f"Failed to lock '{self._path}'", self._path
            ) from error
        except LockedError:
            self._release(added)
            raise
        self._release(self._held - wanted)
        self._held = wanted

    def adopt(self, earlier: FileLocks) -> None:
        """Hold what ``earlier``, on the same file, holds, so that it can let go without a gap."""
        try:
            for byte in sorted(earlier._held):
                calls.lock(self._fd, byte, held=True)
        except OSError as error:
            raise StorageError.from_os(
                error, f"Failed to lock '{self._path}'", self._path
            ) from error
        self._held = earlier._held

    def _check(self, byte: int) -> None:
        ours = byte < _UNSHARED_BASE
        opposite = (
            byte + _UNSHARED_BASE - _TAKEN_BASE if ours else byte - _UNSHARED_BASE + _TAKEN_BASE
        )
        if not calls.locked_elsewhere(self._fd, opposite):
            return
        permission = NAMES[Permission(1 << byte % _TAKEN_BASE)]
        raise LockedError(
            f'Failed to get {"" if ours else "shared "}"{permission}" lock. '
            f"Is another process using the image [{self._path}]?"
        )

    def _release(self, unneeded: frozenset[int]) -> None:
        for byte in unneeded:
            calls.lock(self._fd, byte, held=False)


def _bytes(base: int, permissions: int) -> frozenset[int]:
    return frozenset(base + bit for bit in range(len(NAMES)) if permissions >> bit & 1)
