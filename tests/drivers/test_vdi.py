"""VDI: new images byte for byte, and what check finds."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from drivers.images import MIB
from oracles import Oracle
from proof.chains import run
from proof.crashes import check, take  # noqa: F401

UUIDS = slice(0x188, 0x1A8)


@pytest.mark.parametrize("size", [0, 1, 1000, MIB, MIB + 1, 200 * MIB])
@pytest.mark.parametrize("static", ["off", "on"])
def test_a_new_image_is_what_qemu_makes(
    size: int, static: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    if static == "on" and size > 2 * MIB:
        size = 2 * MIB
    blocklayer.create(ours, size, format="vdi", static=static)
    qemu_img("create", "-q", "-f", "vdi", "-o", f"static={static}", theirs, str(size))
    images = [bytearray(path.read_bytes()) for path in (ours, theirs)]
    for image in images:
        image[UUIDS] = bytes(32)
    assert images[0] == images[1]


def test_the_largest_image(tmpfs: Path) -> None:
    with pytest.raises(BlockError, match="max supported is 0x1fffff8000000"):
        blocklayer.create(tmpfs / "image", 0x1FFFFF8000001, format="vdi")
    assert not (tmpfs / "image").exists()


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (0x44, 0x10002, "unsupported VDI image (version 1.2)"),
        (0x154, 513, "unaligned block map offset 0x201"),
        (0x158, 1025, "unaligned data offset 0x401"),
        (0x168, 1024, "sector size 1024 is not 512"),
        (0x178, 1 << 19, "block size 524288 is not 1048576"),
        (0x180, 9, "image bitmap has room for 9437184"),
        (0x1A8, 1, "non-NULL link UUID"),
        (0x1B8, 1, "non-NULL parent UUID"),
    ],
)
def test_what_is_refused(offset: int, value: int, said: str, tmpfs: Path, qemu_img: Oracle) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vdi")
    data = bytearray(image.read_bytes())
    struct.pack_into("<I", data, offset, value)
    image.write_bytes(data)
    with pytest.raises(BlockError, match=said.replace("(", r"\(").replace(")", r"\)")):
        blocklayer.open(image, format="vdi")
    assert said in qemu_img("info", "-f", "vdi", image, check=False).stderr


@pytest.mark.parametrize(
    ("entry", "word"), [(0, 1), (0, 70), (3, 0xFFFFFFFF), (3, 0xFFFFFFFE), (2, 2)]
)
def test_check_finds_what_qemu_finds(entry: int, word: int, tmpfs: Path, qemu_img: Oracle) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, 10 * MIB, format="vdi")
    with blocklayer.open(image, writable=True) as disk:
        for block in (1, 3, 5):
            disk.write(block * MIB, b"x")
    data = bytearray(image.read_bytes())
    struct.pack_into("<I", data, 0x200 + 4 * entry, word)
    image.write_bytes(data)
    theirs = qemu_img("check", "-f", "vdi", "--output=json", image, check=False)
    import json

    async def main() -> int:
        async with await blocklayer.aio.Disk.open(image, format="vdi") as disk:
            found = await disk.root.node.driver.check(frozenset())  # type: ignore[attr-defined]
            return int(found.corruptions)

    result: list[int] = []

    async def keep() -> None:
        result.append(await main())

    run(keep())
    assert result == [json.loads(theirs.stdout).get("corruptions", 0)]
