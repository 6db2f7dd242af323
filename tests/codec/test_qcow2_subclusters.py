"""Subcluster bitmaps: what they say of each subcluster, and what they must not say."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ClusterKind, store_table
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.subclusters import (
    ALLOCATED,
    COUNT,
    ZEROED,
    between,
    bitmap_problem,
    load_l2_table,
    run_end,
    store_l2_table,
    subcluster_kind,
    uniform,
)
from blocklayer.drivers.qcow2.check_bitmaps import Contradictions

GEOMETRY = Geometry.make(16, extended_l2=True)
IN_DATA_FILE = Geometry.make(16, extended_l2=True, data_file=True)
HOST = COPIED | 0x50000

halves = st.one_of(
    st.sampled_from((0, 1, 1 << 31, ALLOCATED, ALLOCATED - 1, 0x0FFFFFF0)),
    st.integers(0, ALLOCATED),
)
bitmaps = st.builds(lambda low, high: low | (high & ~low) << COUNT, halves, halves)
words = st.one_of(
    st.sampled_from((0, HOST, COMPRESSED | 5, COPIED, 1, 1 << 9, 1 << 55)),
    st.integers(0, (1 << 64) - 1),
)


def state(bitmap: int, index: int) -> tuple[int, int]:
    """The two bits of one subcluster."""
    return bitmap >> index & 1, bitmap >> (COUNT + index) & 1


@given(bitmaps, st.integers(0, COUNT - 1))
@example(0, 0)
@example(ALLOCATED, 31)
@example(ZEROED, 0)
def test_runs_end_where_the_state_changes(bitmap: int, index: int) -> None:
    end = run_end(bitmap, index)
    assert index < end <= COUNT
    assert all(state(bitmap, at) == state(bitmap, index) for at in range(index, end))
    assert end == COUNT or state(bitmap, end) != state(bitmap, index)
    alike = uniform(bitmap, index)
    assert all(state(alike, at) == state(bitmap, index) for at in range(COUNT))


@given(bitmaps, st.integers(0, COUNT - 1))
def test_kinds(bitmap: int, index: int) -> None:
    allocated, zeroed = state(bitmap, index)
    with_cluster = subcluster_kind(HOST, bitmap, index, GEOMETRY)
    if allocated:
        assert with_cluster is ClusterKind.NORMAL
        return
    without = subcluster_kind(0, bitmap & ZEROED, index, GEOMETRY)
    if zeroed:
        assert (with_cluster, without) == (ClusterKind.ZERO_ALLOC, ClusterKind.ZERO_PLAIN)
    else:
        assert with_cluster is without is ClusterKind.UNALLOCATED


@pytest.mark.parametrize(
    ("entry", "bitmap", "problem"),
    [
        (0, 0, None),
        (0, ZEROED, None),
        (HOST, 0, None),
        (HOST, 0xFFFF | 0xFFFF << 48, None),
        (COMPRESSED | 7, 0, None),
        (HOST, 1 | 1 << COUNT, "allocated and zero at once"),
        (0, 1, "subclusters of no cluster allocated"),
        (COPIED, 1, "subclusters of no cluster allocated"),
        (COMPRESSED | 7, 1 << COUNT, "compressed cluster with subcluster bitmap"),
    ],
)
def test_contradictions(entry: int, bitmap: int, problem: str | None) -> None:
    found = bitmap_problem(entry, bitmap, GEOMETRY)
    assert (found is None) == (problem is None)
    assert problem is None or problem in str(found)


def test_the_first_cluster_of_a_data_file_lies_at_0() -> None:
    assert bitmap_problem(COPIED, 1, IN_DATA_FILE) is None
    assert bitmap_problem(0, 1, IN_DATA_FILE) is not None
    held = [subcluster_kind(entry, 1 << COUNT, 0, IN_DATA_FILE) for entry in (COPIED, 0)]
    assert held == [ClusterKind.ZERO_ALLOC, ClusterKind.ZERO_PLAIN]


@given(st.lists(st.tuples(words, st.one_of(bitmaps, words)), min_size=1, max_size=40))
@example([(OFFSET_MASK, ALLOCATED)])
@example([(COPIED, ZEROED), (COPIED, 1)])
def test_whole_tables_are_judged_as_their_entries_are(pairs: list[tuple[int, int]]) -> None:
    contradicts = any(bitmap_problem(entry, bitmap, GEOMETRY) for entry, bitmap in pairs)
    entries, beside = (store_table(array("Q", column)) for column in zip(*pairs, strict=True))
    assert Contradictions(len(pairs)).any(entries, beside) == contradicts


@given(st.lists(words, min_size=2, max_size=32).filter(lambda found: len(found) % 2 == 0))
def test_tables_come_apart_and_together(found: list[int]) -> None:
    data = store_table(array("Q", found))
    entries, beside = load_l2_table(data, GEOMETRY)
    assert entries.tolist() == found[::2]
    assert beside is not None
    assert beside.tolist() == found[1::2]
    assert store_l2_table(entries, beside) == data
    plain, none = load_l2_table(data, Geometry.make(16))
    assert (plain.tolist(), none) == (found, None)
    assert store_l2_table(plain, none) == data


@given(st.integers(0, COUNT), st.integers(0, COUNT))
def test_between(first: int, end: int) -> None:
    first, end = sorted((first, end))
    assert between(first, end) == sum(1 << at for at in range(first, end))
