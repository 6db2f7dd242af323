"""Sets of file descriptors that clients hand in (``add-fd``), by number.

1. A set holds at least one descriptor; when the last one is removed the set is gone.
2. What is in a set is ours, and is closed when it is removed or the server ends.
"""

from __future__ import annotations

import os

import msgspec

from blocklayer.qmp.errors import CommandError


class HeldDescriptor(msgspec.Struct):
    """One descriptor in a set."""

    fd: int
    opaque: str | None


class DescriptorSets:
    """All sets of one server."""

    def __init__(self) -> None:
        self.sets: dict[int, list[HeldDescriptor]] = {}

    def add(self, fd: int, number: int | None, opaque: str | None) -> int:
        """Put ``fd`` into set ``number``, or the first free one; the number."""
        if number is None:
            number = next(n for n in range(len(self.sets) + 1) if n not in self.sets)
        self.sets.setdefault(number, []).append(HeldDescriptor(fd, opaque))
        return number

    def remove(self, number: int, fd: int | None) -> None:
        """Close one descriptor of a set, or all of them. Raises CommandError."""
        held = self.sets.get(number, [])
        gone = [entry for entry in held if fd is None or entry.fd == fd]
        if not gone:
            which = f"fdset-id:{number}" + ("" if fd is None else f", fd:{fd}")
            raise CommandError(f"File descriptor named '{which}' not found")
        for entry in gone:
            held.remove(entry)
            os.close(entry.fd)
        if not held:
            del self.sets[number]

    def close(self) -> None:
        """Close them all."""
        for number in list(self.sets):
            self.remove(number, None)
