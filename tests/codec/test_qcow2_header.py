"""The qcow2 header against real images, against the real tool's verdict, and under mutation.

The model in `VERDICTS` is data: field, value, and whether an image so patched may be opened; the
same rows are put to qemu-img, but for those where the specification is stricter than it.
"""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.codec.qcow2 import header as q
from blocklayer.codec.qcow2.header import Extension, ImageHeader, decode_header, probe_cluster_bits
from blocklayer.codec.qcow2.validation import full_disk_encryption_area, validate
from blocklayer.errors import BlockError, FormatError, UnsupportedError, UsageError
from oracles import Oracle

MIB = 1 << 20


def open_header(image: bytes) -> ImageHeader:
    header = decode_header(image[: 1 << probe_cluster_bits(image)])
    validate(header)
    return header


def fresh(**fields: object) -> ImageHeader:
    """What `qemu-img create` makes of 64 MiB."""
    header = ImageHeader(
        size=64 * MIB,
        l1_size=1,
        l1_table_offset=0x30000,
        refcount_table_offset=0x10000,
        refcount_table_clusters=1,
        **fields,  # type: ignore[arg-type]
    )
    header.set_feature_names()
    return header


CREATE_OPTIONS = {
    "plain": "",
    "v2": "compat=0.10",
    "lazy": "lazy_refcounts=on",
    "extended": "extended_l2=on,cluster_size=128k",
    "zstd": "compression_type=zstd",
    "refcounts": "refcount_bits=1",
    "data file": "data_file={folder}/data.raw",
    "raw data file": "data_file={folder}/data.raw,data_file_raw=on",
    **{f"cluster {size}": f"cluster_size={size}" for size in (512, 4096, 8192, 2 * MIB)},
}


# The format excludes a backing file beside raw data.
COMBINATIONS = [
    pytest.param(options, backing, id=f"{name}, {'overlay' if backing else 'alone'}")
    for name, options in CREATE_OPTIONS.items()
    for backing in (False, True)
    if not (backing and name == "raw data file")
]


@pytest.mark.parametrize(("options", "backing"), COMBINATIONS)
def test_real_headers_survive_the_round_trip(
    qemu_img: Oracle, tmp_path: Path, options: str, backing: bool
) -> None:
    image = tmp_path / "image.qcow2"
    arguments = ["-o", options.format(folder=tmp_path)] if options else []
    if backing:
        qemu_img("create", "-q", "-f", "raw", tmp_path / "base.raw", "3M")
        arguments += ["-b", "base.raw", "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", *arguments, image, "3M")
    data = image.read_bytes()
    header = open_header(data)
    assert header.encode() == data[: header.cluster_size].ljust(header.cluster_size, b"\0")
    assert header.size == 3 * MIB
    assert header.backing_file == ("base.raw" if backing else None)
    assert header.backing_format == ("raw" if backing else None)
    assert header.has_data_file == ("data_file" in options)
    assert header.data_file == (f"{tmp_path}/data.raw" if header.has_data_file else None)
    assert header.extended_l2 == ("extended_l2" in options)


def test_bitmaps_snapshots_rebase_and_luks_survive_the_round_trip(
    qemu_img: Oracle, tmp_path: Path
) -> None:
    image = tmp_path / "image.qcow2"
    steps = [
        ("create", "-q", "-f", "qcow2", image, "3M"),
        ("bitmap", "--add", image, "first"),
        ("snapshot", "-c", "one", image),
        ("rebase", "-u", "-b", "elsewhere.raw", "-F", "raw", image),
        ("rebase", "-u", "-b", "", image),
        ("amend", "-o", "lazy_refcounts=on", image),
    ]
    for step in steps:
        qemu_img(*step)
        data = image.read_bytes()
        header = open_header(data)
        assert header.encode() == data[: header.cluster_size], step[0]
    assert header.nb_snapshots == 1
    secret = ("--object", "secret,id=key,data=swordfish")
    luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", luks, image, "3M")
    data = image.read_bytes()
    header = open_header(data)
    assert header.encode() == data[: header.cluster_size]
    area = full_disk_encryption_area(header)
    assert area is not None
    assert data[area[0] : area[0] + 4] == b"LUKS"


@pytest.mark.parametrize("version", [2, 3])
def test_a_fresh_header_is_the_one_qemu_img_writes(
    qemu_img: Oracle, tmp_path: Path, version: int
) -> None:
    image = tmp_path / "image.qcow2"
    compat = "0.10" if version == 2 else "1.1"
    backing = ("-u", "-b", "base", "-F", "raw")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", *backing, image, "64M")
    header = fresh(version=version, backing_file="base")
    header.backing_format = "raw"
    assert header.encode() == image.read_bytes()[: header.cluster_size]
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", image, "64M")
    assert fresh(version=version).encode() == image.read_bytes()[: header.cluster_size]


@pytest.mark.parametrize("cluster_bits", range(9, 22))
def test_the_feature_name_table_is_written_where_qemu_img_writes_it(
    qemu_img: Oracle, tmp_path: Path, cluster_bits: int
) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={1 << cluster_bits}", image, "1M")
    theirs = open_header(image.read_bytes())
    ours = fresh(cluster_bits=cluster_bits)
    assert ours.extensions == theirs.extensions


FIELDS = {
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
    "padding": (105, 1),
    "extension_type": (112, 4),
    "extension_length": (116, 4),
}

# Of the fresh 64 MiB header: values that keep it valid, and values that do not.
VERDICTS: dict[str, tuple[list[int], list[int]]] = {
    "version": ([2, 3], [0, 1, 4]),
    "backing_file_offset": ([0, 104, 112, 0x210, 65535, 65536], [0x1F0, 65537, 1 << 40, 1 << 63]),
    "backing_file_size": ([0, 1023, 1024], []),
    "cluster_bits": ([15, 16], [0, 8, 9, 17, 21, 22, 31, 63, (1 << 32) - 1]),
    "size": ([0, 1, 513, 1 << 29], [(1 << 29) + 1, 1 << 45, 1 << 51, 1 << 62, 1 << 63]),
    "crypt_method": ([0, 1], [2, 3, 1 << 31]),
    "l1_size": ([1, 2, 1 << 22], [0, (1 << 22) + 1, 1 << 31]),
    "l1_table_offset": ([0x40000], [1, 512, 1 << 63, (1 << 64) - 65536]),
    "refcount_table_offset": ([0x40000], [1, 512, 1 << 63]),
    "refcount_table_clusters": ([1, 2, 128], [0, 129, 1 << 31]),
    "nb_snapshots": ([0], [65537, 1 << 31]),
    "snapshots_offset": ([0, 0x10000], [1, 512, 1 << 63]),
    "incompatible_features": ([0, 1, 2, 4, 16], [8, 32, 1 << 63]),
    "compatible_features": ([0, 1, 2, 1 << 63], []),
    "autoclear_features": ([0, 4, 1 << 63], []),
    "refcount_order": ([0, 1, 5, 6], [7, 63]),
    "header_length": ([104, 112, 1000, 65536], [0, 72, 100, 120, 65544, 1 << 31]),
    "compression_type": ([0], [1, 2, 255]),
    "padding": ([0, 1], []),
    "extension_type": ([0, 1], [q.EXTENSION_BACKING_FORMAT, q.EXTENSION_FULL_DISK_ENCRYPTION]),
    "extension_length": ([1, 65536 - 120], [0, 100, 65536 - 119, 1 << 31]),
}

# The specification forbids these; the real tool opens them all the same.
STRICTER: dict[str, list[int]] = {
    "l1_table_offset": [1 << 56, 1 << 62],
    "refcount_table_offset": [1 << 56],
    "snapshots_offset": [1 << 56],
    "autoclear_features": [1, 2],
    "header_length": [105],
}


def patched(field: str, value: int) -> bytes:
    image = bytearray(fresh().encode())
    offset, width = FIELDS[field]
    image[offset : offset + width] = value.to_bytes(width, "big")
    return bytes(image)


def rows(table: Callable[[str], list[int]]) -> Iterator[tuple[str, int]]:
    return ((field, value) for field in VERDICTS for value in table(field))


VALID = list(rows(lambda field: VERDICTS[field][0]))
INVALID = list(rows(lambda field: VERDICTS[field][1]))


@pytest.mark.parametrize(("field", "value"), VALID)
def test_valid_values_open(field: str, value: int) -> None:
    open_header(patched(field, value))


@pytest.mark.parametrize(
    ("field", "value"), INVALID + list(rows(lambda field: STRICTER.get(field, [])))
)
def test_invalid_values_are_refused(field: str, value: int) -> None:
    with pytest.raises((FormatError, UnsupportedError)):
        open_header(patched(field, value))


def test_the_real_tool_gives_the_same_verdicts(qemu_img: Oracle, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    tail = image.read_bytes()[65536:]
    for cases, expected in ((VALID, 0), (INVALID, 1)):
        for field, value in cases:
            image.write_bytes(patched(field, value) + tail)
            done = qemu_img("info", "-U", "-f", "qcow2", image, check=False)
            assert done.returncode == expected, (field, value, done.stderr)


def test_unknown_features_are_named_from_the_image() -> None:
    header = fresh(incompatible_features=1 << 7 | 1 << 9)
    row = bytes([q.FEATURE_INCOMPATIBLE, 7]) + b"time travel".ljust(46, b"\0")
    header.set_extension(q.EXTENSION_FEATURE_NAMES, q.feature_name_table() + row)
    with pytest.raises(UnsupportedError, match=r"time travel; Unknown incompatible feature: 200$"):
        validate(header)


def test_extended_l2_needs_clusters_of_16_kib() -> None:
    header = fresh(cluster_bits=13, incompatible_features=q.INCOMPATIBLE_EXTENDED_L2)
    header.l1_size = 1024
    with pytest.raises(FormatError, match="cluster_bits is 13"):
        validate(header)


@pytest.mark.parametrize("extension_type", [q.EXTENSION_BACKING_FORMAT, q.EXTENSION_FEATURE_NAMES])
def test_a_known_extension_appears_once(extension_type: int) -> None:
    header = fresh()
    header.extensions = [Extension(extension_type, b"raw"), Extension(extension_type, b"raw")]
    with pytest.raises(FormatError, match="appears twice"):
        validate(header)


def test_a_stale_bitmaps_extension_is_ignored_and_a_live_one_judged() -> None:
    header = fresh()
    header.set_extension(q.EXTENSION_BITMAPS, b"garbage!")
    validate(header)
    header.autoclear_features = q.AUTOCLEAR_BITMAPS
    with pytest.raises(FormatError, match="bitmaps_ext"):
        validate(header)


def test_setting_the_compression_type_sets_its_feature_bit() -> None:
    header = fresh()
    header.compression_type = q.COMPRESSION_ZSTD
    validate(header)
    assert decode_header(header.encode()).compression_type == q.COMPRESSION_ZSTD
    header.compression_type = q.COMPRESSION_DEFLATE
    assert header == fresh()


def test_extensions_are_inserted_where_qemu_writes_them_and_unknown_ones_stay() -> None:
    header = fresh()
    header.extensions = [Extension(0x1234, b"unknown"), Extension(0x5678, b"")]
    header.set_feature_names()
    header.backing_format = "qcow2"
    header.data_file = "d.raw"
    expected = [
        q.EXTENSION_BACKING_FORMAT,
        q.EXTENSION_DATA_FILE,
        q.EXTENSION_FEATURE_NAMES,
        0x1234,
        0x5678,
    ]
    assert [extension.type for extension in header.extensions] == expected
    header.backing_format = "raw"
    assert [extension.type for extension in header.extensions] == expected
    header.backing_format = header.data_file = None
    assert [extension.type for extension in header.extensions] == expected[2:]


def test_a_header_that_does_not_fit_is_refused() -> None:
    header = fresh(cluster_bits=9, backing_file="x" * 392)
    assert len(header.encode()) == 512
    header.backing_file = "x" * 393
    with pytest.raises(UsageError, match="513 bytes"):
        header.encode()
    with pytest.raises(UsageError, match="1024 bytes"):
        fresh(backing_file="x" * 1024).encode()


def test_a_name_that_is_no_utf8_survives() -> None:
    header = decode_header(
        fresh(backing_file=b"caf\xe9".decode("utf-8", "surrogateescape")).encode()
    )
    assert header.backing_file == "caf\udce9"
    assert b"caf\xe9" in header.encode()


EXTENSIONS = st.lists(
    st.builds(Extension, st.integers(1, (1 << 32) - 1), st.binary(max_size=40)), max_size=6
)


@given(
    extensions=EXTENSIONS,
    additional=st.binary(max_size=5).map(lambda data: data * 8),
    backing_file=st.none() | st.text(max_size=200),
    cluster_bits=st.integers(12, 21),
)
def test_decode_inverts_encode(
    extensions: list[Extension], additional: bytes, backing_file: str | None, cluster_bits: int
) -> None:
    header = fresh(additional=additional, backing_file=backing_file, cluster_bits=cluster_bits)
    header.extensions = extensions
    encoded = header.encode()
    assert decode_header(encoded) == header
    assert decode_header(encoded).encode() == encoded
    assert decode_header(encoded.rstrip(b"\0").ljust(600, b"\0")) == header


INTERESTING = st.sampled_from([0, 1, 7, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, (1 << 64) - 1])
MUTATIONS = st.lists(
    st.tuples(st.integers(4, 0x260), st.sampled_from([1, 2, 4, 8]), INTERESTING), max_size=8
)


@settings(max_examples=300)
@given(MUTATIONS, st.binary(max_size=64), st.integers(0, 65536))
def test_mutated_headers_raise_block_errors_or_open(
    mutations: list[tuple[int, int, int]], noise: bytes, cut: int
) -> None:
    image = bytearray(fresh(backing_file="base.raw").encode())
    for offset, width, value in mutations:
        image[offset : offset + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
    image[112 : 112 + len(noise)] = noise
    data = bytes(image[:cut]) if cut < 0x260 else bytes(image)
    # A valid header can be one that fills its cluster to the last byte: then encode refuses.
    with contextlib.suppress(BlockError):
        header = open_header(data)
        assert len(header.encode()) == header.cluster_size


def test_a_cluster_full_of_empty_extensions_is_refused_in_little_memory() -> None:
    header = fresh(cluster_bits=21)
    header.extensions = []
    image = header.encode()[:112] + bytes.fromhex("0000000100000000") * ((2 * MIB - 112) // 8)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more than 1024 header extensions"):
            decode_header(image)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()
