"""Growing, shrinking and preallocation, compared with what qemu-img and qemu-io make of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from blocklayer.errors import BlockError, UnsupportedError, UsageError
from oracles import Oracle
from qcow2.images import driver_of, opened, run

KIB = 1 << 10
MIB = 1 << 20


def create(path: Path, qemu_img: Oracle, size: str, *arguments: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", *arguments, path, size)


def sound(path: Path, qemu_img: Oracle) -> None:
    assert "No errors were found" in qemu_img("check", path).stdout


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [4 * KIB, 64 * KIB])
def test_preallocated_growth(tmpfs: Path, qemu_img: Oracle, mode: str, cluster_size: int) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    for path in (ours, theirs):
        create(path, qemu_img, "1M", "-o", f"cluster_size={cluster_size}")

    async def scenario() -> None:
        async with opened(ours) as root:
            await root.write(0, b"x" * 300 * KIB)
            await root.discard(0, 256 * KIB)
            await root.flush()
            await root.truncate(32 * MIB, preallocation=mode)
            assert await root.read(MIB, 31 * MIB) == bytes(31 * MIB)

    run(scenario())
    qemu_img("resize", "-q", "--preallocation", mode, theirs, "32M")
    sound(ours, qemu_img)
    for path in (ours, theirs):
        runs = qemu_img.json("map", "--output=json", path)
        assert all(run_["data"] for run_ in runs if run_["start"] >= MIB)
    used = [path.stat().st_blocks * 512 for path in (ours, theirs)]
    assert abs(used[0] - used[1]) < 3 * MIB
    assert (used[0] > 31 * MIB) == (mode != "metadata")


def test_growth_hides_a_longer_backing_file(tmpfs: Path, qemu_img: Oracle) -> None:
    for options in ("compat=0.10", "compat=1.1", "extended_l2=on"):
        base, over = tmpfs / "base", tmpfs / "over"
        base.write_bytes(b"b" * (2 * MIB))
        arguments = ("-o", options, "-b", str(base), "-F", "raw")
        create(over, qemu_img, str(512 * KIB + 512), *arguments)

        async def scenario(path: Path) -> None:
            async with opened(path) as root:
                await root.truncate(3 * MIB)
                kept = 512 * KIB + 512
                assert await root.read(0, kept) == b"b" * kept
                assert await root.read(kept, 3 * MIB - kept) == bytes(3 * MIB - kept)

        run(scenario(over))
        sound(over, qemu_img)


@pytest.mark.parametrize("extended_l2", ["off", "on"])
def test_what_a_shrink_cut_off_does_not_come_back(
    tmpfs: Path, qemu_img: Oracle, extended_l2: str
) -> None:
    path = tmpfs / "a"
    create(path, qemu_img, "4M", "-o", f"extended_l2={extended_l2}")

    async def scenario(size: int) -> None:
        async with opened(path) as root:
            await root.write(0, b"x" * 4 * MIB)
            await root.truncate(size, shrink=True)
            await root.truncate(4 * MIB)
            assert await root.read(0, size) == b"x" * size
            assert await root.read(size, 4 * MIB - size) == bytes(4 * MIB - size)

    for size in (MIB, MIB + 512, 65536, 512):
        run(scenario(size))
        sound(path, qemu_img)


def test_a_shrink_gives_the_file_back(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a"
    create(path, qemu_img, "64M", "-o", "cluster_size=4096")

    async def scenario() -> None:
        async with opened(path) as root:
            await root.write(0, random.Random(1).randbytes(16 * MIB))
            await root.truncate(MIB, shrink=True)
            assert driver_of(root).image.header.l1_size == 1

    run(scenario())
    assert path.stat().st_size < 3 * MIB
    sound(path, qemu_img)
    assert qemu_img.json("info", "--output=json", path)["virtual-size"] == MIB


def test_l1_table_grows_and_the_old_one_is_freed(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a"
    create(path, qemu_img, "1M", "-o", "cluster_size=512,refcount_bits=64")

    async def scenario() -> None:
        async with opened(path) as root:
            for size in (3 * MIB, 100 * MIB, 1000 * MIB, 64 * 1024 * MIB):
                await root.write(root.node.size - 512, b"e" * 512)
                await root.truncate(size)
            assert await root.read(MIB - 512, 512) == b"e" * 512
            assert await root.read(1000 * MIB - 512, 512) == b"e" * 512

    run(scenario())
    sound(path, qemu_img)


REFUSED = {
    (MIB + 1, "off", False): (UsageError, "The new size must be a multiple of 512"),
    (512, "off", False): (UsageError, "must be asked for"),
    (512, "full", True): (UnsupportedError, "Preallocation can't be used for shrinking an image"),
    (1 << 62, "off", False): (UsageError, "too large"),
}


@pytest.mark.parametrize("request_", REFUSED)
def test_refused_sizes(tmpfs: Path, qemu_img: Oracle, request_: tuple[int, str, bool]) -> None:
    path = tmpfs / "a"
    create(path, qemu_img, "1M")
    before = path.read_bytes()
    size, preallocation, shrink = request_
    kind, message = REFUSED[request_]

    async def scenario() -> None:
        async with opened(path) as root:
            with pytest.raises(kind, match=message):
                await root.truncate(size, preallocation=preallocation, shrink=shrink)

    run(scenario())
    assert path.read_bytes() == before


def test_version_2_with_snapshots_keeps_its_size(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a"
    create(path, qemu_img, "1M", "-o", "compat=0.10")
    qemu_img("snapshot", "-c", "one", path)

    async def scenario() -> None:
        async with opened(path) as root:
            with pytest.raises(BlockError, match="Can't resize a v2 image which has snapshots"):
                await root.truncate(2 * MIB)

    run(scenario())
