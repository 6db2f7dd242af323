"""Planning copies: pieces become chunks that cover them exactly, in whole units where they can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.graph.root import Root
from blocklayer.jobs.plan import (
    Chunk,
    Gatherer,
    Piece,
    data_ranges,
    side_by_side,
    sparse_size_error,
)
from blocklayer.units import KIB

SOURCE = cast(Root, object())
"""What a piece of data comes from; never read here."""


async def stream(pieces: list[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


@st.composite
def plans(draw: st.DrawFn) -> list[Piece]:
    """Pieces of data and of zeros, some with gaps between them."""
    pieces, offset = [], draw(st.sampled_from((0, 512, 4096)))
    for _ in range(draw(st.integers(0, 12))):
        offset += draw(st.sampled_from((0, 0, 512, 3 * 512, 8192)))
        length = draw(st.sampled_from((512, 1024, 2048, 4096, 5 * 512, 20000 // 512 * 512)))
        source = draw(st.sampled_from((SOURCE, SOURCE, None)))
        pieces.append(Piece(offset, length, source, offset))
        offset += length
    return pieces


def gather(pieces: list[Piece], gatherer: Gatherer) -> list[Chunk]:
    async def all_chunks() -> list[Chunk]:
        return [chunk async for chunk in gatherer.chunks(stream(pieces))]

    return asyncio.run(all_chunks())


@given(
    plans(),
    st.sampled_from((1, 512, 2048, 8192)),
    st.sampled_from((2048, 8192, 65536)),
    st.booleans(),
    st.booleans(),
)
def test_chunks_cover_the_pieces_once(
    pieces: list[Piece], unit: int, limit: int, zeros_known: bool, materialise: bool
) -> None:
    gatherer = Gatherer(unit, limit, zeros_known=zeros_known, materialise=materialise)
    chunks = gather(pieces, gatherer)
    wanted = {at: p.source for p in pieces for at in range(p.offset, p.end, 512)}
    found: dict[int, object] = {}
    for chunk in chunks:
        assert chunk.length <= gatherer.limit
        assert chunk.length == sum(segment.end - segment.offset for segment in chunk.segments)
        for at, piece in chunk.placed():
            assert at + piece.length <= gatherer.limit
            for offset in range(piece.offset, piece.end, 512):
                assert offset not in found
                found[offset] = piece.source
                if piece.source is not None:
                    assert piece.source_offset == piece.offset
        for start, end in chunk.zeros:
            for offset in range(start, end, 512):
                assert offset not in found
                found[offset] = None
    for offset, source in wanted.items():
        if source is not None or materialise or not zeros_known:
            assert found[offset] is source
    assert found.keys() <= wanted.keys()
    assert sum(chunk.covered for chunk in chunks) == sum(piece.length for piece in pieces)


@given(plans(), st.sampled_from((512, 2048, 8192)), st.sampled_from((8192, 65536)))
def test_no_unit_is_filled_from_two_segments_of_one_chunk(
    pieces: list[Piece], unit: int, limit: int
) -> None:
    for chunk in gather(pieces, Gatherer(unit, limit)):
        units: set[int] = set()
        for segment in chunk.segments:
            mine = set(range(segment.offset // unit, (segment.end - 1) // unit + 1))
            assert not mine & units
            units |= mine


def test_zeros_beside_data_fill_its_units() -> None:
    pieces = [Piece(0, 10000), Piece(10000, 100, SOURCE, 10000), Piece(10100, 90000)]
    (chunk,) = gather(pieces, Gatherer(4096, 65536, zeros_known=True))
    assert [(segment.offset, segment.end) for segment in chunk.segments] == [(8192, 12288)]


@given(st.integers(0, 40000), st.lists(st.integers(0, 39999), max_size=6), st.data())
def test_data_ranges_leave_out_only_zeros(
    length: int, marks: list[int], data: st.DataObject
) -> None:
    sparse_size = data.draw(st.sampled_from((0, 512, 4096, 12288)))
    content = bytearray(length)
    for mark in marks:
        if mark < length:
            content[mark] = 1
    ranges = data_ranges(memoryview(content), sparse_size)
    covered = bytearray(length)
    for start, end in ranges:
        assert 0 <= start < end <= length
        covered[start:end] = b"x" * (end - start)
    assert all(covered[at] for at, byte in enumerate(content) if byte)
    holes = covered.split(b"x")
    assert all(len(hole) >= sparse_size for hole in holes[1:-1] if hole)
    if not sparse_size:
        assert all(covered)
    if not any(content) and sparse_size:
        assert ranges == []


def test_side_by_side_cuts_at_every_border() -> None:
    async def pairs() -> list[tuple[int, int]]:
        one = stream([Piece(0, 100), Piece(100, 100)])
        other = stream([Piece(0, 150), Piece(150, 50)])
        return [(a.offset, b.length) async for a, b in side_by_side(one, other)]

    assert asyncio.run(pairs()) == [(0, 100), (100, 50), (150, 50)]


@pytest.mark.parametrize(("size", "fits"), [(0, True), (512, True), (1, False), (32 << 20, False)])
def test_sparse_sizes(size: int, fits: bool) -> None:
    assert (sparse_size_error(size) is None) == fits
    assert sparse_size_error(4 * KIB) is None
