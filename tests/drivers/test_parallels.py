"""Parallels: new images, the mark of use, space that is given back, and what check finds."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from blocklayer.cli.main import main
from drivers.images import MIB, Kind, read_all, write_ours
from drivers.other_readers import read_parallels
from drivers.test_foreign_crashes import new_disk
from oracles import Oracle
from proof.chains import run
from proof.crashes import Bench, check, moments, spread, take

KIB = 1024
IN_USE = 0x746F6E59


@pytest.mark.parametrize("size", [0, 1, 1000, MIB, 3 * MIB + 512, 100 << 30])
@pytest.mark.parametrize("cluster_size", ["1M", "64k", "512", "129024", "1000"])
def test_a_new_image_is_what_qemu_makes(
    size: int, cluster_size: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    if size > MIB * 100 and cluster_size in ("512", "1000"):
        size = 100 * MIB
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    blocklayer.create(ours, size, format="parallels", cluster_size=cluster_size)
    option = f"cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "parallels", "-o", option, theirs, str(size))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("size", "cluster_size", "said"),
    [
        (MIB, "4G", "Cluster size is too large"),
        (2 << 60, "1M", "Image size is too large for this cluster size"),
    ],
)
def test_what_cannot_be_made(size: int, cluster_size: str, said: str, tmpfs: Path) -> None:
    with pytest.raises(BlockError, match=said):
        blocklayer.create(tmpfs / "image", size, format="parallels", cluster_size=cluster_size)
    assert not (tmpfs / "image").exists()


def test_another_reader_agrees(tmpfs: Path) -> None:
    """It knows the old magic only, and wants the folder of a Parallels machine around the image."""
    folder = tmpfs / "disk.hdd"
    folder.mkdir()
    image = folder / "disk.hdd.0.hds"
    kind = Kind("parallels", size=4 * MIB)
    kind.create(image)
    data = bytearray(image.read_bytes())
    data[:16] = b"WithoutFreeSpace"
    image.write_bytes(data)
    model = write_ours(image, kind, seed=8)
    (folder / "disk.hdd").touch()
    (folder / "DiskDescriptor.xml").write_text(_DESCRIPTOR.format(sectors=len(model) // 512))
    assert read_parallels(folder / "DiskDescriptor.xml") == model


_DESCRIPTOR = """<?xml version='1.0' encoding='UTF-8'?>
<Parallels_disk_image Version="1.0">
    <Disk_Parameters>
        <Disk_size>{sectors}</Disk_size>
        <Cylinders>8</Cylinders><PhysicalSectorSize>4096</PhysicalSectorSize>
        <LogicSectorSize>512</LogicSectorSize>
        <Heads>16</Heads><Sectors>63</Sectors><Padding>0</Padding>
    </Disk_Parameters>
    <StorageData>
        <Storage>
            <Start>0</Start><End>{sectors}</End><Blocksize>2048</Blocksize>
            <Image>
                <GUID>{{5fbaabe3-6958-40ff-92a7-860e329aab41}}</GUID>
                <Type>Compressed</Type><File>disk.hdd.0.hds</File>
            </Image>
        </Storage>
    </StorageData>
    <Snapshots>
        <Shot>
            <GUID>{{5fbaabe3-6958-40ff-92a7-860e329aab41}}</GUID>
            <ParentGUID>{{00000000-0000-0000-0000-000000000000}}</ParentGUID>
        </Shot>
    </Snapshots>
</Parallels_disk_image>
"""


def header_word(image: Path, offset: int) -> int:
    return int(struct.unpack_from("<I", image.read_bytes(), offset)[0])


def test_the_mark_of_use(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="parallels", cluster_size="4096")
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        assert header_word(image, 44) == 0
        disk.write(0, b"x")
        disk.flush()
        assert header_word(image, 44) == IN_USE
        left = image.read_bytes()
    assert header_word(image, 44) != IN_USE
    image.write_bytes(left)
    with blocklayer.open(image, format="parallels") as disk:
        assert disk.read(0, 1) == b"x"
    assert header_word(image, 44) == IN_USE
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        assert disk.read(0, 1) == b"x"
    assert header_word(image, 44) != IN_USE


def test_space_is_given_back_and_used_again(tmpfs: Path, qemu_img: Oracle) -> None:
    image, raw = tmpfs / "image", tmpfs / "raw"
    blocklayer.create(image, MIB, format="parallels", cluster_size="64k")
    model = bytearray(MIB)
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.write(0, b"x" * MIB)
        model[:] = b"x" * MIB
        used = image.stat().st_blocks
        disk.discard(128 * KIB, 256 * KIB)
        model[128 * KIB : 384 * KIB] = bytes(256 * KIB)
        disk.write_zeroes(512 * KIB + 100, 200 * KIB)
        model[512 * KIB + 100 : 712 * KIB + 100] = bytes(200 * KIB)
        disk.flush()
        assert disk.read(0, MIB) == model
        assert image.stat().st_blocks < used
        size = image.stat().st_size
        for at in range(130 * KIB, 380 * KIB, 64 * KIB):
            disk.write(at, b"new")
            model[at : at + 3] = b"new"
        disk.flush()
        assert image.stat().st_size == size
        assert disk.read(0, MIB) == model
    # And what is free in a file that was closed.
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.write_zeroes(0, 64 * KIB)
        model[: 64 * KIB] = bytes(64 * KIB)
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.write(520 * KIB, b"y" * 180 * KIB)
        model[520 * KIB : 700 * KIB] = b"y" * 180 * KIB
        assert image.stat().st_size == size
    raw.write_bytes(model)
    qemu_img("compare", "-f", "parallels", "-F", "raw", image, raw)
    qemu_img("check", "-f", "parallels", image)


def test_power_failures_while_space_is_used_again() -> None:
    async def main() -> None:
        kind = Kind("parallels", {"cluster_size": "4096"}, size=64 * KIB)
        disk = await new_disk(kind)
        bench = await Bench.open(disk, format="parallels")
        chance = random.Random(5)
        for number in range(30):
            at = chance.randrange(16) * 4096
            if number % 3 == 2:
                await bench.do(chance.choice(["zero", "discard"]), at, 8192 if at < 57344 else 4096)
            else:
                await bench.write(at + chance.randrange(3) * 512, 1024, number + 1)
            if number % 5 == 4:
                await bench.flush()
        await bench.root.close()
        bench.versions.flushed()
        for state in spread(moments(disk), 200):
            root = await take(state.disk(), format="parallels")
            problem = bench.explain(state.position, await root.read(0, 64 * KIB))
            assert problem is None, f"{state}: {problem}"
            found = await check(root)
            assert not found.corruptions, f"{state}: {found.messages}"
            await root.close()

    run(main())


def damaged(folder: Path, change: Callable[[bytearray], None] = lambda data: None) -> Path:
    image = folder / "image"
    blocklayer.create(image, 100 * KIB, format="parallels", cluster_size="4096")
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.write(0, b"1" * 16384)
        disk.write(49152, b"2" * 12288)
    data = bytearray(image.read_bytes())
    data[44:48] = bytes(4)
    change(data)
    image.write_bytes(data)
    return image


def word(offset: int, value: int, width: str = "I") -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into("<" + width, data, offset, value)


def both(*changes: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        for each in changes:
            each(data)

    return change


def old_magic(data: bytearray) -> None:
    data[:16] = b"WithoutFreeSpace"
    for place in range(64, 164, 4):
        struct.pack_into("<I", data, place, struct.unpack_from("<I", data, place)[0] * 8)


def longer(count: int) -> Callable[[bytearray], None]:
    return lambda data: data.extend(bytes(count))


def shorter(count: int) -> Callable[[bytearray], None]:
    def cut(data: bytearray) -> None:
        del data[-count:]

    return cut


DAMAGE = {
    "none": lambda data: None,
    "in use": word(44, IN_USE),
    "closed": word(44, 0x312E3276),
    "used twice": word(68, 1),
    "used twice, in use": both(word(68, 1), word(44, IN_USE)),
    "leak": longer(8192),
    "odd leak": longer(100),
    "hole": word(68, 0),
    "cut within a cluster": shorter(100),
    "no data offset": word(48, 0),
    "short table": word(32, 3),
    "long table": word(32, 900),
    "old magic": old_magic,
    "old magic, no data offset": both(old_magic, word(48, 0)),
}
CRASHES_QEMU = {
    "past the end": word(68, 1000),
    "far past the end": word(68, 0xFFFFFFFF),
    "cut": shorter(4096),
}
FIELDS = (
    "corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters",
    "image-end-offset",
)  # fmt: skip


def our_check(image: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, int]:
    main(["img", "check", "-f", "parallels", "--output=json", *options, str(image)])
    report = json.loads(capsys.readouterr().out)
    return {field: report.get(field, 0) for field in FIELDS}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_and_repair_do_what_qemus_do(
    name: str, tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    image = damaged(tmpfs, DAMAGE[name])
    before = read_all(image, "parallels")
    theirs = qemu_img("check", "-f", "parallels", "--output=json", image, check=False)
    # QEMU prints what it finds where the report goes.
    report = json.loads(theirs.stdout[theirs.stdout.index("{") :])
    assert our_check(image, capsys) == {field: report.get(field, 0) for field in FIELDS}
    our_check(image, capsys, "-r", "all")
    assert read_all(image, "parallels") == before
    assert qemu_img("check", "-f", "parallels", image).returncode == 0
    again = our_check(image, capsys)
    assert again["corruptions"] == again["leaks"] == 0


@pytest.mark.parametrize("name", CRASHES_QEMU)
def test_entries_past_the_end_are_dropped(
    name: str, tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    image = damaged(tmpfs, CRASHES_QEMU[name])
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        with pytest.raises(BlockError, match="outside its data"):
            disk.read(0, 100 * KIB)
        with pytest.raises(BlockError, match="check it"):
            disk.write(32768, b"x")
    found = our_check(image, capsys)
    assert found["corruptions"] == 1
    our_check(image, capsys, "-r", "all")
    assert our_check(image, capsys)["corruptions"] == 0
    qemu_img("check", "-f", "parallels", image)
    assert read_all(image, "parallels")[:4096] == b"1" * 4096


def test_an_image_left_in_use_and_damaged_is_not_written(tmpfs: Path) -> None:
    image = damaged(tmpfs, DAMAGE["used twice, in use"])
    with pytest.raises(BlockError, match="not closed properly and is damaged"):
        blocklayer.open(image, format="parallels", writable=True)
    blocklayer.open(image, format="parallels").close()


def extension(flags: int, magic: int) -> Callable[[bytearray], None]:
    def add(data: bytearray) -> None:
        struct.pack_into("<Q", data, 56, len(data) // 4096)
        feature = struct.pack("<QQII", magic, flags, 0, 0)
        data += struct.pack("<Q16s", 0xAB234CEF23DCEA87, b"") + feature + bytes(24)
        data += bytes(-len(data) % 4096)

    return add


def test_an_extension_that_must_stay_forbids_writes(tmpfs: Path) -> None:
    image = damaged(tmpfs, extension(1, 0x1234))
    assert read_all(image, "parallels").startswith(b"1111")
    with pytest.raises(BlockError, match="forbids to change it"):
        blocklayer.open(image, format="parallels", writable=True)


def test_other_extensions_go_with_the_first_change(tmpfs: Path, qemu_img: Oracle) -> None:
    image = damaged(tmpfs, extension(0, 0x20385FAE252CB34A))
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.read(0, 100)
    assert header_word(image, 56)
    with blocklayer.open(image, format="parallels", writable=True) as disk:
        disk.write(30000, b"x")
    assert not header_word(image, 56)
    qemu_img("check", "-f", "parallels", image)


@pytest.mark.parametrize(
    ("offset", "value", "said"),
    [
        (16, 3, "Image not in Parallels format"),
        (28, 0, "Invalid image: Zero sectors per track"),
        (28, 0xFFFFFFFF, "Invalid image: Too big cluster"),
        (32, 0x40000000, "Catalog too large"),
        (32, 0x10000000, "past the end"),
        (40, 0x10000000, "Invalid image"),
    ],
)
def test_what_is_refused(offset: int, value: int, said: str, tmpfs: Path) -> None:
    image = damaged(tmpfs, word(offset, value))
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image, format="parallels")
