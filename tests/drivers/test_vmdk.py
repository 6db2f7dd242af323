"""VMDK: descriptors, extents and what may be opened, parents and their identity, streams."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError, Policy
from blocklayer.codec.vmdk import descriptor, sparse
from blocklayer.codec.vmdk.stream import StreamWriter
from drivers.images import MIB
from drivers.other_readers import read_vmdk
from oracles import Oracle

FORMATS = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
]
CID = re.compile(rb"\nCID=[0-9a-f]{8}")


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of an image by name, its identity blanked out."""
    return {path.name: CID.sub(b"\nCID=????????", path.read_bytes()) for path in folder.iterdir()}


def create_with_qemu(qemu_img: Oracle, path: Path, size: str, **options: str) -> None:
    """Make an image whose identity has eight digits: QEMU writes it without leading zeros."""
    extra = [f"-o{name}={value}" for name, value in options.items()]
    found = None
    while found is None:
        qemu_img("create", "-q", "-f", "vmdk", *extra, path, size)
        found = CID.search(path.read_bytes())


@pytest.mark.parametrize("size", [0, 1, MIB + 1000, 200 * MIB])
@pytest.mark.parametrize("subformat", FORMATS)
def test_a_new_image_is_what_qemu_makes(
    subformat: str, size: int, tmpfs: Path, qemu_img: Oracle
) -> None:
    if "Flat" in subformat:
        size = min(size, 10 * MIB)
    folders = [tmpfs / "ours", tmpfs / "theirs"]
    for folder in folders:
        folder.mkdir()
    blocklayer.create(folders[0] / "d.vmdk", size, format="vmdk", subformat=subformat)
    create_with_qemu(qemu_img, folders[1] / "d.vmdk", str(size), subformat=subformat)
    ours, theirs = map(files_of, folders)
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():
        assert data == theirs[name], name


@pytest.mark.parametrize(
    "options",
    [
        {"adapter_type": "lsilogic"},
        {"adapter_type": "legacyESX", "hwversion": "9"},
        {"compat6": "on", "toolsversion": "123"},
        {"zeroed_grain": "on"},
    ],
)
def test_options_are_qemus(options: dict[str, str], tmpfs: Path, qemu_img: Oracle) -> None:
    folders = [tmpfs / "ours", tmpfs / "theirs"]
    for folder in folders:
        folder.mkdir()
    blocklayer.create(folders[0] / "d.vmdk", "4G", format="vmdk", **options)
    create_with_qemu(qemu_img, folders[1] / "d.vmdk", "4G", **options)
    assert files_of(folders[0]) == files_of(folders[1])


def test_pieces_of_two_gib(tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        image = tmpfs / f"{subformat}.vmdk"
        blocklayer.create(image, "5G", format="vmdk", subformat=subformat)
        assert len(list(tmpfs.glob(f"{subformat}-*"))) == 3
        border = 2 << 30
        with blocklayer.open(image, writable=True) as disk:
            disk.write(border - 5000, b"\x07" * 10000)
            disk.write_zeroes(border - 100, 200)
            assert disk.read(border - 101, 202) == b"\x07" + bytes(200) + b"\x07"
        commands = [f"read -P 7 {border - 5000} 4900", f"read -P 0 {border - 100} 200"]
        said = qemu_io("-f", "vmdk", *(w for c in commands for w in ("-c", c)), image).stdout
        assert "failed" not in said
        qemu_img("check", "-f", "vmdk", image)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"subformat": "monolithicFlat", "zeroed_grain": "on"}, "can't enable zeroed grain"),
        ({"compat6": "on", "hwversion": "9"}, "compat6 cannot be enabled with hwversion set"),
        ({"adapter_type": "foo"}, "does not accept value 'foo'"),
        ({"size": "2P"}, "128 TiB"),
    ],
)
def test_what_cannot_be_made(options: dict[str, str], said: str, tmpfs: Path) -> None:
    options = {"size": "1M", **options}
    with pytest.raises(BlockError, match=said):
        blocklayer.create(tmpfs / "image", options.pop("size"), format="vmdk", **options)
    assert list(tmpfs.iterdir()) == []


def write_descriptor(path: Path, *extents: str) -> None:
    """A descriptor with these extent lines."""
    lines = "\n".join(extents)
    path.write_text(
        f"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="custom"\n\n{lines}\n'
    )


def test_extents_are_a_policy(tmpfs: Path) -> None:
    """An image cannot make us open what the policy does not allow (R8)."""
    inside, outside = tmpfs / "in", tmpfs / "out"
    inside.mkdir()
    outside.mkdir()
    secret = outside / "secret"
    secret.write_bytes(b"secret".ljust(MIB, b"!"))
    image = inside / "image.vmdk"
    allowed = Policy(allow=(str(inside),))
    for name in (str(secret), "../out/secret", f"file:{secret}", "link"):
        (inside / "link").unlink(missing_ok=True)
        (inside / "link").symlink_to(secret)
        write_descriptor(image, f'RW 2048 FLAT "{name}" 0')
        with pytest.raises(BlockError) as refused:
            blocklayer.open(image, policy=allowed)
        assert "does not allow" in str(refused.value) or "No such file" in str(refused.value)
        with pytest.raises(BlockError, match="forbids opening"):
            blocklayer.open(image, policy=Policy(references=False))
    (inside / "mine").write_bytes(b"m" * MIB)
    write_descriptor(image, 'RW 2048 FLAT "mine" 0')
    with blocklayer.open(image, policy=allowed) as disk:
        assert disk.read(0, 4) == b"mmmm"


def test_extents_of_many_kinds(tmpfs: Path) -> None:
    (tmpfs / "flat:1").write_bytes(bytes(512) + b"f" * 2048)
    write_descriptor(tmpfs / "image", 'RW 4 FLAT "flat:1" 1', "RW 2 ZERO", 'RDONLY 1 VMFS "flat:1"')
    with blocklayer.open(tmpfs / "image") as disk:
        assert disk.format == "vmdk"
        assert disk.size == 7 * 512
        assert disk.read(0, disk.size) == b"f" * 2048 + bytes(1024 + 512)
    with pytest.raises(BlockError, match="read-only extent"):
        blocklayer.open(tmpfs / "image", writable=True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('RW 4096 FLAT "flat" 0', "too short"),
        ('RW 2048 FLAT "flat"', "Invalid extent line"),
        ('RW 2048 FLAT "flat" 99999999999999999', "too large"),
        ('RW 99999999999999999999999 FLAT "flat" 0', "Invalid extent line"),
        ('RW 2048 SPARSE "flat"', "does not begin with its signature"),
        ('RW 2048 SESPARSE "flat"', "Unsupported VMDK extent type"),
        ('NOACCESS 2048 FLAT "flat" 0', "not supported"),
        ('RW 2048 FLAT "missing" 0', "No such file"),
    ],
)
def test_extents_that_cannot_be(line: str, said: str, tmpfs: Path) -> None:
    (tmpfs / "flat").write_bytes(bytes(MIB))
    write_descriptor(tmpfs / "image", line)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(tmpfs / "image", format="vmdk")


def test_an_overlay_and_its_parent(tmpfs: Path, qemu_img: Oracle) -> None:
    base, overlay, raw = tmpfs / "base.vmdk", tmpfs / "overlay.vmdk", tmpfs / "raw"
    blocklayer.create(base, 3 * MIB, format="vmdk")
    with blocklayer.open(base, writable=True) as disk:
        disk.write(0, b"base" * (MIB // 2))
    blocklayer.create(
        overlay, format="vmdk", backing="base.vmdk", backing_format="vmdk", zeroed_grain="on"
    )
    with blocklayer.open(overlay, writable=True) as disk:
        disk.write(70000, b"over" * 100)
        disk.write_zeroes(3 * 65536, 65536)
        content = disk.read(0, disk.size)
    assert content[:70000] == b"base" * 17500
    assert content[3 * 65536 : 4 * 65536] == bytes(65536)
    raw.write_bytes(content)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", overlay, raw)
    qemu_img("check", "-f", "vmdk", overlay)
    with blocklayer.open(base, writable=True) as disk:
        disk.write(0, b"new")
    with blocklayer.open(overlay) as disk:
        assert disk.read(70000, 4) == b"over"
        with pytest.raises(BlockError, match="has changed since"):
            disk.read(0, 4)


def test_a_parent_is_a_vmdk(tmpfs: Path) -> None:
    (tmpfs / "base").write_bytes(bytes(MIB))
    with pytest.raises(BlockError, match="can only have a VMDK"):
        blocklayer.create(tmpfs / "x", format="vmdk", backing=tmpfs / "base", backing_format="raw")
    blocklayer.create(tmpfs / "base.vmdk", MIB, format="vmdk")
    with pytest.raises(BlockError, match="can't have backing file"):
        blocklayer.create(
            tmpfs / "x",
            format="vmdk",
            subformat="monolithicFlat",
            backing=tmpfs / "base.vmdk",
            backing_format="vmdk",
        )


def test_reading_changes_nothing_and_writing_changes_the_identity(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="vmdk")
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"a")
    before = image.read_bytes()
    with blocklayer.open(image, writable=True) as disk:
        disk.read(0, 10)
    assert image.read_bytes() == before
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"a")
    after = image.read_bytes()
    assert descriptor.parse_descriptor(after[512:10240]) != descriptor.parse_descriptor(
        before[512:10240]
    )
    assert after[10240:] == before[10240:]


def finished_stream(size: int, grains: dict[int, bytes], *, packed: bool = False) -> bytes:
    """A stream-optimised file as VMware's tools write it: the directory at the end."""
    text = descriptor.format_descriptor(
        cid=0x1234ABCD,
        parent_cid=descriptor.NO_PARENT,
        create_type="streamOptimized",
        parent=None,
        extents=[descriptor.ExtentLine("RW", size // 512, "SPARSE", "stream.vmdk")],
        hardware_version="4",
        adapter_type="ide",
        tools_version="2147483647",
    )
    writer = StreamWriter(size // 512, text)
    parts = [writer.begin()]
    for at, data in sorted(grains.items()):
        parts.append(writer.grain(at, data if packed else zlib.compress(data)))
    return b"".join([*parts, writer.finish()])


def test_a_finished_stream(tmpfs: Path, qemu_img: Oracle) -> None:
    image, raw, size = tmpfs / "stream.vmdk", tmpfs / "raw", 70 * MIB
    grains = {at: bytes([at % 251 + 1]) * 65536 for at in (0, 1, 5, 511, 512, 700, 1119)}
    image.write_bytes(finished_stream(size, grains))
    content = b"".join(grains.get(at, bytes(65536)) for at in range(size // 65536))
    with blocklayer.open(image) as disk:
        assert disk.read(0, disk.size) == content
        kinds = {entry.compressed for entry in disk.map() if entry.data}
        assert kinds == {True}
    raw.write_bytes(content)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", image, raw)
    with pytest.raises(BlockError, match="open it read-only"):
        blocklayer.open(image, writable=True)
    image.write_bytes(image.read_bytes()[:-512])
    with pytest.raises(BlockError, match="no footer"):
        blocklayer.open(image)
    image.write_bytes(finished_stream(size, grains))
    assert read_vmdk(image) == content


def test_a_stream_is_written_in_one_pass(tmpfs: Path, qemu_img: Oracle) -> None:
    """Grains lie one after another, in the order in which they were written."""
    image, raw = tmpfs / "image", tmpfs / "raw"
    blocklayer.create(image, 2 * MIB, format="vmdk", subformat="streamOptimized")

    async def main() -> None:
        async with await blocklayer.aio.Disk.open(image, writable=True) as disk:
            for at in range(0, 2 * MIB, 2 * 65536):
                await disk.root.write_compressed(at, bytes([1 + at // 65536]) * 65536)

    import asyncio

    asyncio.run(main())
    data = image.read_bytes()
    place, sectors = 65536, []
    while place < len(data):
        marker = sparse.GrainMarker.unpack(data, place)
        sectors.append(marker.sector)
        place += -(-(12 + marker.size) // 512) * 512
    assert sectors == list(range(0, 4096, 256))
    content = b"".join(
        bytes([1 + at // 65536 if at // 65536 % 2 == 0 else 0]) * 65536
        for at in range(0, 2 * MIB, 65536)
    )
    raw.write_bytes(content)
    qemu_img("compare", "-f", "vmdk", "-F", "raw", image, raw)
    qemu_img("check", "-f", "vmdk", image)


def test_a_grain_bomb_is_no_bomb(tmpfs: Path) -> None:
    """A grain that would give far more than a grain is cut; one that gives less is corrupt."""
    image = tmpfs / "image"
    bomb, short = zlib.compress(bytes(1 << 26)), zlib.compress(b"short")
    grains = {0: bomb, 1: short, 2: b"not compressed at all", 3: zlib.compress(b"c" * 65536)}
    image.write_bytes(finished_stream(MIB, grains, packed=True))
    with blocklayer.open(image) as disk:
        assert disk.read(0, 65536) == bytes(65536)
        for at in (1, 2):
            with pytest.raises(BlockError, match=f"Grain {at} of"):
                disk.read(at * 65536, 512)
        assert disk.read(3 * 65536, 3) == b"ccc"


def test_a_marker_that_is_not_the_grains(tmpfs: Path) -> None:
    image = tmpfs / "image"
    data = bytearray(finished_stream(MIB, {0: b"a" * 65536, 1: b"b" * 65536}))
    struct.pack_into("<QI", data, 65536, 128, 100)
    image.write_bytes(data)
    with blocklayer.open(image) as disk, pytest.raises(BlockError, match="belongs to 0x80"):
        disk.read(0, 512)
    struct.pack_into("<QI", data, 65536, 0, 1 << 31)
    image.write_bytes(data)
    with blocklayer.open(image) as disk, pytest.raises(BlockError, match="says 0x80000000 bytes"):
        disk.read(0, 512)


def test_a_descriptor_is_told_by_its_first_statement() -> None:
    assert descriptor.is_descriptor(b"# comment\n\nversion=1\nCID=1")
    assert descriptor.is_descriptor(b"version=2\r\nCID=1")
    assert not descriptor.is_descriptor(b"#!/bin/sh\necho version=1\n")
    assert not descriptor.is_descriptor(b"# version=1\n")
    assert not descriptor.is_descriptor(b"\n" * 2048)
