"""Header states (dirty, corrupt, autoclear, unsupported), and errors that must stay errors."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from blocklayer.codec.qcow2.header import decode_header
from blocklayer.errors import (
    BlockError,
    CorruptionError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from oracles import Oracle
from qcow2.images import driver_of, opened, run

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, qemu_img: Oracle) -> Path:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    return path


def features(path: Path) -> tuple[int, int, int]:
    header = decode_header(path.read_bytes()[:65536])
    return header.incompatible_features, header.compatible_features, header.autoclear_features


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(path: Path, offset: int) -> int:
    return int(struct.unpack_from(">Q", path.read_bytes(), offset)[0])


def l2_table(path: Path, index: int = 0) -> int:
    l1_table_offset = peek(path, 40)
    return peek(path, l1_table_offset + 8 * index) & 0x00FF_FFFF_FFFF_FE00


def test_lazy_refcounts_mark_the_image_dirty_until_a_clean_close(
    image: Path, qemu_img: Oracle
) -> None:
    async def scenario() -> None:
        async with opened(image, lazy_refcounts=True) as root:
            await root.write(0, b"a" * 70000)
            assert features(image)[0] == 0
            await root.flush()
            assert features(image)[0] == 1
            dirty = image.read_bytes()
            found = await driver_of(root).check(frozenset())
            assert (found.corruptions, found.leaks) == (0, 0)
        assert features(image)[0] == 0
        image.with_name("dirty.qcow2").write_bytes(dirty)

    run(scenario())
    assert "No errors" in qemu_img("check", image).stdout
    crashed = image.with_name("dirty.qcow2")
    assert qemu_img("check", crashed, check=False).returncode != 0

    async def reopen() -> None:
        async with opened(crashed, read_only=True) as root:
            assert await root.read(0, 70000) == b"a" * 70000
        assert features(crashed)[0] == 1
        async with opened(crashed) as root:
            assert features(crashed)[0] == 0
            assert await root.read(0, 70000) == b"a" * 70000
            await root.write(MIB, b"b" * 70000)

    run(reopen())
    assert "No errors" in qemu_img("check", crashed).stdout


def test_dirty_bit_stays_until_the_last_user_has_closed(image: Path) -> None:
    async def scenario() -> None:
        from blocklayer.graph.permission import Permission
        from blocklayer.graph.root import Root

        async with opened(image, lazy_refcounts=True) as first:
            second = Root(first.node, "second", taken=Permission.WRITE)
            await second.write(0, b"x" * 4096)
            await second.flush()
            await second.close()
            assert features(image)[0] == 1
            await first.write(MIB, b"y" * 4096)
            await first.flush()
            assert features(image)[0] == 1
        assert features(image)[0] == 0

    run(scenario())


def test_unknown_autoclear_bits_are_cleared_by_writers_only(image: Path) -> None:
    patch(image, 88, struct.pack(">Q", 1 << 40))

    async def scenario() -> None:
        async with opened(image, read_only=True) as root:
            await root.read(0, 512)
        assert features(image)[2] == 1 << 40
        async with opened(image):
            assert features(image)[2] == 0

    run(scenario())


def test_corrupt_bit_keeps_writers_out(image: Path) -> None:
    patch(image, 72, struct.pack(">Q", 2))

    async def scenario() -> None:
        with pytest.raises(UnsupportedError, match="Image is corrupt; cannot be opened read/write"):
            async with opened(image):
                pass
        async with opened(image, read_only=True) as root:
            assert await root.read(0, 512) == bytes(512)

    run(scenario())


def test_misaligned_entry_marks_the_image_corrupt_and_stops_writes(
    image: Path, qemu_io: Oracle
) -> None:
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 128k", image)
    table = l2_table(image)
    patch(image, table + 8, struct.pack(">Q", peek(image, table + 8) | 512))

    async def scenario() -> None:
        async with opened(image, read_only=True) as root:
            assert await root.read(0, 65536) == b"\1" * 65536
            with pytest.raises(CorruptionError, match=r"guest offset 0x10000.*not aligned"):
                await root.read(65536, 512)
        assert features(image)[0] == 0
        async with opened(image) as root:
            with pytest.raises(CorruptionError, match="no more writes are taken"):
                await root.write(65536, b"x")
            assert await root.read(0, 65536) == b"\1" * 65536
            with pytest.raises(StorageError, match="marked corrupt"):
                await root.write(0, b"x")
        assert features(image)[0] == 2

    run(scenario())


@pytest.mark.parametrize(
    ("victim", "message"),
    [(40, "active L1 table"), (48, "refcount table"), (None, "active L2 table")],
)
def test_write_into_metadata_is_stopped(
    image: Path, qemu_io: Oracle, victim: int | None, message: str
) -> None:
    qemu_io("-f", "qcow2", "-c", "write -P 1 0 128k", image)
    table = l2_table(image)
    target = table if victim is None else peek(image, victim)
    patch(image, table + 8, struct.pack(">Q", target | 1 << 63))
    before = image.read_bytes()

    async def scenario() -> None:
        async with opened(image) as root:
            with pytest.raises(CorruptionError, match=message):
                await root.write(65536, b"boom" * 128)
        assert features(image)[0] == 2
        assert image.read_bytes()[512:] == before[512:]

    run(scenario())


def test_allocation_over_metadata_is_stopped(image: Path) -> None:
    # All refcounts gone: the first free cluster seems to be the refcount table.
    block = peek(image, peek(image, 48))
    patch(image, block, bytes(64))

    async def scenario() -> None:
        async with opened(image) as root:
            with pytest.raises(CorruptionError, match="overlaps with refcount table"):
                await root.write(0, b"x" * 512)
        assert features(image)[0] == 2

    run(scenario())


def test_overlap_check_none_allows_what_it_must(image: Path) -> None:
    async def scenario() -> None:
        async with opened(image, overlap_check="none") as root:
            await root.write(0, b"x" * 512)
            assert driver_of(root).image.overlap.kinds == 0
        async with opened(
            image, **{"overlap_check": {"template": "none", "main-header": "on"}}
        ) as root:
            assert driver_of(root).image.overlap.kinds == 1

    run(scenario())


def test_plain_open_changes_nothing(image: Path) -> None:
    before = image.read_bytes()

    async def scenario() -> None:
        async with opened(image) as root:
            await root.read(0, MIB)
            await root.flush()

    run(scenario())
    assert image.read_bytes() == before


REFUSED = {
    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time": {
        "cache_size": "2M", "l2_cache_size": "1M", "refcount_cache_size": "1M",
    },
    "l2-cache-size may not exceed cache-size": {"cache_size": "1M", "l2_cache_size": "2M"},
    "refcount-cache-size may not exceed cache-size": {
        "cache_size": "1M", "refcount_cache_size": "2M",
    },
    "L2 cache entry size must be a power of two between 512 and the cluster size (65536)": {
        "l2_cache_entry_size": "3000",
    },
    "Unsupported value 'bogus' for qcow2 option 'overlap-check'. Allowed are any of the following: "
    "none, constant, cached, all": {"overlap_check": "bogus"},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_option_combinations_are_refused_as_qemu_does(
    image: Path, qemu_io: Oracle, message: str
) -> None:
    options = REFUSED[message]
    text = ",".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
    refused = qemu_io(
        "-c", "read 0 1", "--image-opts", f"driver=qcow2,file.filename={image},{text}", check=False
    )
    assert message in refused.stderr

    async def scenario() -> None:
        with pytest.raises(UsageError) as caught:
            async with opened(image, **options):
                pass
        assert str(caught.value) == message

    run(scenario())


def test_version_2_has_neither_lazy_refcounts_nor_kept_discards(
    tmp_path: Path, qemu_img: Oracle
) -> None:
    path = tmp_path / "old.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "8M")

    async def refused(**options: bool) -> str:
        with pytest.raises(BlockError) as caught:
            async with opened(path, **options):
                pass
        return str(caught.value)

    assert "at least qemu 1.1 compatibility" in run(refused(lazy_refcounts=True))
    assert "only supported since qcow2 version 3" in run(refused(discard_no_unref=True))
