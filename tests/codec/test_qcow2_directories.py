"""The snapshot table and the bitmap directory: against real images, and under mutation."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.qcow2 import bitmaps, snapshots
from blocklayer.codec.qcow2.bitmaps import BitmapEntry, BitmapsExtension
from blocklayer.codec.qcow2.entries import load_table
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import EXTENSION_BITMAPS, decode_header, probe_cluster_bits
from blocklayer.codec.qcow2.snapshots import Snapshot
from blocklayer.errors import BlockError, CorruptionError, FormatError, UsageError
from oracles import Oracle

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
NAMES = st.text(max_size=30)

SNAPSHOTS = st.lists(
    st.builds(
        Snapshot,
        l1_table_offset=U64,
        l1_size=U32,
        id=NAMES,
        name=NAMES,
        date_s=U32,
        date_ns=U32,
        vm_clock_ns=U64,
        vm_state_size_32=U32,
        extra_data=st.binary(max_size=60),
    ),
    max_size=5,
)
BITMAPS = st.lists(
    st.builds(
        BitmapEntry,
        bitmap_table_offset=U64,
        bitmap_table_size=U32,
        flags=U32,
        type=st.integers(0, 255),
        granularity_bits=st.integers(0, 255),
        name=NAMES,
        extra_data=st.binary(max_size=20),
    ),
    max_size=5,
    unique_by=lambda entry: entry.name,
)


@given(SNAPSHOTS, st.binary(max_size=20))
def test_snapshot_tables_survive_the_round_trip(table: list[Snapshot], after: bytes) -> None:
    data = snapshots.encode_table(table)
    assert len(data) % 8 == 0
    assert len(data) <= snapshots.table_size_bound(len(table))
    assert snapshots.decode_table(data + after, len(table)) == (table, len(data))


@given(BITMAPS)
def test_bitmap_directories_survive_the_round_trip(directory: list[BitmapEntry]) -> None:
    data = bitmaps.encode_directory(directory)
    assert bitmaps.decode_directory(data, len(directory)) == directory


@given(SNAPSHOTS, BITMAPS, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255))), st.data())
def test_mutated_tables_raise_block_errors_or_decode(
    table: list[Snapshot],
    directory: list[BitmapEntry],
    mutations: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    geometry = Geometry.make(16)
    for good in (snapshots.encode_table(table), bitmaps.encode_directory(directory)):
        raw = bytearray(good)
        for offset, value in mutations:
            if raw:
                raw[offset % len(raw)] = value
        cut = raw[: data.draw(st.integers(0, len(raw)))]
        for hostile in (raw, cut):
            with contextlib.suppress(BlockError):
                for snapshot in snapshots.decode_table(hostile, len(table))[0]:
                    snapshots.validate_snapshot(snapshot, geometry)
            with contextlib.suppress(BlockError):
                for entry in bitmaps.decode_directory(hostile, len(directory)):
                    bitmaps.validate_entry(entry, geometry, 1 << 30)


def test_real_snapshots(qemu_img: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    for name in ("first", "zweite äöü", "x" * 200):
        qemu_img("snapshot", "-c", name, path)
    image = path.read_bytes()
    header = decode_header(image[: 1 << probe_cluster_bits(image)])
    table_data = image[header.snapshots_offset :]
    table, length = snapshots.decode_table(table_data, header.nb_snapshots)
    # The file ends with the last name: the last entry's padding is not written.
    assert snapshots.encode_table(table) == table_data[:length].ljust(length, b"\0")
    listed = qemu_img.json("info", "--output=json", path)["snapshots"]
    assert [(s.id, s.name, s.date_s, s.date_ns, s.vm_state_size) for s in table] == [
        (s["id"], s["name"], s["date-sec"], s["date-nsec"], s["vm-state-size"]) for s in listed
    ]
    for snapshot in table:
        snapshots.validate_snapshot(snapshot, Geometry.of(header))
        assert snapshot.extra_data == snapshots.extra_data(0, 8 << 20, snapshot.icount)
        assert snapshot.disk_size == 8 << 20


def test_real_bitmaps(qemu_img: Oracle, qemu_io: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_img("bitmap", "--add", "-g", "64k", path, "one")
    qemu_img("bitmap", "--add", "-g", "512", "--disable", path, "zwei äöü")
    qemu_io("-f", "qcow2", "-c", "write -q 1M 1M", path)
    image = path.read_bytes()
    header = decode_header(image[: 1 << probe_cluster_bits(image)])
    geometry = Geometry.of(header)
    data = header.extension(EXTENSION_BITMAPS)
    assert data is not None
    extension = bitmaps.decode_bitmaps_extension(data)
    bitmaps.validate_bitmaps_extension(extension, header.cluster_size)
    assert extension.pack() == data
    raw = image[extension.bitmap_directory_offset :][: extension.bitmap_directory_size]
    directory = bitmaps.decode_directory(raw, extension.nb_bitmaps)
    assert bitmaps.encode_directory(directory) == raw
    found = {entry.name: (entry.granularity_bits, entry.auto, entry.in_use) for entry in directory}
    assert found == {"one": (16, True, False), "zwei äöü": (9, False, False)}
    bits = {}
    for entry in directory:
        bitmaps.validate_entry(entry, geometry, header.size)
        table = load_table(image[entry.bitmap_table_offset :][: entry.bitmap_table_size * 8])
        bits[entry.name] = [bitmaps.decode_bitmap_table_entry(word, geometry) for word in table]
    assert bits["zwei äöü"] == [(0, False)]
    ((host_offset, all_ones),) = bits["one"]
    assert not all_ones
    assert image[host_offset : host_offset + 16] == bytes([0, 0, 255, 255]) + bytes(12)


def snapshot(**changes: object) -> Snapshot:
    fields = {
        "l1_table_offset": 0x10000,
        "l1_size": 1,
        "id": "1",
        "name": "s",
        "extra_data": snapshots.extra_data(0, 1 << 20),
    }
    return Snapshot(**(fields | changes))  # type: ignore[arg-type]


def test_extra_data_past_the_limit_are_refused_but_to_repair() -> None:
    data = snapshot(extra_data=bytes(1025)).encode()
    with pytest.raises(FormatError, match="extra data of 1025 bytes"):
        snapshots.decode_snapshot(data)
    decoded, _ = snapshots.decode_snapshot(data, extra_data_limit=1 << 20)
    assert len(decoded.extra_data) == 1025


def test_fields_that_old_extra_data_lack() -> None:
    old = snapshot(extra_data=b"", vm_state_size_32=7)
    assert (old.vm_state_size, old.disk_size, old.icount) == (7, None, None)
    snapshots.validate_snapshot(old, Geometry.make(16, version=2))
    new = snapshot(extra_data=snapshots.extra_data(1 << 33, 512, icount=9), vm_state_size_32=7)
    assert (new.vm_state_size, new.disk_size, new.icount) == (1 << 33, 512, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"l1_size": (4 << 20) + 1},
        {"l1_table_offset": 512},
        {"l1_table_offset": 1 << 56},
        {"extra_data": bytes(15)},
    ],
)
def test_a_snapshot_that_could_not_be_loaded_is_refused(changes: dict[str, object]) -> None:
    snapshots.validate_snapshot(snapshot(), Geometry.make(16))
    with pytest.raises(FormatError, match="snapshot '1' "):
        snapshots.validate_snapshot(snapshot(**changes), Geometry.make(16))


def test_strings_too_long_and_too_many_snapshots_are_refused() -> None:
    with pytest.raises(UsageError):
        snapshot(name="x" * 65536).encode()
    with pytest.raises(UsageError, match="too many snapshots"):
        snapshots.encode_table([snapshot()] * 65537)


def bitmap(**changes: object) -> BitmapEntry:
    fields = {
        "bitmap_table_offset": 0x10000,
        "bitmap_table_size": 1,
        "granularity_bits": 16,
        "name": "b",
    }
    return BitmapEntry(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"bitmap_table_offset": 0},
        {"bitmap_table_offset": 512},
        {"bitmap_table_offset": 1 << 56},
        {"bitmap_table_size": 0},
        {"bitmap_table_size": 2},
        {"bitmap_table_size": 1 << 13 | 1, "flags": bitmaps.FLAG_IN_USE},
        {"flags": 8},
        {"type": 0},
        {"type": 2},
        {"granularity_bits": 8},
        {"granularity_bits": 32},
        {"name": ""},
        {"name": "x" * 1024},
    ],
)
def test_a_bitmap_that_could_not_be_loaded_is_refused(changes: dict[str, object]) -> None:
    geometry = Geometry.make(16)
    bitmaps.validate_entry(bitmap(), geometry, 1 << 30)
    bitmaps.validate_entry(bitmap(name="x" * 1023), geometry, 1 << 30)
    with pytest.raises(FormatError, match="bitmap '"):
        bitmaps.validate_entry(bitmap(**changes), geometry, 1 << 30)


def test_a_bitmap_in_use_may_be_of_another_size() -> None:
    entry = bitmap(bitmap_table_size=2, flags=bitmaps.FLAG_IN_USE)
    bitmaps.validate_entry(entry, Geometry.make(16), 1 << 30)


@pytest.mark.parametrize(
    "extension",
    [
        BitmapsExtension(0, 0, 64, 0x10000),
        BitmapsExtension(65536, 0, 64, 0x10000),
        BitmapsExtension(1, 1, 64, 0x10000),
        BitmapsExtension(1, 0, 64, 0x10008),
        BitmapsExtension(1, 0, bitmaps.MAX_DIRECTORY_SIZE + 1, 0x10000),
    ],
)
def test_bitmaps_extensions_out_of_range_are_refused(extension: BitmapsExtension) -> None:
    bitmaps.validate_bitmaps_extension(BitmapsExtension(1, 0, 64, 0x10000), 65536)
    with pytest.raises(FormatError, match="bitmaps_ext"):
        bitmaps.validate_bitmaps_extension(extension, 65536)


def test_a_directory_is_as_long_as_it_says_and_its_names_are_unique() -> None:
    data = bitmap().encode()
    with pytest.raises(FormatError, match="ends at"):
        bitmaps.decode_directory(data + bytes(8), 1)
    with pytest.raises(FormatError, match="two bitmaps named 'b'"):
        bitmaps.decode_directory(data + data, 2)
    with pytest.raises(FormatError, match="padding"):
        bitmaps.decode_directory(data[:-1] + b"x", 1)


@pytest.mark.parametrize("entry", [2, 0x10001, 0x10200, 1 << 56, 1 << 63])
def test_bitmap_table_entries_that_cannot_be_followed_are_corrupt(entry: int) -> None:
    geometry = Geometry.make(16)
    assert bitmaps.decode_bitmap_table_entry(1, geometry) == (0, True)
    assert bitmaps.decode_bitmap_table_entry(0x10000, geometry) == (0x10000, False)
    with pytest.raises(CorruptionError, match="bitmap table entry"):
        bitmaps.decode_bitmap_table_entry(entry, geometry)
