"""Streams of images: sound, equal and as long as promised, whatever the disk and the options."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blocklayer
from blocklayer.api.disk import Disk, create, stream
from blocklayer.errors import BlockError, LockedError, StorageError, UsageError
from blocklayer.testing.strategies import cluster_sizes
from effort import examples
from jobs.folders import chain, fresh, uncompressed
from oracles import Oracle
from proof.chains import Layered, layered, our_read, qemu_create, qemu_fill

MIB = 1 << 20


@st.composite
def image_options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a streamed qcow2 image."""
    options: dict[str, Any] = {"cluster_size": draw(cluster_sizes())}
    if draw(st.integers(0, 3)) == 3:
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = draw(st.sampled_from((16, 1, 2, 4, 8, 32, 64)))
        options["compression_type"] = draw(st.sampled_from(("zlib", "zstd")))
    if draw(st.booleans()):
        options["compress"] = True
        options["compression_level"] = draw(st.sampled_from((None, 1, 3, 6, 9)))
    options["sparse_size"] = draw(st.sampled_from((None, None, 0, 512, 4096)))
    return options


async def written(
    source: Path, target: Path, *, source_format: str = "qcow2", **options: Any
) -> int:
    """Stream ``source`` into a file; the answer is the length."""
    async with (
        await Disk.open(source, format=source_format) as disk,
        await stream(disk, **options) as image,
    ):
        length = 0
        with target.open("wb") as file:
            async for chunk in image:
                length += file.write(chunk)
        assert image.size in (None, length)
        return length


@settings(
    max_examples=examples(15),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layered(most=3, requests=6, granularity=512), image_options(), st.booleans())
def test_generated_disks(
    tmpfs: Path,
    qemu_img: Oracle,
    qemu_io: Oracle,
    drawn: Layered,
    options: dict[str, Any],
    overlay: bool,
) -> None:
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        top = folder / drawn.names[-1]
        if overlay and len(drawn.names) > 1:
            options |= {"backing": str(folder / drawn.names[-2]), "backing_format": "qcow2"}
        asyncio.run(written(top, folder / "out", format="qcow2", **options))
        qemu_img("check", "-f", "qcow2", "out", cwd=folder)
        formats = ("-f", "qcow2", "-F", "qcow2")
        qemu_img("compare", *formats, "out", top, cwd=folder)
        data = asyncio.run(our_read(top))
        assert asyncio.run(our_read(folder / "out"))[: len(data)] == data


@settings(
    max_examples=examples(6),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layered(most=2, requests=6, granularity=512), st.sampled_from(("raw", "vmdk")))
def test_generated_disks_in_other_formats(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, drawn: Layered, format: str
) -> None:
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        top = folder / drawn.names[-1]
        asyncio.run(written(top, folder / "out", format=format))
        qemu_img("compare", "-f", format, "-F", "qcow2", "out", top, cwd=folder)
        data = asyncio.run(our_read(top))
        assert asyncio.run(our_read(folder / "out", format))[: len(data)] == data


def test_a_huge_sparse_disk_is_a_small_stream(tmp_path: Path, qemu_img: Oracle) -> None:
    async def main() -> None:
        await create(tmp_path / "big", "8T")
        async with await Disk.open(tmp_path / "big", writable=True) as disk:
            for offset in (0, 3 << 40, (8 << 40) - 65536):
                await disk.write(offset, b"x" * 65536)
        for options in ({}, {"compress": True}):
            length = await written(tmp_path / "big", tmp_path / "out", **options)
            assert length < 3 * MIB
            qemu_img("check", tmp_path / "out")
            qemu_img("compare", tmp_path / "out", tmp_path / "big")

    asyncio.run(main())


def test_refcount_blocks_beyond_the_first(tmp_path: Path, qemu_img: Oracle) -> None:
    """Small clusters: many refcount blocks, and a refcount table of several clusters."""
    (tmp_path / "disk").write_bytes(random.Random(5).randbytes(6 * MIB))
    options = {"cluster_size": 512, "refcount_bits": 64, "source_format": "raw"}
    asyncio.run(written(tmp_path / "disk", tmp_path / "out", **options))
    qemu_img("check", "-f", "qcow2", tmp_path / "out")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", tmp_path / "disk", tmp_path / "out")


def test_sync_streams_give_the_same_bytes(tmp_path: Path) -> None:
    chain(tmp_path)
    asyncio.run(written(tmp_path / "top.qcow2", tmp_path / "out", compress=True))
    with (
        blocklayer.open(tmp_path / "top.qcow2") as disk,
        blocklayer.stream(disk, compress=True) as image,
    ):
        data = b"".join(image)
    assert len(data) == image.size
    assert data == (tmp_path / "out").read_bytes()


def test_a_stream_is_read_once_and_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(8 * MIB))
    with blocklayer.open(path, format="raw") as disk:
        image = blocklayer.stream(disk, "raw")
        for chunk in image:
            assert chunk == path.read_bytes()[: len(chunk)]
            break
        image.close()
        with pytest.raises(UsageError, match="once"):
            next(iter(image))
    with blocklayer.open(path, format="raw", writable=True) as disk:
        disk.write(0, b"x")


def test_a_disk_that_can_be_written_is_not_streamed(tmp_path: Path) -> None:
    blocklayer.create(tmp_path / "a.qcow2", "1M")
    with blocklayer.open(tmp_path / "a.qcow2", writable=True) as disk:
        with pytest.raises(LockedError):
            blocklayer.stream(disk)
        disk.write(0, b"still usable")


def test_nobody_writes_during_a_stream(tmp_path: Path, qemu_io: Oracle) -> None:
    blocklayer.create(tmp_path / "a.qcow2", "1M")
    with blocklayer.open(tmp_path / "a.qcow2") as disk, blocklayer.stream(disk) as image:
        refused = qemu_io("-c", "write 0 64k", tmp_path / "a.qcow2", check=False)
        assert "lock" in refused.stderr
        assert len(b"".join(image)) == image.size


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"format": "vdi"}, "cannot be written as a stream"),
    ({"format": "nonsense"}, "nonsense"),
    ({"preallocation": "full"}, "preallocation=full cannot be written as a stream"),
    ({"format": "raw", "preallocation": "falloc"}, "preallocation=falloc"),
    ({"format": "vmdk", "subformat": "monolithicFlat"}, "subformat=monolithicFlat"),
    ({"format": "vmdk", "compression_level": 3, "compress": True}, "not offered"),
    ({"compression_level": 3}, "no effect"),
    ({"compress": True, "compression_level": 10}, "use 1 .* to 9"),
    ({"cluster_size": 1000}, "power of two"),
    ({"nonsense": 1}, "nonsense"),
    ({"nocow": True}, "no meaning"),
    ({"backing": "missing.qcow2", "backing_format": "qcow2"}, "missing.qcow2"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_refusals(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    with blocklayer.open(tmp_path / "disk.raw", format="raw") as disk:
        with pytest.raises(BlockError, match=said):
            blocklayer.stream(disk, **options)
        assert disk.read(0, 1) == b"\0"


def test_data_that_changes_behind_the_plan(tmp_path: Path, qemu_img: Oracle) -> None:
    """Only somebody who ignores our locks can do that. Lengths that differ end the stream; what
    became zero is given as zeros."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"abcdefgh" * (MIB // 8))
    with (
        blocklayer.open(path, format="raw") as disk,
        blocklayer.stream(disk, compress=True) as packed,
        blocklayer.stream(disk) as plain,
    ):
        with path.open("r+b") as file:
            file.write(os.urandom(MIB // 2) + bytes(MIB // 4))
        with pytest.raises(StorageError, match="changed at 0x0"):
            list(packed)
        (tmp_path / "out").write_bytes(b"".join(plain))
    qemu_img("check", tmp_path / "out")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", path, tmp_path / "out")


def test_an_error_of_the_source_ends_the_stream(tmp_path: Path, qemu_img: Oracle) -> None:
    (tmp_path / "disk.raw").write_bytes(b"text " * 800_000 + bytes(96))
    pack = ("convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "packed.qcow2")
    qemu_img(*pack, cwd=tmp_path)
    packed = bytearray((tmp_path / "packed.qcow2").read_bytes())
    place = 5 * 65536
    packed[place : place + 4096] = b"\xff" * 4096
    (tmp_path / "packed.qcow2").write_bytes(packed)
    with (
        blocklayer.open(tmp_path / "packed.qcow2") as disk,
        blocklayer.stream(disk) as image,
        pytest.raises(BlockError, match="compressed cluster"),
    ):
        list(image)
