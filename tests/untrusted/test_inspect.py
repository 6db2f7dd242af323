"""Inspection: every format recognised, honest images clean, hostile ones survived."""

from __future__ import annotations

import json
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklayer
from blocklayer import BlockError
from blocklayer.api.inspection.report import FINDINGS, Inspection
from blocklayer.codec.qcow2.header import Extension, decode_header
from blocklayer.codec.vmdk.stream import StreamWriter
from cli.runs import ours
from drivers.packed_images import Layout, write_bochs, write_cloop, write_dmg
from oracles import Oracle
from untrusted.opened import opened

SIZE = 8 << 20

CREATED = {
    "raw": ("raw",),
    "qcow2": ("qcow2",),
    "qcow2-v2": ("qcow2", "-o", "compat=0.10"),
    "qcow2-512": ("qcow2", "-o", "cluster_size=512"),
    "qcow2-zstd": ("qcow2", "-o", "compression_type=zstd,lazy_refcounts=on"),
    "qcow2-preallocated": ("qcow2", "-o", "preallocation=metadata"),
    "vmdk": ("vmdk",),
    "vhdx": ("vhdx",),
    "vhdx-fixed": ("vhdx", "-o", "subformat=fixed"),
    "vpc": ("vpc",),
    "vdi": ("vdi",),
    "vdi-static": ("vdi", "-o", "static=on"),
}
RARE = ("qcow", "qed", "parallels")


@pytest.mark.parametrize("name", CREATED)
def test_honest_images_are_clean(qemu_img: Oracle, tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    format, *options = CREATED[name]
    qemu_img("create", "-q", "-f", format, *options, path, str(SIZE))
    report = blocklayer.inspect(path)
    assert (report.format, report.formats, report.verdict) == (format, [format], "clean")
    told = qemu_img.json("info", "-f", format, "--output=json", path)
    assert report.virtual_size == told["virtual-size"]
    assert report.cluster_size == told.get("cluster-size") or format in ("vhdx", "vpc")
    assert report.file_size == path.stat().st_size
    assert report.findings == []
    assert blocklayer.inspect(path, format).format == format
    for other in {"raw", "qcow2", "vdi"} - {format}:
        with pytest.raises(BlockError, match="is not in"):
            blocklayer.inspect(path, other)


@pytest.mark.parametrize("format", RARE)
def test_formats_that_are_seldom_met(qemu_img: Oracle, tmp_path: Path, format: str) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", format, path, str(SIZE))
    report = blocklayer.inspect(path)
    assert (report.format, report.virtual_size) == (format, SIZE)
    assert report.verdict == "suspicious"
    if format != "parallels":
        (tmp_path / "base").write_bytes(bytes(SIZE))
        name = str(tmp_path / "base")
        path.unlink()
        qemu_img("create", "-q", "-f", format, "-b", name, "-F", "raw", path)
        report = blocklayer.inspect(path)
        assert [file.name for file in report.references] == [name]
        assert report.has("backing-file")
        assert report.has("reference-absolute")


def test_luks_dmg_bochs_and_cloop(qemu_img: Oracle, tmp_path: Path) -> None:
    luks = tmp_path / "luks"
    secret = ("--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10")
    qemu_img("create", "-q", "-f", "luks", *secret, luks, str(SIZE))
    report = blocklayer.inspect(luks)
    assert (report.format, report.encryption, report.virtual_size) == ("luks", "luks", SIZE)
    assert report.has("encrypted")
    for name, write in (
        ("dmg", lambda path: write_dmg(path, Layout(["zlib"]))),
        ("cloop", write_cloop),
        ("bochs", write_bochs),
    ):
        path = tmp_path / name
        size = len(write(path))
        report = blocklayer.inspect(path)
        assert (report.format, report.virtual_size) == (name, size)
        assert report.has("end-only") == (name == "dmg")
        assert report.verdict == "suspicious"
    for format, magic in (
        ("bochs", b"Bochs Virtual HD Image"),
        ("cloop", b"#!/bin/sh\n#V2.0 Format\n"),
    ):
        path = tmp_path / format
        path.write_bytes(magic.ljust(4096, b"\0"))
        report = blocklayer.inspect(path)
        assert report.format == format
        assert report.has("invalid-header") or report.has("unsupported")


def test_a_fixed_vhd_shows_at_its_end_only(qemu_img: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "fixed.vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", path, str(SIZE))
    report = blocklayer.inspect(path)
    assert (report.format, report.virtual_size, report.variant) == ("vpc", SIZE, "fixed")
    assert [finding.id for finding in report.findings] == ["end-only"]
    # Everybody else takes it for raw: that it is one, too, cannot be denied.
    assert blocklayer.inspect(path, "raw").format == "raw"


def test_stream_optimised_vmdk(qemu_img: Oracle, tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "stream.vmdk"
    raw.write_bytes(os.urandom(1 << 20))
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    assert blocklayer.inspect(path).verdict == "clean"
    head = path.read_bytes()
    described = head[512 : 21 * 512]
    writer = StreamWriter((1 << 20) // 512, described)
    path.write_bytes(
        writer.begin() + writer.grain(0, zlib.compress(bytes(65536))) + writer.finish()
    )
    assert blocklayer.inspect(path).verdict == "clean"
    data = bytearray(path.read_bytes())
    # The footer of a finished stream is what counts: one of another disk is a lie.
    at = data.index(b"KDMV", 1)
    data[at + 12 : at + 20] = (1 << 20).to_bytes(8, "little")
    path.write_bytes(data)
    assert blocklayer.inspect(path).has("footer-mismatch")


def test_partitions_and_volumes(qemu_img: Oracle, tmp_path: Path) -> None:
    disk = bytearray(64 * 1024)
    disk[510:512] = b"\x55\xaa"
    raw = tmp_path / "disk"
    raw.write_bytes(disk)
    assert blocklayer.inspect(raw).content == ["mbr"]
    disk[446 + 4] = 0xEE
    disk[32769:32774] = b"CD001"
    raw.write_bytes(disk)
    report = blocklayer.inspect(raw)
    assert (report.content, report.verdict) == (["gpt", "iso"], "clean")
    for format in ("qcow2", "vdi", "vmdk", "vpc", "vhdx"):
        image = tmp_path / f"disk.{format}"
        qemu_img("convert", "-f", "raw", "-O", format, raw, image)
        report = blocklayer.inspect(image)
        assert (report.format, report.content) == (format, ["gpt", "iso"])
        assert report.verdict == "clean"
        assert blocklayer.inspect(image, content=False).content == []


def test_a_file_that_is_two_things(qemu_img: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "both"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with path.open("r+b") as file:
        file.seek(32769)
        file.write(b"CD001")
    assert blocklayer.inspect(path).has("several-formats")
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    other = tmp_path / "vhd"
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed", other, "64k")
    with path.open("ab") as file:
        file.write(other.read_bytes()[-512:])
    report = blocklayer.inspect(path)
    assert (report.formats, report.verdict) == (["qcow2", "vpc"], "unsafe")


@pytest.fixture
def image(qemu_img: Oracle, tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    return path


def changed(path: Path, **changes: object) -> Inspection:
    data = bytearray(path.read_bytes())
    header = decode_header(bytes(data[: 1 << 16]))
    for name, value in changes.items():
        setattr(header, name, value)
    data[: 1 << 16] = header.encode()
    path.write_bytes(data)
    return blocklayer.inspect(path)


def test_findings_of_the_header(image: Path) -> None:
    report = changed(
        image,
        autoclear_features=1 << 40,
        compatible_features=(1 << 41) | 1,
        incompatible_features=3,
        extensions=[Extension(0x12345678, b"?")],
    )
    assert {finding.id for finding in report.findings} == {
        "unknown-autoclear", "unknown-compatible", "unknown-extension", "dirty", "corrupt",
    }  # fmt: skip
    assert report.features is not None
    assert report.features.incompatible == ["dirty bit", "corrupt bit"]
    assert report.features.compatible == ["lazy refcounts", "bit 41"]
    assert report.verdict == "suspicious"


def test_a_feature_that_nobody_knows(image: Path) -> None:
    name = b"\x00\x30evil\x1b[31m".ljust(48, b"\0")
    report = changed(image, incompatible_features=1 << 48, extensions=[Extension(0x6803F857, name)])
    assert report.has("unknown-incompatible")
    assert report.features is not None
    assert report.features.incompatible == ["evil\x1b[31m"]
    # A name is the image's to choose: a terminal must not act on it.
    run = ours(["inspect", str(image)], image.parent, "qemu-img")
    assert run.code == 3
    assert "\x1b" not in run.out
    assert "evil\\x1b[31m" in run.out


def test_sizes_and_tables(image: Path) -> None:
    assert blocklayer.inspect(image, max_size=SIZE).verdict == "clean"
    assert blocklayer.inspect(image, max_size=SIZE - 1).has("too-large")
    assert changed(image, l1_table_offset=1 << 40).has("past-end")
    assert changed(image, size=1 << 60).has("invalid-header")


def test_an_absurd_disk(qemu_img: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(1 << 43)
        file.seek((1 << 43) - 512)
        file.write(b"\1")
    assert blocklayer.inspect(path).verdict == "clean"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, str(1 << 51))
    assert blocklayer.inspect(path).has("absurd-size")


def test_tables_that_are_used_again_and_again(image: Path, qemu_io: Oracle) -> None:
    """A small file that reads as an endless one, without a compressed byte in it."""
    qemu_io("-c", "write 0 128k", image)
    data = bytearray(image.read_bytes())
    header = decode_header(bytes(data[: 1 << 16]))
    (l2,) = struct.unpack_from(">Q", data, header.l1_table_offset)
    l2 &= 0x00FF_FFFF_FFFF_FE00
    data[l2 + 8 : l2 + 16] = data[l2 : l2 + 8]
    image.write_bytes(data)
    assert blocklayer.inspect(image).has("shared-clusters")
    entry = bytes(data[header.l1_table_offset : header.l1_table_offset + 8])
    data[header.l1_table_offset : header.l1_table_offset + 16] = entry * 2
    image.write_bytes(data)
    report = changed(image, l1_size=2, size=1 << 30)
    assert report.has("shared-tables")
    assert report.verdict == "unsafe"


def test_compressed_data_that_expand_too_much(
    image: Path, qemu_io: Oracle, qemu_img: Oracle
) -> None:
    qemu_img("resize", "-q", image, "256M")
    qemu_io("-c", "write -P 1 -c 0 64M", image)
    assert blocklayer.inspect(image).has("compression-bomb")


def test_snapshots_and_encryption(image: Path, qemu_img: Oracle) -> None:
    qemu_img("snapshot", "-c", "one", image)
    report = blocklayer.inspect(image)
    assert [finding.id for finding in report.findings] == ["internal-snapshots"]
    secret = ("--object", "secret,id=s,data=x")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", options, image, "1M")
    report = blocklayer.inspect(image)
    assert report.encryption == "luks"
    assert {finding.id for finding in report.findings} <= {"encrypted", "internal-snapshots"}


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero"), tmp_path / "missing", "a\0b"):
        with pytest.raises(BlockError):
            blocklayer.inspect(path)


def test_what_is_printed(image: Path, qemu_img: Oracle) -> None:
    run = ours(["inspect", str(image)], image.parent, "qemu-img")
    assert run.code == 0
    assert "file format: qcow2 (version 3)" in run.out
    assert run.out.endswith("verdict: clean\n")
    told = json.loads(ours(["inspect", "--output=json", str(image)], image.parent).out)
    assert told["verdict"] == "clean"
    assert told["virtual-size"] == SIZE
    run = ours(["inspect", "-f", "raw", str(image)], image.parent)
    assert run.code == 1
    assert "is not in raw format: it is qcow2" in run.err
    assert ours(["inspect", "--max-size", "1M", str(image)], image.parent).code == 3


HEADS = {
    "qcow2": 1 << 10,
    "vmdk": 1 << 11,
    "vdi": 512,
    "vpc": 2048,
    "vhdx": 1 << 21,
    "qed": 64,
    "qcow": 48,
    "parallels": 64,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from oracles import require

    folder = tmp_path_factory.mktemp("samples")
    found = {}
    for format in HEADS:
        path = folder / format
        require("qemu-img")("create", "-q", "-f", format, path, "4M")
        found[format] = path.read_bytes()
    return found


@pytest.mark.oracle
@given(seed=st.integers(0, 1 << 32), format=st.sampled_from(sorted(HEADS)))
def test_damaged_headers(samples: dict[str, bytes], seed: int, format: str) -> None:
    """Whatever the bytes say: a report or an error of ours, and no other file touched."""
    pick = random.Random(seed)
    data = bytearray(samples[format])
    for _ in range(pick.randint(1, 8)):
        at, width = pick.randrange(min(HEADS[format], len(data)) - 8), pick.choice((1, 2, 4, 8))
        value = pick.choice((0, 1, 0xFF, pick.getrandbits(64), (1 << 64) - 1, 1 << 63))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "big")
    if pick.random() < 0.2:
        del data[pick.randrange(len(data)) :]
    path = f"/dev/shm/blocklayer-inspect-{os.getpid()}"
    try:
        Path(path).write_bytes(data)
        with opened() as seen:
            report = blocklayer.inspect(path)
        assert seen <= {path, "/dev/null"}
        assert all(finding.id in FINDINGS for finding in report.findings)
        assert report.format in (format, "raw") or report.formats
    finally:
        Path(path).unlink(missing_ok=True)
