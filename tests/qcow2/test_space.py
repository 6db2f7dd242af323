"""Space in the image file: packing, reuse, what is handed back to the host, and bounded caches."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from blocklayer.codec.qcow2.header import decode_header
from blocklayer.graph import io
from blocklayer.graph.driver import BackingReference
from blocklayer.graph.extent import Kind
from oracles import Oracle
from qcow2.images import driver_of, opened, run

KIB = 1 << 10
MIB = 1 << 20
CLUSTER = 64 * KIB


@pytest.fixture
def image(tmpfs: Path, qemu_img: Oracle) -> Path:
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    return path


def sound(path: Path, qemu_img: Oracle) -> None:
    assert "No errors were found" in qemu_img("check", path).stdout


def test_compressed_clusters_share_host_clusters_in_order(image: Path, qemu_img: Oracle) -> None:
    dice = random.Random(1)
    data = [dice.randbytes(1000) + bytes([n]) * (CLUSTER - 1000) for n in range(100)]

    async def scenario() -> None:
        async with opened(image) as root:
            await root.write_compressed(0, b"".join(data[:60]))
            for number in range(60, 100):
                await root.write_compressed(number * CLUSTER, data[number])
            await root.write_compressed(100 * CLUSTER, dice.randbytes(CLUSTER))
            extent = await driver_of(root).map(0, MIB)
            assert (extent.kind, extent.compressed, extent.length) == (Kind.OPAQUE, True, MIB)
            assert not (await driver_of(root).map(100 * CLUSTER, MIB)).compressed
            for start, length in ((0, 6 * MIB), (12345, 99), (CLUSTER - 1, 2), (MIB - 5, 300000)):
                assert await root.read(start, length) == b"".join(data)[start:][:length]

    run(scenario())
    # 100 clusters of little more than 1000 bytes each, one plain, and six of metadata.
    assert image.stat().st_size < 12 * CLUSTER
    sound(image, qemu_img)
    flat = image.with_name("flat")
    qemu_img("convert", "-O", "raw", image, flat)
    assert flat.read_bytes()[: 100 * CLUSTER] == b"".join(data)


def test_an_overwritten_compressed_cluster_frees_its_part_only(
    image: Path, qemu_img: Oracle
) -> None:
    async def scenario() -> None:
        async with opened(image) as root:
            for number in range(4):
                await root.write_compressed(number * CLUSTER, bytes([number + 1]) * CLUSTER)
            await root.write(CLUSTER + 5, b"new")
            expected = b"\2" * 5 + b"new" + b"\2" * (CLUSTER - 8)
            assert await root.read(CLUSTER, CLUSTER) == expected
            assert await root.read(2 * CLUSTER, CLUSTER) == b"\3" * CLUSTER

    run(scenario())
    sound(image, qemu_img)


def test_freed_clusters_are_reused_after_a_flush_and_not_before(image: Path) -> None:
    async def scenario() -> None:
        async with opened(image) as root:
            driver = driver_of(root)
            await root.write(0, b"a" * CLUSTER)
            await root.flush()
            first = (await driver.map(0, 1)).host_offset
            await root.discard(0, CLUSTER)
            await root.write(CLUSTER, b"b" * CLUSTER)
            assert (await driver.map(CLUSTER, 1)).host_offset != first
            await root.flush()
            await root.write(2 * CLUSTER, b"c" * CLUSTER)
            assert (await driver.map(2 * CLUSTER, 1)).host_offset == first

    run(scenario())


def test_space_is_not_reused_while_an_older_request_may_use_it(image: Path) -> None:
    async def scenario() -> None:
        async with opened(image) as root:
            driver = driver_of(root)
            await root.write(0, b"a" * CLUSTER)
            first = (await driver.map(0, 1)).host_offset
            async with root.request():
                await root.discard(0, CLUSTER)
                await root.flush()
                await root.write(CLUSTER, b"b" * CLUSTER)
                assert (await driver.map(CLUSTER, 1)).host_offset != first
            await root.flush()
            await root.write(2 * CLUSTER, b"c" * CLUSTER)
            assert (await driver.map(2 * CLUSTER, 1)).host_offset == first

    run(scenario())


@pytest.mark.parametrize(
    ("options", "freed"),
    [
        ({}, True),
        ({"pass_discard_request": False}, False),
        ({"discard_no_unref": True}, True),
        ({"discard_no_unref": True, "pass_discard_request": False}, False),
    ],
)
def test_discards_reach_the_host_as_told(
    image: Path, qemu_img: Oracle, options: dict[str, Any], freed: bool
) -> None:
    async def scenario() -> None:
        async with opened(image, **options) as root:
            await root.write(0, os.urandom(8 * MIB))
            await root.flush()
            before = image.stat().st_blocks * 512
            await root.discard(0, 8 * MIB)
            await root.flush()
            after = image.stat().st_blocks * 512
            assert (before - after > 7 * MIB) == freed
            assert await root.read(0, 8 * MIB) == bytes(8 * MIB)
            kept = (await driver_of(root).map(0, 1)).host_offset is not None
            assert kept == options.get("discard_no_unref", False)

    run(scenario())
    sound(image, qemu_img)


@pytest.mark.parametrize("asked", [False, True])
def test_overwritten_space_is_discarded_only_if_asked(image: Path, asked: bool) -> None:
    async def scenario() -> int:
        async with opened(image, pass_discard_other=asked) as root:
            for number in range(16):
                data = os.urandom(CLUSTER // 2) + bytes(CLUSTER // 2)
                await root.write_compressed(number * CLUSTER, data)
            await root.flush()
            before = image.stat().st_blocks * 512
            await root.write(0, os.urandom(MIB))
            await root.flush()
            return image.stat().st_blocks * 512 - before

    grown = run(scenario())
    assert grown < MIB if asked else grown >= MIB


def test_metadata_caches_stay_within_their_bounds(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "16M")
    dice = random.Random(3)
    offsets = [dice.randrange(16 * MIB // 512) * 512 for _ in range(1500)]

    async def scenario() -> None:
        async with opened(path, l2_cache_size=4096, refcount_cache_size=2048) as root:
            image = driver_of(root).image
            for number, offset in enumerate(offsets):
                await root.write(offset, number.to_bytes(4, "big") * 128)
                assert len(image.slices.slices) <= 8
                assert len(image.refcounts.blocks) <= 4
            last = {offset: number for number, offset in enumerate(offsets)}
            for offset, number in last.items():
                assert await root.read(offset, 512) == number.to_bytes(4, "big") * 128

    run(scenario())
    sound(path, qemu_img)


def test_unused_cache_entries_are_dropped_in_time(image: Path) -> None:
    async def scenario() -> None:
        async with opened(image, cache_clean_interval=600) as root:
            driver = driver_of(root)
            await root.write(0, b"x" * 512)
            driver._clean()
            driver._clean()
            # What was not written back yet must stay.
            assert driver.image.slices.slices
            await root.flush()
            driver._clean()
            driver._clean()
            assert not driver.image.slices.slices
            assert not driver.image.refcounts.blocks
            assert await root.read(0, 512) == b"x" * 512

    run(scenario())


def test_empty_gives_everything_up(tmpfs: Path, qemu_img: Oracle, image: Path) -> None:
    base = tmpfs / "base.raw"
    base.write_bytes(b"base" * KIB)
    over = tmpfs / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", over, "64M")

    async def scenario() -> None:
        async with opened(over) as root:
            await root.write(0, b"x" * 8 * MIB)
            await root.write_compressed(32 * MIB, bytes(CLUSTER))
            await root.write_zeroes(40 * MIB, MIB)
            await driver_of(root).make_empty()
            assert await root.read(0, 8192) == b"base" * KIB + bytes(4096)
            extent = await driver_of(root).map(0, 64 * MIB)
            assert (extent.kind, extent.length) == (Kind.UNALLOCATED, 64 * MIB)

    run(scenario())
    sound(over, qemu_img)


def test_change_backing_rewrites_the_header_and_keeps_the_rest(
    tmpfs: Path, qemu_img: Oracle, image: Path
) -> None:
    before = decode_header(image.read_bytes()[:CLUSTER])
    (tmpfs / "base.raw").write_bytes(bytes(MIB))

    async def scenario(reference: BackingReference | None) -> None:
        async with opened(image, backing=None) as root:
            await driver_of(root).change_backing(reference)

    run(scenario(BackingReference("base.raw", "raw")))
    info = qemu_img.json("info", "--output=json", image)
    assert info["backing-filename"] == "base.raw"
    assert info["backing-filename-format"] == "raw"
    run(scenario(None))
    assert decode_header(image.read_bytes()[:CLUSTER]) == before
    sound(image, qemu_img)


def test_a_disk_of_many_tib_opens_at_once_and_maps_in_few_steps(
    tmpfs: Path, qemu_img: Oracle
) -> None:
    path = tmpfs / "huge.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64T")

    async def scenario() -> None:
        async with opened(path) as root:
            await root.write(40 << 40, b"far")
            image = driver_of(root).image
            extents = 0
            offset = 0
            while offset < root.node.size:
                extent = await driver_of(root).map(offset, root.node.size - offset)
                offset += extent.length
                extents += 1
            assert extents <= 8
            assert len(image.slices.slices) < 32
            assert await io.read(root.node, 40 << 40, 3) == b"far"

    run(scenario())
    sound(path, qemu_img)


def test_refcount_table_grows_with_the_file(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a.qcow2"
    settings = "cluster_size=512,refcount_bits=64"
    qemu_img("create", "-q", "-f", "qcow2", "-o", settings, path, "24M")
    data = random.Random(5).randbytes(MIB)

    async def scenario() -> None:
        async with opened(path) as root:
            clusters = driver_of(root).image.header.refcount_table_clusters
            for number in range(24):
                await root.write(number * MIB, data)
            assert driver_of(root).image.header.refcount_table_clusters > clusters
            assert await root.read(7 * MIB, MIB) == data

    run(scenario())
    sound(path, qemu_img)


def test_refcounts_of_one_bit_refuse_what_would_share(tmpfs: Path, qemu_img: Oracle) -> None:
    path = tmpfs / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", path, "8M")

    async def scenario() -> None:
        async with opened(path) as root:
            for number in range(8):
                await root.write_compressed(number * CLUSTER, bytes([number]) * CLUSTER)
            assert await root.read(0, CLUSTER) == bytes(CLUSTER)

    run(scenario())
    sound(path, qemu_img)
