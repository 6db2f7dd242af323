"""How often each host cluster is referenced: the census that ``check`` compares refcounts with.

Public:
    Recount                 counts by cluster, and which of them the active tables call "copied"
    COPIED_REFERENCE, SHARED_REFERENCE          flags of a reference from an active table
    WINDOW, WINDOW_BITS     clusters are kept in windows of this many

1. A window takes one byte a cluster, and none where nothing is referenced or where one contiguous
   run fills it: memory follows fragmentation, not size.
2. In a window's byte the low six bits are the count (``_MANY``: see ``_large``), the high two are
   the flags of all references so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

WINDOW_BITS: Final = 10
WINDOW: Final = 1 << WINDOW_BITS
_MASK: Final = WINDOW - 1

COPIED_REFERENCE: Final = 0x80
SHARED_REFERENCE: Final = 0x40
_COUNT: Final = 0x3F
_MANY: Final = 0x3F

_COUNTS: Final = bytes(byte & _COUNT for byte in range(256))
# Where the flags cannot be right if the refcount is what was counted.
_CONTRADICTS: Final = bytes(
    byte if byte & (SHARED_REFERENCE if byte & _COUNT == 1 else COPIED_REFERENCE) else 0
    for byte in range(256)
)
_EMPTY: Final = bytes(WINDOW)


class Recount:
    """References by cluster index; all start at none."""

    __slots__ = ("_large", "_uniform", "windows")

    def __init__(self) -> None:
        self.windows: dict[int, bytearray | bytes] = {}
        self._large: dict[int, int] = {}
        self._uniform: dict[int, bytes] = {}

    def _open(self, index: int) -> bytearray:
        """The window, such that it can be changed."""
        window = self.windows.get(index)
        if not isinstance(window, bytearray):
            window = self.windows[index] = bytearray(_EMPTY if window is None else window)
        return window

    def add(self, cluster: int, flag: int = 0, times: int = 1) -> None:
        """``times`` more references (or fewer)."""
        window = self._open(cluster >> WINDOW_BITS)
        at = cluster & _MASK
        old = window[at]
        count = old & _COUNT
        if count == _MANY:
            self._large[cluster] += times
            window[at] = old | flag
        elif count + times < _MANY:
            window[at] = (old + times) | flag
        else:
            self._large[cluster] = count + times
            window[at] = old | flag | _MANY

    def add_all(self, clusters: Iterable[int], flag: int = 0) -> None:
        """One more reference to each."""
        windows = self.windows
        first = 1 | flag
        for cluster in clusters:
            window = windows.get(cluster >> WINDOW_BITS)
            if type(window) is bytearray and not window[cluster & _MASK]:
                window[cluster & _MASK] = first
            else:
                self.add(cluster, flag)

    def add_run(self, cluster: int, count: int, flag: int = 0) -> None:
        """One more reference to each of ``count`` clusters from ``cluster`` on."""
        end = cluster + count
        while cluster < end:
            index, start = cluster >> WINDOW_BITS, cluster & _MASK
            stop = min(WINDOW, start + end - cluster)
            self._add_part(index, start, stop, flag)
            cluster += stop - start

    def _add_part(self, index: int, start: int, stop: int, flag: int) -> None:
        value, length = 1 | flag, stop - start
        if length == WINDOW and index not in self.windows:
            self.windows[index] = self._full(value)
            return
        window = self._open(index)
        if window[start:stop] != _EMPTY[:length]:
            for at in range(start, stop):
                self.add((index << WINDOW_BITS) | at, flag)
            return
        window[start:stop] = self._full(value)[:length]
        if stop == WINDOW and window == self._full(value):
            self.windows[index] = self._full(value)

    def _full(self, value: int) -> bytes:
        """A window of this value only; all such windows are one object."""
        return self._uniform.setdefault(value, bytes([value]) * WINDOW)

    def get(self, cluster: int) -> int:
        """References to ``cluster``."""
        window = self.windows.get(cluster >> WINDOW_BITS)
        if window is None:
            return 0
        count = window[cluster & _MASK] & _COUNT
        return self._large[cluster] if count == _MANY else count

    def counts(self, index: int) -> bytes | None:
        """The counts of a window as bytes, None if one of them does not fit in six bits."""
        counts = self.windows.get(index, _EMPTY).translate(_COUNTS)
        return None if _MANY in counts else bytes(counts)

    def contradicts(self, index: int) -> bool:
        """Whether a copied flag is wrong in the window, if refcounts are what was counted."""
        return any(self.windows.get(index, _EMPTY).translate(_CONTRADICTS))

    def above(self, limit: int) -> list[tuple[int, int]]:
        """Clusters with more than ``limit`` references, and how many each has."""
        found = [(cluster, count) for cluster, count in self._large.items() if count > limit]
        if limit < _MANY:
            for index, window in self.windows.items():
                counts = window.translate(_COUNTS)
                if max(counts) > limit:
                    found += [
                        ((index << WINDOW_BITS) + at, count)
                        for at, count in enumerate(counts)
                        if limit < count < _MANY
                    ]
        return sorted(found)

    @property
    def end(self) -> int:
        """The first cluster after all that are referenced."""
        for index in sorted(self.windows, reverse=True):
            used = bytes(self.windows[index].translate(_COUNTS)).rstrip(b"\0")
            if used:
                return (index << WINDOW_BITS) + len(used)
        return 0
