"""dmg, cloop and bochs: what the tests write, read as QEMU reads it; and strange ones refused."""

from __future__ import annotations

import importlib.util
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError
from blocklayer.cli.main import main
from blocklayer.codec import dmg as codec
from drivers.images import MIB, read_all
from drivers.packed_images import Layout, pack, write_bochs, write_cloop, write_dmg, write_dmg_of
from oracles import HANG_TIMEOUT_S, Oracle

Writer = Callable[[Path], bytes]


def dmg(*kinds: str, **rest: int) -> Writer:
    return lambda path: write_dmg(path, Layout(kinds, **rest))  # type: ignore[arg-type]


WRITERS: dict[str, Writer] = {
    "dmg raw": dmg("raw", "zero", "raw", "ignored", "raw"),
    "dmg zlib": dmg("zlib", "zero", "zlib", "raw", "zlib", sectors=520),
    "dmg fork": dmg("zlib", "raw", fork=True),
    "dmg tables": dmg("zlib", "raw", "zero", tables=3),
    "dmg offset": dmg("zlib", "raw", data_offset=1536),
    "cloop": write_cloop,
    "cloop large": lambda path: write_cloop(path, block_size=MIB, blocks=3),
    "bochs": write_bochs,
    "bochs 1": lambda path: write_bochs(path, version=1),
    "bochs bitmap": lambda path: write_bochs(path, bitmap=700, extent=512 * 4096, extents=5),
}
BEYOND_QEMU: dict[str, Writer] = {
    "dmg bzip2": dmg("bzip2", "zlib", "bzip2"),
    "dmg lzma": dmg("lzma", "zero", "lzma", sectors=600),
    "dmg lzfse": dmg("lzfse", "raw", "lzfse", sectors=600),
    "dmg gap": dmg("zlib", "raw", tables=2, gap=100),
}


def written(folder: Path, name: str) -> tuple[Path, str, bytes]:
    """The image, its format, and its disk."""
    format = name.split(maxsplit=1)[0]
    path = folder / f"image.{format}"
    if name.endswith("lzfse") and importlib.util.find_spec("lzfse") is None:
        pytest.skip("the package lzfse is not installed")
    return path, format, {**WRITERS, **BEYOND_QEMU}[name](path)


@pytest.mark.parametrize("name", WRITERS)
def test_we_read_what_qemu_reads(name: str, tmpfs: Path, qemu_img: Oracle) -> None:
    image, format, model = written(tmpfs, name)
    raw = tmpfs / "raw"
    raw.write_bytes(model)
    qemu_img("compare", "-f", format, "-F", "raw", image, raw)
    theirs = qemu_img.json("info", "--output=json", image)
    assert read_all(image, format) == model
    with blocklayer.open(image) as disk:
        assert (disk.format, disk.size) == (theirs["format"], theirs["virtual-size"])


@pytest.mark.parametrize("name", BEYOND_QEMU)
def test_we_read_what_qemu_at_hand_does_not(name: str, tmpfs: Path) -> None:
    image, format, model = written(tmpfs, name)
    assert read_all(image, format) == model


@pytest.mark.parametrize("name", ["dmg zlib", "cloop", "bochs"])
def test_info_and_map(
    name: str, tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    image, format, model = written(tmpfs, name)
    theirs = qemu_img.json("info", "--output=json", "-f", format, image)
    assert main(["img", "info", "--output=json", "-f", format, str(image)]) == 0
    assert json.loads(capsys.readouterr().out) == theirs
    with blocklayer.open(image, format=format) as disk:
        entries = list(disk.map())
        assert sum(entry.length for entry in entries) == len(model)
        for entry in entries:
            if entry.zero:
                assert not any(model[entry.start : entry.start + entry.length])
            elif entry.offset is not None:
                stored = image.read_bytes()[entry.offset : entry.offset + entry.length]
                assert stored == model[entry.start : entry.start + entry.length]
            else:
                assert entry.compressed


@pytest.mark.parametrize("name", ["dmg zlib", "cloop large", "bochs"])
def test_reads_of_any_range(name: str, tmpfs: Path) -> None:
    image, format, model = written(tmpfs, name)
    chance = random.Random(4)
    with blocklayer.open(image, format=format) as disk:
        for _ in range(300):
            at = chance.randrange(len(model))
            length = min(chance.choice([1, 511, 4096, 300000]), len(model) - at)
            assert disk.read(at, length) == model[at : at + length]


@pytest.mark.parametrize("name", ["dmg zlib", "cloop", "bochs"])
def test_they_are_read_only(name: str, tmpfs: Path) -> None:
    image, format, _ = written(tmpfs, name)
    with pytest.raises(BlockError, match="can be read only"):
        blocklayer.open(image, format=format, writable=True)
    with pytest.raises(BlockError, match="does not support image creation"):
        blocklayer.create(tmpfs / "new", MIB, format=format)
    options = {"driver": format, "auto-read-only": True, "filename": str(image)}
    with blocklayer.open(options, writable=False) as disk:
        disk.read(0, 512)


@pytest.mark.parametrize("name", ["dmg zlib", "cloop", "bochs"])
def test_overlays_and_conversion(name: str, tmpfs: Path, qemu_img: Oracle) -> None:
    image, format, model = written(tmpfs, name)
    overlay, copy = tmpfs / "overlay", tmpfs / "copy"
    blocklayer.create(overlay, format="qcow2", backing=image, backing_format=format)
    with blocklayer.open(overlay, format="qcow2", writable=True) as disk:
        disk.write(5000, b"over" * 100)
    expected = bytearray(model)
    expected[5000:5400] = b"over" * 100
    assert read_all(overlay, "qcow2") == expected
    command = ["img", "convert", "-f", format, "-O", "qcow2", "-c", str(image), str(copy)]
    assert main(command) == 0
    qemu_img("compare", "-f", format, "-F", "qcow2", image, copy)


@pytest.mark.parametrize("name", [*WRITERS, *BEYOND_QEMU])
def test_damaged_images_are_refused_or_read(name: str, tmpfs: Path) -> None:
    image, format, _ = written(tmpfs, name)
    whole = image.read_bytes()
    chance = random.Random(9)
    heads = list(range(0, min(len(whole), 700))) + list(
        range(max(0, len(whole) - 1700), len(whole))
    )
    for _ in range(60):
        mutated = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice(heads) if chance.random() < 0.7 else chance.randrange(len(whole))
            mutated[at : at + 4] = chance.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", chance.randbytes(4)]
            )
        if chance.random() < 0.1:
            del mutated[chance.randrange(len(mutated)) :]
        image.write_bytes(mutated)
        try:
            with blocklayer.open(image, format=format) as disk:
                for at in range(0, min(disk.size, 4 * MIB), 70000):
                    disk.read(at, min(1000, disk.size - at))
        except BlockError:
            continue


@pytest.mark.parametrize(
    ("name", "offset", "width", "value", "said"),
    [
        ("cloop", 128, ">I", 0, "must be a multiple of 512"),
        ("cloop", 128, ">I", 513, "must be a multiple of 512"),
        ("cloop", 128, ">I", 128 * MIB, "or less"),
        ("cloop", 132, ">I", 0x1FFFFFFF, "too many offsets"),
        ("cloop", 132, ">I", 0x100000, "past the end"),
        ("bochs", 64, "<I", 0x30000, "version 0x30000 is not supported"),
        ("bochs", 48, "<I", 0, "not supported"),
        ("bochs", 72, "<I", 3, "Catalog size is too small"),
        ("bochs", 72, "<I", 0x7FFFFFFF, "Catalog size is too large"),
        ("bochs", 72, "<I", 0xFFFFFF, "past the end"),
        ("bochs", 80, "<I", 1000, "not a power of two"),
        ("bochs", 76, "<I", 1, "does not cover an extent"),
    ],
)
def test_what_is_refused(
    name: str, offset: int, width: str, value: int, said: str, tmpfs: Path
) -> None:
    image, format, _ = written(tmpfs, name)
    data = bytearray(image.read_bytes())
    struct.pack_into(width, data, offset, value)
    image.write_bytes(data)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image, format=format)


def refused_dmg(folder: Path, chunks: list[tuple[int, ...]], said: str) -> None:
    head = struct.pack(">4sIQQQII24sII128sI", b"mish", 1, 0, 0, 0, 0, 0, b"", 2, 32, b"",
                       len(chunks))  # fmt: skip
    table = head + b"".join(struct.pack(">IIQQQQ", chunk[0], 0, *chunk[1:]) for chunk in chunks)
    image = folder / "image.dmg"
    write_dmg_of(image, bytes(4096), [table], 0, 8, fork=False)
    with pytest.raises(BlockError, match=said):
        blocklayer.open(image)


def test_strange_chunks_are_refused(tmpfs: Path) -> None:
    zlib, raw = codec.ZLIB, codec.RAW
    refused_dmg(tmpfs, [(raw, 0, 2, 0, 1024), (raw, 1, 2, 0, 1024)], "meet")
    refused_dmg(tmpfs, [(zlib, 0, 1 << 20, 0, 100)], "packed")
    refused_dmg(tmpfs, [(zlib, 1 << 60, 1, 0, 100)], "sectors")
    refused_dmg(tmpfs, [(zlib, 0, 8, 1 << 50, 100)], "past the end")
    refused_dmg(tmpfs, [(raw, 0, 8, 0, 100)], "shorter")
    refused_dmg(tmpfs, [(0x80000004, 0, 8, 0, 100)], "kind 0x80000004 are not supported")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"no XML",
        b"<plist><dict></dict></plist>",
        b"<!DOCTYPE a [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><plist><string>&b;</string></plist>",
        b"<plist>" + b"<array>" * 100000,
        b"<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key>"
        b"<string>text</string></dict></array></dict></dict></plist>",
    ],
)
def test_strange_property_lists_are_refused(text: bytes) -> None:
    with pytest.raises(BlockError):
        codec.tables_of_plist(text)


def test_a_file_that_is_only_called_so(tmpfs: Path) -> None:
    image = tmpfs / "image.dmg"
    image.write_bytes(bytes(MIB))
    with pytest.raises(BlockError, match="Image not in dmg format"):
        blocklayer.open(image)
    with blocklayer.open(image, format="raw") as disk:
        assert disk.size == MIB
    qcow2 = tmpfs / "other.dmg"
    blocklayer.create(qcow2, MIB, format="qcow2")
    with blocklayer.open(qcow2) as disk:
        assert disk.format == "qcow2"


def test_without_the_package_lzfse(tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, _, model = written(tmpfs, "dmg lzfse")
    monkeypatch.setitem(sys.modules, "lzfse", None)
    with blocklayer.open(image) as disk:
        size = 600 * 512
        assert disk.read(size, size) == model[size : 2 * size]
        with pytest.raises(BlockError, match="install the package 'lzfse'"):
            disk.read(0, 1)


_BOMB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from blocklayer.drivers import unpacking
try:
    getattr(unpacking, sys.argv[1])(open(sys.argv[2], "rb").read(), 65536)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["zlib", "bzip2", "lzma", "lzfse"])
def test_bombs_do_not_go_off(kind: str, tmpfs: Path) -> None:
    """A chunk of 64 KiB that gives far more, or says that it gives less than it does."""
    if kind == "lzfse" and importlib.util.find_spec("lzfse") is None:
        pytest.skip("the package lzfse is not installed")
    packed = pack(kind, bytes(600000 if kind == "lzfse" else 8 * MIB))
    if kind == "lzfse":
        # Every block says that it is small; all of them are not.
        end = packed.rindex(b"bvx$")
        block = bytearray(packed[:end])
        struct.pack_into("<I", block, 4, 40)
        packed = bytes(block) * 1000 + packed[end:]
    (tmpfs / "bomb").write_bytes(packed)
    command = [sys.executable, "-c", _BOMB, f"unpack_{kind}", str(tmpfs / "bomb")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    if kind == "lzfse":
        assert "could give more" in done.stdout
