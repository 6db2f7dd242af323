"""Geometry, table entries and refcount blocks: against the specification's formulas, spelled out
slowly here, and against the tables of real images."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    COPIED,
    ZERO,
    ClusterKind,
    decode_compressed,
    decode_l1,
    decode_l2,
    decode_refcount_table_entry,
    encode_compressed,
    encode_l1,
    encode_l2,
    l1_problem,
    l2_problem,
    load_table,
    refcount_table_problem,
    store_table,
)
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import decode_header, probe_cluster_bits
from blocklayer.codec.qcow2.refcounts import TYPECODES, decode_block, encode_block, zero_block
from blocklayer.errors import CorruptionError
from oracles import Oracle

WORDS = st.integers(0, (1 << 64) - 1)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    extended_l2 = draw(st.booleans())
    return Geometry.make(
        draw(st.integers(14 if extended_l2 else 9, 21)),
        version=3 if extended_l2 else draw(st.sampled_from([2, 3])),
        refcount_order=draw(st.integers(0, 6)),
        extended_l2=extended_l2,
        data_file=draw(st.booleans()),
    )


@given(geometries(), st.integers(0, 1 << 61))
def test_offsets_split_as_the_specification_says(geometry: Geometry, offset: int) -> None:
    l2_entries = geometry.cluster_size // geometry.l2_entry_size
    l1_index, l2_index, in_cluster = geometry.split(offset)
    assert l2_index == (offset // geometry.cluster_size) % l2_entries
    assert l1_index == (offset // geometry.cluster_size) // l2_entries
    assert geometry.join(l1_index, l2_index) + in_cluster == offset
    assert geometry.align_down(offset) + in_cluster == offset
    assert geometry.l1_entries(offset) * geometry.l1_entry_span >= offset
    assert geometry.l1_entries(offset + 1) == l1_index + 1
    assert geometry.align_up(offset) == geometry.cluster_count(offset) * geometry.cluster_size
    table_index, block_index = geometry.refcount_position(offset)
    block_entries = geometry.cluster_size * 8 // geometry.refcount_bits
    assert block_index == (offset // geometry.cluster_size) % block_entries
    assert table_index == offset // geometry.refcount_block_span


def test_the_largest_sizes_are_those_of_the_specification() -> None:
    assert Geometry.make(9).max_size == 128 << 30
    assert Geometry.make(21).max_size == 2 << 60
    assert Geometry.make(21).max_compressed_offset == 1 << 49
    assert Geometry.make(9).max_compressed_offset == 1 << 56


@given(st.lists(WORDS, max_size=40))
def test_tables_are_big_endian_words(words: list[int]) -> None:
    data = struct.pack(f">{len(words)}Q", *words)
    table = load_table(data)
    assert table.tolist() == words
    assert store_table(table) == data
    assert table.tolist() == words
    assert load_table(memoryview(data)) == table


@pytest.mark.parametrize(
    ("entry", "kind", "host_offset"),
    [
        (0, ClusterKind.UNALLOCATED, 0),
        (COPIED, ClusterKind.UNALLOCATED, 0),
        (ZERO, ClusterKind.ZERO_PLAIN, 0),
        (COPIED | 0x50000, ClusterKind.NORMAL, 0x50000),
        (0x50000, ClusterKind.NORMAL, 0x50000),
        (COPIED | 0x50000 | ZERO, ClusterKind.ZERO_ALLOC, 0x50000),
        (COMPRESSED | 0x50123, ClusterKind.COMPRESSED, 0x50123),
        # Bit 0 of a compressed entry belongs to its offset and is no zero flag.
        (COMPRESSED | 0x50001, ClusterKind.COMPRESSED, 0x50001),
        (COMPRESSED | 3 << 54 | 0x50001, ClusterKind.COMPRESSED, 0x50001),
    ],
)
def test_l2_entries_say_what_their_bits_say(
    entry: int, kind: ClusterKind, host_offset: int
) -> None:
    assert decode_l2(entry, Geometry.make(16)) == (kind, host_offset)


def test_offset_zero_is_an_offset_in_a_data_file_only() -> None:
    geometry = Geometry.make(16, data_file=True)
    assert decode_l2(COPIED, geometry) == (ClusterKind.NORMAL, 0)
    assert decode_l2(COPIED | ZERO, geometry) == (ClusterKind.ZERO_ALLOC, 0)
    assert decode_l2(ZERO, geometry) == (ClusterKind.ZERO_PLAIN, 0)


@pytest.mark.parametrize(
    ("entry", "geometry", "why"),
    [
        (0x50000 | 2, Geometry.make(16), "reserved bits 0x2"),
        (0x50000 | 1 << 56, Geometry.make(16), "reserved bits 0x100000000000000"),
        (0x50200, Geometry.make(16), "not aligned"),
        (ZERO, Geometry.make(16, version=2), "version 2"),
        (ZERO, Geometry.make(16, extended_l2=True), "extended L2"),
        (COMPRESSED | 0x50000, Geometry.make(16, data_file=True), "data file"),
        (COMPRESSED | 1 << 56, Geometry.make(9), "past the format's limit"),
    ],
)
def test_an_l2_entry_that_cannot_be_followed_is_corrupt(
    entry: int, geometry: Geometry, why: str
) -> None:
    with pytest.raises(CorruptionError, match=why):
        decode_l2(entry, geometry)


@given(geometries(), WORDS)
def test_any_word_is_decoded_or_corrupt_and_never_misaligned(
    geometry: Geometry, entry: int
) -> None:
    for problem, decode in (
        (l2_problem, decode_l2),
        (l1_problem, decode_l1),
        (refcount_table_problem, decode_refcount_table_entry),
    ):
        if problem(entry, geometry) is not None:
            with pytest.raises(CorruptionError):
                decode(entry, geometry)
            continue
        decoded = decode(entry, geometry)
        kind, offset = decoded if isinstance(decoded, tuple) else (None, decoded)
        if kind is not ClusterKind.COMPRESSED:
            assert offset % geometry.cluster_size == 0


@given(geometries(), st.integers(1, (1 << 35) - 1), st.booleans(), st.booleans())
def test_standard_entries_survive_the_round_trip(
    geometry: Geometry, index: int, copied: bool, zero: bool
) -> None:
    host_offset = index << geometry.cluster_bits
    assert decode_l1(encode_l1(host_offset, copied=copied), geometry) == host_offset
    zero = zero and geometry.version == 3 and not geometry.extended_l2
    kind = ClusterKind.ZERO_ALLOC if zero else ClusterKind.NORMAL
    entry = encode_l2(host_offset, copied=copied, zero=zero)
    assert decode_l2(entry, geometry) == (kind, host_offset)
    assert bool(entry & COPIED) == copied


@given(geometries(), st.data())
def test_compressed_descriptors_cover_their_data_and_no_further_sector(
    geometry: Geometry, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, geometry.cluster_size))
    host_offset = data.draw(st.integers(0, geometry.max_compressed_offset - length))
    entry = encode_compressed(host_offset, length, geometry)
    assert entry >> 62 == 1
    decoded_offset, bound = decode_compressed(entry, geometry)
    assert decoded_offset == host_offset
    assert length <= bound < length + 512
    assert (host_offset + bound) % 512 == 0


@pytest.mark.parametrize("order", range(7))
@given(data=st.data())
def test_refcounts_are_what_the_specification_says(order: int, data: st.DataObject) -> None:
    bits = 1 << order
    block = data.draw(st.binary(min_size=64, max_size=64))
    counts = decode_block(block, order)
    assert counts.typecode == TYPECODES[order]
    if bits >= 8:
        width = bits // 8
        slow = [
            int.from_bytes(block[start : start + width], "big") for start in range(0, 64, width)
        ]
    else:
        slow = [byte >> shift & (1 << bits) - 1 for byte in block for shift in range(0, 8, bits)]
    assert counts.tolist() == slow
    assert encode_block(counts, order) == block
    assert counts.tolist() == slow
    assert decode_block(memoryview(block), order) == counts


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_count_too_large_for_its_width_is_refused(order: int) -> None:
    counts = zero_block(8, order)
    assert encode_block(counts, order) == bytes(1 << order)
    counts[3] = 1 << (1 << order)
    with pytest.raises(OverflowError, match="does not fit"):
        encode_block(counts, order)
    with pytest.raises(OverflowError):
        array(TYPECODES[6], [1 << 64])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_real_tables_read_as_written(
    qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path, bits: int, cluster_size: int
) -> None:
    path = tmp_path / "image.qcow2"
    options = f"refcount_bits={bits},cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "8M")
    commands = ["write -q 0 3k", "write -q 1M 200k", "write -q -z 2M 64k", "write -q -c 3M 64k"]
    qemu_io("-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    image = path.read_bytes().ljust(1 << 20, b"\0")
    header = decode_header(image[: 1 << probe_cluster_bits(image)])
    geometry = Geometry.of(header)
    mapped = {}
    l1 = load_table(image[header.l1_table_offset :][: header.l1_size * 8])
    for l1_index, l1_entry in enumerate(l1):
        l2_offset = decode_l1(l1_entry, geometry)
        if not l2_offset:
            continue
        for l2_index, entry in enumerate(load_table(image[l2_offset:][:cluster_size])):
            mapped[geometry.join(l1_index, l2_index)] = decode_l2(entry, geometry)
    kinds = {
        0: ClusterKind.NORMAL,
        1 << 20: ClusterKind.NORMAL,
        2 << 20: ClusterKind.ZERO_PLAIN,
        3 << 20: ClusterKind.COMPRESSED,
    }
    assert {offset: mapped[offset][0] for offset in kinds} == kinds

    table = load_table(image[header.refcount_table_offset :][:cluster_size])
    used = set()
    for index, block_offset in enumerate(table):
        if block_offset:
            counts = decode_block(image[block_offset:][:cluster_size], header.refcount_order)
            assert len(counts) == geometry.refcount_block_entries
            used |= {index * len(counts) + i for i, count in enumerate(counts) if count}
    clusters = {
        host_offset // cluster_size
        for kind, host_offset in mapped.values()
        if kind in (ClusterKind.NORMAL, ClusterKind.COMPRESSED)
    }
    assert clusters <= used
    assert {0, header.l1_table_offset // cluster_size} <= used
    assert max(used) < (path.stat().st_size + cluster_size - 1) // cluster_size
