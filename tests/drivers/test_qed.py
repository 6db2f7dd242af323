"""QED: new images byte for byte, backing files, growing, the mark, and what check finds."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from blocklayer.cli.main import main
from blocklayer.graph.create import create_image
from blocklayer.graph.driver import BackingReference, FormatDriver
from blocklayer.graph.graph import Graph
from blocklayer.testing.crashing import CrashingDisk
from drivers.images import MIB, read_all
from oracles import Oracle
from proof.chains import run
from proof.crashes import REGISTRY, Bench, moments, raw_disk, spread, take

CLUSTER = 4096


@pytest.mark.parametrize("size", [0, 1, 1000, MIB, 64 << 40])
@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": "4k", "table_size": "16"}, {"cluster_size": "1M"}], ids=str
)
def test_a_new_image_is_what_qemu_makes(
    size: int, options: dict[str, str], tmpfs: Path, qemu_img: Oracle
) -> None:
    ours, theirs = tmpfs / "ours", tmpfs / "theirs"
    extra = [f"-o{name}={value}" for name, value in options.items()]
    result = qemu_img("create", "-q", "-f", "qed", *extra, theirs, str(size), check=False)
    if result.returncode:
        with pytest.raises(BlockError) as error:
            blocklayer.create(ours, size, format="qed", **options)
        assert str(error.value) in result.stderr
        return
    blocklayer.create(ours, size, format="qed", **options)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"cluster_size": "2048"}, MIB),
        ({"cluster_size": "5000"}, MIB),
        ({"cluster_size": "128M"}, MIB),
        ({"table_size": "3"}, MIB),
        ({"table_size": "32"}, MIB),
        ({"cluster_size": "4k", "table_size": "1"}, 1 << 31),
    ],
    ids=str,
)
def test_what_cannot_be_made(
    options: dict[str, str], size: int, tmpfs: Path, qemu_img: Oracle
) -> None:
    extra = [f"-o{name}={value}" for name, value in options.items()]
    result = qemu_img("create", "-q", "-f", "qed", *extra, tmpfs / "theirs", str(size), check=False)
    with pytest.raises(BlockError) as error:
        blocklayer.create(tmpfs / "ours", size, format="qed", **options)
    assert str(error.value) in result.stderr
    assert not (tmpfs / "ours").exists()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_overlays(format: str, tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    """Made as QEMU makes them, read by both, and what one writes the other continues."""
    base, ours, theirs, raw = (tmpfs / name for name in ("base", "ours", "theirs", "raw"))
    blocklayer.create(base, MIB, format=format)
    with blocklayer.open(base, format=format, writable=True) as disk:
        disk.write(0, b"base" * (MIB // 4))
    size = 2 * MIB + 512
    blocklayer.create(ours, size, format="qed", backing="base", backing_format=format)
    qemu_img("create", "-q", "-f", "qed", "-b", "base", "-F", format, theirs, str(size), cwd=tmpfs)
    assert ours.read_bytes() == theirs.read_bytes()
    model = bytearray(b"base" * (MIB // 4)).ljust(size, b"\0")
    with blocklayer.open(ours, format="qed", writable=True) as disk:
        for offset in (100, MIB - 100, size - 100):
            disk.write(offset, b"x" * 100)
            model[offset : offset + 100] = b"x" * 100
        disk.write_zeroes(300000, 200000)
        model[300000:500000] = bytes(200000)
    qemu_io("-f", "qed", "-c", "write -P 7 600000 5000", ours)
    model[600000:605000] = b"\7" * 5000
    assert read_all(ours, "qed") == model
    raw.write_bytes(model)
    qemu_img("compare", "-f", "qed", "-F", "raw", ours, raw)
    qemu_img("check", "-f", "qed", ours)


@pytest.mark.parametrize("size", [MIB // 2 + 512, MIB - 65536, MIB, 3 * MIB])
def test_growing_hides_a_longer_backing_file(size: int, tmpfs: Path, qemu_img: Oracle) -> None:
    base, overlay, raw = tmpfs / "base", tmpfs / "overlay", tmpfs / "raw"
    base.write_bytes(b"b" * (2 * MIB))
    start = MIB // 2
    blocklayer.create(overlay, start, format="qed", backing="base", backing_format="raw")
    with blocklayer.open(overlay, format="qed", writable=True) as disk:
        disk.resize(size)
        assert disk.size == size
        disk.write(size - 3, b"end")
    expected = (b"b" * start).ljust(size - 3, b"\0") + b"end"
    assert read_all(overlay, "qed") == expected
    raw.write_bytes(expected)
    qemu_img("compare", "-f", "qed", "-F", "raw", overlay, raw)
    qemu_img("check", "-f", "qed", overlay)


def test_sizes_that_cannot_be(tmpfs: Path) -> None:
    image = tmpfs / "image"
    blocklayer.create(image, MIB, format="qed")
    with blocklayer.open(image, format="qed", writable=True) as disk:
        for size, shrink in ((MIB // 2, True), (65 << 40, False), (MIB + 1, False)):
            with pytest.raises(BlockError):
                disk.resize(size, shrink=shrink)
        assert disk.size == MIB


def test_rebase(tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fill in (("one", b"1"), ("two", b"2")):
        (tmpfs / name).write_bytes(fill * MIB)
    image = tmpfs / "image"
    blocklayer.create(image, format="qed", backing="one", backing_format="raw")
    before = read_all(image, "qed")
    for name in ("two", "one", "two"):
        assert main(["img", "rebase", "-f", "qed", "-b", name, "-F", "raw", str(image)]) == 0
        assert qemu_img.json("info", "--output=json", image)["backing-filename"] == name
        assert read_all(image, "qed") == before
    assert main(["img", "rebase", "-f", "qed", "-b", "", str(image)]) == 0
    assert "backing-filename" not in qemu_img.json("info", "--output=json", image)
    qemu_img("check", "-f", "qed", image)


def new_crashing(backing: CrashingDisk, size: int) -> CrashingDisk:
    disk = CrashingDisk()

    async def make() -> None:
        await create_image(
            Graph(REGISTRY),
            disk.name,
            "qed",
            {"cluster_size": CLUSTER},
            size=size,
            backing=backing.name,
            backing_format="raw",
        )

    run(make())
    disk.settle()
    return disk


def test_power_failures_while_the_header_changes() -> None:
    """A new backing file's name, and a new size: the image opens, with the old or the new."""
    base = raw_disk(b"b" * 60000)
    disk = new_crashing(base, 50 * 1024)

    async def main() -> None:
        bench = await Bench.open(disk, format="qed")
        driver = bench.root.node.driver
        assert isinstance(driver, FormatDriver)
        await driver.change_backing(BackingReference("./" * 400 + base.name, "raw"))
        await driver.change_backing(BackingReference(base.name, "raw"))
        sizes = [50 * 1024, 50 * 1024 + 512, 100 * 1024]
        for size in sizes[1:]:
            await bench.root.truncate(size)
        await bench.root.close()
        for state in spread(moments(disk), 160):
            file = {"driver": "crashing", "filename": base.name}
            below = {"driver": "raw", "file": file}
            root = await take(state.disk(), format="qed", backing=below)
            assert root.node.size in sizes
            reference = root.node.driver.backing_reference  # type: ignore[attr-defined]
            assert reference.filename.endswith(base.name)
            data = await root.read(0, root.node.size)
            assert data == (b"b" * sizes[0]).ljust(root.node.size, b"\0"), state
            await root.close()

    run(main())


def damaged(folder: Path, edits: dict[str, int], extra: bytes = b"") -> Path:
    """An image with words changed: named header fields, or entries of tables."""
    image = folder / "image"
    blocklayer.create(image, MIB, format="qed", cluster_size="4096", table_size="2")
    with blocklayer.open(image, format="qed", writable=True) as disk:
        disk.write(0, b"1" * 65536)
        disk.write(MIB // 2, b"2" * 8192)
    data = bytearray(image.read_bytes()) + extra
    l1 = struct.unpack_from("<Q", data, 40)[0]
    l2 = struct.unpack_from("<Q", data, l1)[0]
    first = struct.unpack_from("<Q", data, l2)[0]
    places = {"features": 16, "l1[0]": l1, "l1[1]": l1 + 8, "l2[1]": l2 + 8}
    values = {-1: first, -2: l2, -3: l2 + 512, -4: l1}
    for name, value in edits.items():
        struct.pack_into("<Q", data, places[name], values.get(value, value))
    image.write_bytes(data)
    return image


DAMAGE = {
    "none": ({}, b""),
    "marked": ({"features": 2}, b""),
    "used twice": ({"l2[1]": -1}, b""),
    "over the L1 table": ({"l2[1]": -4}, b""),
    "past the end": ({"l2[1]": 0x7000000}, b""),
    "unaligned": ({"l2[1]": 0x4001}, b""),
    "table past the end": ({"l1[0]": 0x7000000}, b""),
    "table unaligned": ({"l1[0]": -3}, b""),
    "table gone": ({"l1[0]": 0}, b""),
    "table twice": ({"l1[1]": -2}, b""),
    "leaks": ({}, bytes(8192)),
    "an odd tail": ({}, bytes(100)),
    "marked, past the end": ({"features": 2, "l2[1]": 0x7000000}, b""),
    "marked, leaks": ({"features": 2}, bytes(8192)),
    "marked, used twice": ({"features": 2, "l2[1]": -1}, b""),
}
FIELDS = ("corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters")


@pytest.mark.parametrize("name", DAMAGE)
def test_check_and_repair_do_what_qemus_do(
    name: str, tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    edits, extra = DAMAGE[name]
    image = damaged(tmpfs, edits, extra)
    whole = image.read_bytes()

    def check(*options: str) -> dict[str, int]:
        main(["img", "check", "-f", "qed", "--output=json", *options, str(image)])
        return json.loads(capsys.readouterr().out)

    def counts(report: dict[str, int]) -> dict[str, int]:
        return {field: report.get(field, 0) for field in FIELDS}

    theirs = qemu_img("check", "-f", "qed", "--output=json", image, check=False)
    assert counts(check()) == counts(json.loads(theirs.stdout))
    check("-r", "all")
    ours = image.read_bytes()
    image.write_bytes(whole)
    qemu_img("check", "-f", "qed", "-r", "all", image, check=False)
    theirs_mended = bytearray(image.read_bytes())
    if name == "marked, used twice":
        # QEMU takes the mark away; the specification lets it stay while there is damage.
        theirs_mended[16] = 2
    assert ours == theirs_mended


@pytest.mark.parametrize("name", [name for name in DAMAGE if "marked" in name])
def test_a_marked_image_is_checked_before_it_is_written(name: str, tmpfs: Path) -> None:
    edits, extra = DAMAGE[name]
    image = damaged(tmpfs, edits, extra)
    with blocklayer.open(image, format="qed") as disk:
        disk.read(0, 4096)
    assert image.read_bytes()[16] == 2
    if name == "marked, used twice":
        with pytest.raises(BlockError, match="is damaged"):
            blocklayer.open(image, format="qed", writable=True)
        return
    with blocklayer.open(image, format="qed", writable=True) as disk:
        assert disk.read(0, 4096) == b"1" * 4096
    assert image.read_bytes()[16] == 0


@pytest.mark.parametrize(
    ("offset", "width", "value", "said"),
    [
        (4, "I", 2048, "QED cluster size is invalid"),
        (8, "I", 3, "QED table size is invalid"),
        (12, "I", 0, "QED header size is invalid"),
        (16, "Q", 8, "Unsupported QED features: 8"),
        (40, "Q", 0, "QED table offset is invalid"),
        (40, "Q", 1 << 40, "QED table offset is invalid"),
        (48, "Q", 1000, "QED image size is invalid"),
        (48, "Q", 1 << 60, "QED image size is invalid"),
    ],
)
def test_what_is_refused(
    offset: int, width: str, value: int, said: str, tmpfs: Path, qemu_img: Oracle
) -> None:
    image = damaged(tmpfs, {})
    data = bytearray(image.read_bytes())
    struct.pack_into("<" + width, data, offset, value)
    image.write_bytes(data)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image, format="qed")
    if offset != 12:
        assert said in qemu_img("info", "-f", "qed", image, check=False).stderr
