"""Levels of deflate and zstd: the real tool reads every one, and a higher one packs tighter."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blocklayer.drivers.qcow2.packing import pack_cluster, unpack_cluster
from cli.runs import ours
from oracles import Oracle

CLUSTER = 65536


@pytest.fixture(scope="module")
def text() -> bytes:
    """A program of some length."""
    return (Path(random.__file__).read_bytes() * 20)[: 8 * CLUSTER]


@pytest.mark.parametrize(("type", "levels"), [("zlib", (1, 3, 4, 9)), ("zstd", (1, 9, 19))])
def test_levels(
    type: str, levels: tuple[int, ...], text: bytes, tmp_path: Path, qemu_img: Oracle
) -> None:
    (tmp_path / "disk.raw").write_bytes(text)
    sizes = []
    for level in levels:
        options = f"-c --compression-level {level} -f raw -O qcow2 -o compression_type={type}"
        assert ours(f"convert {options} disk.raw out", tmp_path) == (0, "", "")
        qemu_img("check", "-f", "qcow2", "out", cwd=tmp_path)
        qemu_img("compare", "-f", "raw", "-F", "qcow2", "disk.raw", "out", cwd=tmp_path)
        packed = pack_cluster(text[:CLUSTER], CLUSTER, zstd=type == "zstd", level=level)
        assert packed is not None
        sizes.append(len(packed))
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("level", [0, 10, 19])
def test_a_target_that_exists_is_not_touched_by_a_wrong_level(level: int, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(CLUSTER))
    (tmp_path / "out").write_bytes(b"precious")
    line = f"convert -c --compression-level {level} -f raw -O qcow2 disk.raw out"
    assert ours(line, tmp_path).code == 1
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_an_existing_image_takes_the_levels_of_its_own_compression(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"text" * CLUSTER)
    for type, code in (("zlib", 1), ("zstd", 0)):
        line = f"create -q -f qcow2 -o compression_type={type} {type}.qcow2 256k"
        assert ours(line, tmp_path).code == 0
        line = f"convert -n -c --compression-level 12 -f raw -O qcow2 disk.raw {type}.qcow2"
        done = ours(line, tmp_path)
        assert done.code == code
        assert ("use 1 (the fastest) to 9" in done.err) == bool(code)


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("length", [1, 512, CLUSTER - 1, CLUSTER])
def test_tails_and_noise(zstd: bool, length: int) -> None:
    data = b"tail" * (length // 4) + b"x" * (length % 4)
    packed = pack_cluster(memoryview(data), CLUSTER, zstd=zstd, level=1)
    assert packed is not None
    assert packed == pack_cluster(memoryview(data), CLUSTER, zstd=zstd, level=1)
    assert unpack_cluster(packed, CLUSTER, zstd=zstd) == data.ljust(CLUSTER, b"\0")
    assert pack_cluster(os.urandom(CLUSTER), CLUSTER, zstd=zstd, level=1) is None
