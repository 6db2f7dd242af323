"""VM state inside qcow2: what one tool stores the other reads, and the disk never shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blocklayer
from blocklayer.api.sync import Disk, run
from effort import examples
from oracles import Oracle, require

KIB = 1024


def make(folder: Path, *options: str) -> Path:
    image = folder / "vm.qcow2"
    require("qemu-img")("create", "-q", "-f", "qcow2", *options, image, "1M")
    return image


def store(disk: Disk, position: int, data: bytes) -> None:
    run(disk.aio.root.write_vm_state(position, data))


def load(disk: Disk, position: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    run(disk.aio.root.read_vm_state(position, view))
    return bytes(view)


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=512"), ("-o", "compat=0.10")])
def test_theirs_reads_what_ours_stored(
    options: tuple[str, ...], tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    image = make(tmp_path, *options)
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"\x05" * 4096)
        store(disk, 0, b"\x07" * 100 * KIB)
        store(disk, 5 << 20, b"\x08" * KIB)
        store(disk, 64 * KIB, b"\x09" * 512)
    qemu_img("check", image)
    for pattern, position, length in ((7, 0, 65536), (9, 65536, 512), (7, 66048, 36352)):
        qemu_io("-r", "-c", f"read -b -P {pattern} {position} {length}", image)
    qemu_io("-r", "-c", "read -b -P 8 5M 1k", "-c", "read -b -P 0 3M 1M", image)
    qemu_io("-r", "-c", "read -P 5 0 4k", "-c", "read -P 0 4k 1020k", image)


def test_ours_reads_what_theirs_stored(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    image = make(tmp_path)
    qemu_io("-c", "write -b -P 7 512 200k", "-c", "write -P 1 0 1M", image)
    with blocklayer.open(image) as disk:
        assert load(disk, 0, 512) == bytes(512)
        assert load(disk, 512, 200 * KIB) == b"\x07" * 200 * KIB
        assert load(disk, 100 << 20, 512) == bytes(512)
        assert disk.read(0, 1 << 20) == b"\x01" * (1 << 20)
        assert sum(entry.length for entry in disk.map()) == 1 << 20


def test_snapshots_keep_it(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    """What a snapshot shares is copied before it changes."""
    image = make(tmp_path)
    with blocklayer.open(image, writable=True) as disk:
        store(disk, 0, b"\x07" * 128 * KIB)
        disk.create_snapshot("one")
        store(disk, 1000, b"\x08" * 1000)
        assert load(disk, 0, 3000) == b"\x07" * 1000 + b"\x08" * 1000 + b"\x07" * 1000
    qemu_img("check", image)
    with blocklayer.open(image, writable=True) as disk:
        disk.apply_snapshot("one")
        assert load(disk, 0, 128 * KIB) == b"\x07" * 128 * KIB
    qemu_img("check", image)


@pytest.mark.parametrize("size", [2 << 20, 600 << 20, 512 << 10])
def test_a_resize_never_shows_it(size: int, tmp_path: Path, qemu_img: Oracle) -> None:
    image = make(tmp_path)
    with blocklayer.open(image, writable=True) as disk:
        store(disk, 0, b"\x07" * 128 * KIB)
        disk.resize(size, shrink=True)
        assert disk.size == size
        start = min(size, 512 << 20) - (256 << 10)
        length = min(size - start, 2 << 20)
        assert disk.read(start, length) == bytes(length)
    qemu_img("check", image)


def test_who_has_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    with blocklayer.open(tmp_path / "a.raw", format="raw", writable=True) as disk:
        for use in (lambda: store(disk, 0, b"x"), lambda: load(disk, 0, 1)):
            with pytest.raises(blocklayer.BlockError, match="state of a virtual machine"):
                use()
    image = make(tmp_path)
    with blocklayer.open(image) as disk, pytest.raises(blocklayer.BlockError, match="read-only"):
        store(disk, 0, b"x")
    with blocklayer.open(image, writable=True) as disk:
        for position in (-512, (1 << 63) - 1, 1 << 62):
            with pytest.raises(blocklayer.BlockError):
                store(disk, position, bytes(512))


PLACES = st.integers(0, 300 * KIB)
WRITES = st.lists(
    st.tuples(st.booleans(), PLACES, st.integers(1, 100 * KIB), st.integers(1, 255)), max_size=8
)


@settings(max_examples=examples(12))
@given(writes=WRITES, cluster_size=st.sampled_from([512, 4096, 65536]))
def test_any_writes_as_in_a_model(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[bool, int, int, int]],
    cluster_size: int,
) -> None:
    """Guest writes and VM state side by side, each in its own place."""
    image = make(tmp_path_factory.mktemp("vm"), "-o", f"cluster_size={cluster_size}")
    model = {True: bytearray(512 * KIB), False: bytearray(512 * KIB)}
    with blocklayer.open(image, writable=True) as disk:
        for in_state, offset, length, byte in writes:
            data = bytes([byte]) * length
            model[in_state][offset : offset + length] = data
            if in_state:
                store(disk, offset, data)
            else:
                disk.write(offset, data)
        assert load(disk, 0, 512 * KIB) == model[True]
    with blocklayer.open(image) as disk:
        assert load(disk, 0, 512 * KIB) == model[True]
        assert disk.read(0, 512 * KIB) == model[False]
    require("qemu-img")("check", image)
