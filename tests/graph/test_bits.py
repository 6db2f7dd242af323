"""Rows of bits against sets of numbers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.graph.bits import Bits

LENGTHS = st.sampled_from((0, 1, 7, 8, 9, 63, 64, 65, 1000, 40_000, 100_003))
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("set", "clear", "resize", "merge")),
        st.integers(0, 110_000),
        st.one_of(st.integers(0, 3), st.integers(0, 110_000)),
    ),
    max_size=12,
)


def same(bits: Bits, model: set[int]) -> None:
    assert bits.count == len(model)
    assert len(bits.data) == (bits.length + 7) // 8
    assert int.from_bytes(bits.data, "little") == sum(1 << index for index in model)


def runs_of(model: set[int], first: int, end: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for index in sorted(model):
        if first <= index < end:
            if found and found[-1][1] == index:
                found[-1] = (found[-1][0], index + 1)
            else:
                found.append((index, index + 1))
    return found


@settings(deadline=None)
@given(LENGTHS, STEPS, st.integers(0, 100_003), st.integers(0, 100_003))
def test_as_a_set(length: int, steps: list[tuple[str, int, int]], low: int, high: int) -> None:
    bits, model = Bits(length), set[int]()
    for kind, first, size in steps:
        first = min(first, bits.length)
        end = min(first + size, bits.length)
        if kind == "set":
            fresh = set(range(first, end)) - model
            assert bits.set(first, end) == bool(fresh)
            model |= fresh
        elif kind == "clear":
            assert bits.clear(first, end) == bool(model & set(range(first, end)))
            model -= set(range(first, end))
        elif kind == "resize":
            bits.resize(size)
            model = {index for index in model if index < size}
        else:
            other = Bits(bits.length)
            other.set(first, end)
            copy = bits.copy()
            assert copy.merge(other) == (not set(range(first, end)) <= model)
            same(copy, model | set(range(first, end)))
        same(bits, model)
    low, high = min(low, bits.length), min(high, bits.length)
    assert list(bits.runs(low, high)) == runs_of(model, low, high)
    there = [low <= index and index in model for index in range(high)]
    if low < high:
        assert bits.next_set(low, high) == (there.index(True, low) if True in there else high)
        clear = False in there[low:]
        assert bits.next_clear(low, high) == (there.index(False, low) if clear else high)
    if low < bits.length:
        assert bits.get(low) == (low in model)


def test_bits_from_elsewhere_are_cut_at_the_length() -> None:
    bits = Bits(11)
    bits.data[:] = b"\xff\xff"
    bits.recount()
    same(bits, set(range(11)))
