"""VHD: new images byte for byte, what sizes mean, footers, and differencing images with parents."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError, Policy
from blocklayer.codec import vpc
from drivers.images import MIB
from drivers.other_readers import read_vhd
from oracles import Oracle


def without_chance(image: bytes) -> bytes:
    """The image without its time, identity and checksum."""
    data = bytearray(image)
    for start in {0, len(data) - 512}:
        if data[start : start + 8] == vpc.COOKIE:
            data[start + 0x18 : start + 0x1C] = bytes(4)
            data[start + 0x40 : start + 0x54] = bytes(20)
    return bytes(data)


SMALL = ["0", "1", "100k", "1M", "9M"]
LARGE = ["504M", "520M", "8G", "127G", "1T"]
"""Sizes for images that hold nothing."""


@pytest.mark.parametrize("force", ["off", "on"])
@pytest.mark.parametrize(
    ("subformat", "size"),
    [("fixed", size) for size in SMALL] + [("dynamic", size) for size in SMALL + LARGE],
)
def test_a_new_image_is_what_qemu_makes(
    subformat: str, size: str, force: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    blocklayer.create(ours, size, format="vpc", force_size=force, subformat=subformat)
    options = f"force_size={force},subformat={subformat}"
    qemu_img("create", "-q", "-f", "vpc", "-o", options, theirs, size)
    assert without_chance(ours.read_bytes()) == without_chance(theirs.read_bytes())


def test_the_largest_image(tmpfs: Path) -> None:
    blocklayer.create(tmpfs / "image", "2040G", format="vpc")
    with pytest.raises(BlockError, match="2040 GiB"):
        blocklayer.create(tmpfs / "image2", (2040 << 30) + 1, format="vpc")


def repack(image: Path, changes: dict[int, bytes], *, at: int = 0) -> None:
    """Change fields of the footer at `at`, and set its checksum again."""
    data = bytearray(image.read_bytes())
    for offset, value in changes.items():
        data[at + offset : at + offset + len(value)] = value
    data[at : at + 512] = vpc.Footer.unpack(data, at).pack_checked()
    image.write_bytes(data)


@pytest.mark.parametrize(
    "creator",
    [b"vpc ", b"vs  ", b"win ", b"d2v ", b"conx", b"tap\0", b"qemu", b"qem2", b"CTXS", b"vbox"],
)
@pytest.mark.parametrize("geometry", [b"\x01\x2e\x04\x11", b"\xff\xff\x10\xff"])
def test_sizes_are_what_the_creator_meant(
    creator: bytes, geometry: bytes, tmpfs: Path, qemu_img: Oracle
) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 12 * MIB, format="vpc", force_size="on")
    repack(image, {0x1C: creator, 0x30: struct.pack(">Q", 11 * MIB + 1000), 0x38: geometry})
    with blocklayer.open(image) as disk:
        assert disk.size == qemu_img.json("info", "--output=json", image)["virtual-size"]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0x40, b"\1\1\1\1", "Incorrect header checksum"),
        (0x200, b"x", "Invalid header magic"),
        (0x21C, b"\0\0\0\1", "Page table too small"),
        (0x21C, b"\x7f\xff\xff\xff", "Max Table Entries too large"),
        (0x220, b"\0\0\0\0", "Invalid block size"),
        (0x220, b"\0\x30\0\0", "Invalid block size"),
        (0x210, b"\x40", "has been truncated"),
        (0x000, b"x", "invalid VPC image"),
    ],
)
def test_what_is_refused(place: int, value: bytes, said: str, tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vpc")
    data = bytearray(image.read_bytes())
    data[place : place + len(value)] = value
    image.write_bytes(data)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image, format="vpc")


def test_a_fixed_image_is_raw_to_those_who_guess(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="vpc", subformat="fixed")
    with blocklayer.open(image) as disk:
        assert disk.format == "raw"


def test_the_footer_follows_the_data(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vpc")
    with blocklayer.open(image, writable=True) as disk:
        disk.write(0, b"x")
        disk.flush()
        data = image.read_bytes()
        assert data[-512:] == data[:512]
        disk.write(5 * MIB, b"y")
    data = image.read_bytes()
    assert data[-512:] == data[:512]


def stored(sector: int, run: int) -> bool:
    """Whether a sector of block 1 is in the child: every third run of so many sectors."""
    return sector // run % 3 == 0


def make_child(
    parent: Path, child: Path, locators: dict[bytes, bytes], name: str = "", run: int = 1
) -> None:
    """A differencing image with some sectors of block 1."""
    base = parent.read_bytes()
    footer, header = vpc.Footer.unpack(base), vpc.DynamicHeader.unpack(base, 512)
    header.parent_uuid, footer.uuid = footer.uuid, b"child's own uuid"
    footer.disk_type = vpc.TYPE_DIFFERENCING
    header.parent_name_field = name.encode("utf-16-be")
    place, entries, names = 4096, b"", b""
    for code, data in locators.items():
        entries += vpc.Locator(code, 512, len(data), 0, place + len(names)).pack()
        names += data.ljust(512, b"\0")
    header.locator_field = entries
    table = array("I", [vpc.UNUSED] * header.max_table_entries)
    block = place + len(names)
    table[1] = block // 512
    table.byteswap()
    bits = bytearray(512)
    for sector in range(4096):
        bits[sector // 8] |= (0x80 >> sector % 8) * stored(sector, run)
    head = footer.pack_checked() + header.pack_checked()
    head += table.tobytes().ljust(header.table_end - header.table_offset, b"\xff")
    whole = head.ljust(place, b"\0") + names + bits + b"child" * 500000
    child.write_bytes(whole[: block + 512 + 2 * MIB] + footer.pack())


LOCATORS = {
    "relative path": ({b"W2ru": ".\\base.vhd".encode("utf-16-le")}, ""),
    "file URL": ({b"W2ku": "C:\\x\\base.vhd".encode("utf-16-le"), b"MacX": b"URL"}, ""),
    "name only": ({b"W2ku": "C:\\x\\base.vhd".encode("utf-16-le")}, "C:\\disks\\base.vhd"),
}


@pytest.mark.parametrize("run", [1, 8])
@pytest.mark.parametrize("way", LOCATORS)
def test_a_differencing_image_shows_its_parent(way: str, run: int, tmpfs: Path) -> None:
    base, child = tmpfs / "base.vhd", tmpfs / "child.vhd"
    blocklayer.create(base, 6 * MIB, format="vpc", force_size="on")
    with blocklayer.open(base, writable=True) as disk:
        disk.write(MIB, b"base" * MIB)
        content = bytearray(disk.read(0, disk.size))
    locators, name = LOCATORS[way]
    url = f"file://localhost{base}".encode()
    used = {code: url if path == b"URL" else path for code, path in locators.items()}
    make_child(base, child, used, name, run)
    data = b"child" * 500000
    for sector in (number for number in range(4096) if stored(number, run)):
        at = 2 * MIB + sector * 512
        content[at : at + 512] = data[sector * 512 : sector * 512 + 512]
    with blocklayer.open(child) as disk:
        assert disk.read(0, disk.size) == content
        assert disk.read(2 * MIB + 700, 5000) == content[2 * MIB + 700 : 2 * MIB + 5700]
    if run % 8:
        # libvhdi takes a byte of the bitmap for eight sectors that are stored if the first is.
        return
    assert read_vhd(child, base) == content


def test_what_a_child_names_is_a_policy(tmpfs: Path) -> None:
    base, child = tmpfs / "base.vhd", tmpfs / "child.vhd"
    blocklayer.create(base, 6 * MIB, format="vpc")
    make_child(base, child, *LOCATORS["relative path"])
    with pytest.raises(BlockError, match="forbids opening"):
        blocklayer.open(child, policy=Policy(references=False))
    with blocklayer.open(child, policy=Policy(allow=(str(tmpfs),))) as disk:
        assert disk.size > 0
    with pytest.raises(BlockError, match="open it read-only"):
        blocklayer.open(child, writable=True)


def test_a_stranger_is_no_parent(tmpfs: Path) -> None:
    base, child = tmpfs / "base.vhd", tmpfs / "child.vhd"
    blocklayer.create(base, 6 * MIB, format="vpc")
    make_child(base, child, *LOCATORS["relative path"])
    base.unlink()
    blocklayer.create(base, 6 * MIB, format="vpc")
    with blocklayer.open(child) as disk:
        assert disk.read(2 * MIB, 512) == (b"child" * 103)[:512]
        with pytest.raises(BlockError, match="is not the parent"):
            disk.read(0, 512)


def test_a_child_without_a_parent_is_refused(tmpfs: Path) -> None:
    base, child = tmpfs / "base.vhd", tmpfs / "child.vhd"
    blocklayer.create(base, 6 * MIB, format="vpc")
    make_child(base, child, {})
    with pytest.raises(BlockError, match="names no parent"):
        blocklayer.open(child)


def test_another_reader(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vpc", force_size="on")
    with blocklayer.open(image, writable=True) as disk:
        for offset in range(0, 10 * MIB, 1234567):
            disk.write(offset, b"other reader" * 1000)
        content = disk.read(0, disk.size)
    assert read_vhd(image) == content
