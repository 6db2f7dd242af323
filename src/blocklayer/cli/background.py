"""Serving in the background: a process that outlives the one that was started, and pid files."""

from __future__ import annotations

import os
from collections.abc import Callable

from blocklayer.errors import StorageError


def in_background(serve: Callable[[int], int]) -> int:
    """Call ``serve`` in another process; this one ends when that is ready, or has failed.

    ``serve`` gets what ``detach`` takes when everything is set up; the answer is an exit code.
    """
    ours, theirs = os.pipe()
    if os.fork():
        os.close(theirs)
        # Nothing comes when it failed; what was wrong is said already.
        return 0 if os.read(ours, 1) else 1
    os.close(ours)
    os.setsid()
    return serve(theirs)


def detach(ready: int) -> None:
    """Everything is set up: tell the first process, and let go of the terminal."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(ready, b"1")
    os.close(ready)


class PidFile:
    """A file with our process id, locked as long as we live."""

    def __init__(self, path: str) -> None:
        import fcntl

        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError.from_os(error, f"cannot create PID file '{path}'", path) from None
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, b"%d\n" % os.getpid())
        except OSError as error:
            os.close(self._descriptor)
            raise StorageError.from_os(error, f"cannot create PID file '{path}'", path) from None

    def remove(self) -> None:
        """We end."""
        os.unlink(self._path)
        os.close(self._descriptor)
