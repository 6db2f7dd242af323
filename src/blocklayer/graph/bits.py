"""A long row of bits: set, cleared and searched by ranges, at the speed of whole blocks.

Public:
    Bits(length), Bits.recount()
    .length, .count, .set(first, end), .clear(first, end), .get(index), .runs(first, end)
    .next_set(first, end), .next_clear(first, end), .resize(length), .merge(other), .copy()
    .data (bit n is bit n % 8 of byte n // 8)

1. ``count`` is exact at all times; bits of the last byte past ``length`` are zero.
2. ``set`` and ``clear`` answer whether anything changed.
3. Whoever fills ``data`` directly calls ``recount`` before anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

_BLOCK: Final = 4096
_ZEROS: Final = bytes(_BLOCK)
_ONES: Final = b"\xff" * _BLOCK


class Bits:
    """``length`` bits, all zero at first."""

    __slots__ = ("count", "data", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.count = 0
        """How many are set."""
        self.data = bytearray((length + 7) >> 3)

    def recount(self) -> None:
        """``data`` has been filled from elsewhere."""
        self._trim()
        self.count = _population(self.data)

    def _trim(self) -> None:
        if self.length & 7:
            self.data[-1] &= (1 << (self.length & 7)) - 1

    def get(self, index: int) -> bool:
        """Whether bit ``index`` is set."""
        return bool(self.data[index >> 3] >> (index & 7) & 1)

    def set(self, first: int, end: int) -> bool:
        """Set ``[first, end)``; whether any was clear."""
        if end - first == 1:
            at, mask = first >> 3, 1 << (first & 7)
            if self.data[at] & mask:
                return False
            self.data[at] |= mask
            self.count += 1
            return True
        return self._change(first, end, 0xFF)

    def clear(self, first: int, end: int) -> bool:
        """Clear ``[first, end)``; whether any was set."""
        return self._change(first, end, 0)

    def _change(self, first: int, end: int, fill: int) -> bool:
        if first >= end:
            return False
        data = self.data
        low, high = first >> 3, (end - 1) >> 3
        head = 0xFF << (first & 7) & 0xFF
        tail = 0xFF >> (7 - ((end - 1) & 7))
        before = _population(data[low : high + 1])
        if low == high:
            self._change_byte(low, head & tail, fill)
        else:
            self._change_byte(low, head, fill)
            data[low + 1 : high] = (b"\xff" if fill else b"\0") * (high - low - 1)
            self._change_byte(high, tail, fill)
        change = _population(data[low : high + 1]) - before
        self.count += change
        return change != 0

    def _change_byte(self, at: int, mask: int, fill: int) -> None:
        self.data[at] = (self.data[at] & ~mask & 0xFF) | (fill & mask)

    def next_set(self, first: int, end: int) -> int:
        """The first set bit of ``[first, end)``, or ``end``."""
        return self._find(first, end, 0, _ZEROS)

    def next_clear(self, first: int, end: int) -> int:
        """The first clear bit of ``[first, end)``, or ``end``."""
        return self._find(first, end, 0xFF, _ONES)

    def _find(self, first: int, end: int, dull: int, block: bytes) -> int:
        """The first bit that differs from those of ``dull``, of which ``block`` is full."""
        if first >= end:
            return end
        data, at, stop = self.data, first >> 3, (end + 7) >> 3
        rest = (data[at] ^ dull) >> (first & 7)
        if rest:
            return min(end, first + (rest & -rest).bit_length() - 1)
        at += 1
        while at < stop:
            part = data[at : min(stop, at + _BLOCK)]
            if part != block[: len(part)]:
                at += len(part) - len(part.lstrip(block[:1]))
                rest = data[at] ^ dull
                return min(end, (at << 3) + (rest & -rest).bit_length() - 1)
            at += len(part)
        return end

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs (first, end) of set bits within ``[first, end)``."""
        while True:
            first = self.next_set(first, end)
            if first >= end:
                return
            stop = self.next_clear(first, end)
            yield first, stop
            first = stop

    def resize(self, length: int) -> None:
        """Cut bits off the end, or add clear ones."""
        size = (length + 7) >> 3
        shrinks = length < self.length
        self.length = length
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))
        del self.data[size:]
        if shrinks:
            self.recount()

    def merge(self, other: Bits) -> bool:
        """Set all bits that ``other``, of the same length, has set; whether any was clear."""
        if not other.count:
            return False
        before = self.count
        both = int.from_bytes(self.data, "little") | int.from_bytes(other.data, "little")
        self.data[:] = both.to_bytes(len(self.data), "little")
        self.count = both.bit_count()
        return self.count != before

    def copy(self) -> Bits:
        """The same bits once more."""
        other = Bits(0)
        other.length, other.count, other.data = self.length, self.count, self.data[:]
        return other


def _population(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "little").bit_count()
