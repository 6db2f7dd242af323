"""Images for the command line tests: made once by the real tools, for everybody to read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from oracles import Oracle, require


class Maker:
    """Makes the images with the real tools."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._img: Oracle = require("qemu-img")
        self._io: Oracle = require("qemu-io")

    def create(self, *arguments: str) -> None:
        self._img("create", "-q", *arguments, cwd=self.folder)

    def img(self, *arguments: str) -> None:
        self._img(*arguments, cwd=self.folder)

    def io(self, image: str, *commands: str) -> None:
        options = [part for command in commands for part in ("-c", command)]
        self._io(*options, image, cwd=self.folder)

    def patch(self, image: str, offset: int, data: bytes) -> None:
        with (self.folder / image).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def copy(self, image: str, copy: str) -> None:
        shutil.copy(self.folder / image, self.folder / copy)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that no test may change."""
    folder = tmp_path_factory.mktemp("images")
    make = Maker(folder)
    _plain_images(make)
    _chains(make)
    _damaged_images(make)
    return folder


def _plain_images(make: Maker) -> None:
    make.create("-f", "raw", "a.raw", "1M")
    with (make.folder / "sparse.raw").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 18)
        file.write(b"x")
    (make.folder / "odd.raw").write_bytes(b"x" * 1000)
    (make.folder / "empty.raw").touch()
    (make.folder / "folder").mkdir()
    make.create("-f", "qcow2", "a.qcow2", "1M")
    make.create("-f", "qcow2", "-o", "compat=0.10", "v2.qcow2", "1M")
    make.create("-f", "qcow2", "-o", "cluster_size=512,refcount_bits=1", "tiny.qcow2", "1000000")
    make.create("-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=256k", "lazy.qcow2", "10G")
    make.create("-f", "qcow2", "-o", "preallocation=metadata", "meta.qcow2", "1M")
    make.io("meta.qcow2", "write 512k 64k")
    make.create("-f", "qcow2", "-o", "preallocation=full", "full.qcow2", "1M")
    make.create("-f", "qcow2", "mixed.qcow2", "3M")
    make.io(
        "mixed.qcow2", "write 0 200k", "write -z 256k 64k", "write 1M 256k", "write -z 1M 64k",
        "write -c 512k 64k", "discard 1088k 64k", "write -z -u 1152k 64k",
    )  # fmt: skip
    make.create("-f", "qcow2", "-o", "extended_l2=on", "extended.qcow2", "3M")
    make.io(
        "extended.qcow2", "write 3k 20k", "write 128k 64k", "write -z 130k 6k", "write -c 256k 64k",
        "write -z 512k 70k", "write -z -u 144k 2k", "discard 2k 2k", "write 2M 300k",
    )  # fmt: skip
    make.create(
        "-f", "qcow2", "-o", "extended_l2=on,preallocation=metadata", "extendedmeta.qcow2", "1M"
    )
    make.io("extendedmeta.qcow2", "write 130k 6k")
    make.create("-f", "qcow2", "snaps.qcow2", "1M")
    make.io("snaps.qcow2", "write 0 64k")
    make.img("snapshot", "-c", "first one", "snaps.qcow2")
    make.img("snapshot", "-c", "second", "snaps.qcow2")
    make.create("-f", "qcow2", "na me,x.qcow2", "1M")


def _chains(make: Maker) -> None:
    make.create("-f", "qcow2", "base.qcow2", "1M")
    make.io("base.qcow2", "write 0 64k", "write -z 128k 64k", "write 256k 128k")
    make.create("-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "mid.qcow2", "2M")
    make.io("mid.qcow2", "write 512k 64k", "write -z 256k 64k")
    make.create("-f", "qcow2", "-F", "qcow2", "-b", "mid.qcow2", "top.qcow2", "3M")
    make.io("top.qcow2", "write 576k 64k", "write 2100k 4k")
    make.create("-f", "qcow2", "-F", "raw", "-b", "sparse.raw", "onraw.qcow2")
    make.create(
        "-f", "qcow2", "-o", "extended_l2=on,cluster_size=16k,preallocation=metadata",
        "-F", "qcow2", "-b", "extended.qcow2", "extendedtop.qcow2",
    )  # fmt: skip
    make.io("extendedtop.qcow2", "write 135k 1k", "write -z 132k 512", "write 260k 1k")
    make.create("-u", "-f", "qcow2", "-F", "qcow2", "-b", "gone.qcow2", "orphan.qcow2", "1M")
    (make.folder / "sub").mkdir()
    make.create("-f", "qcow2", "-F", "qcow2", "-b", "../base.qcow2", "sub/mid.qcow2")
    make.create("-f", "qcow2", "-F", "qcow2", "-b", "mid.qcow2", "sub/top.qcow2")
    for one, other in (("loop1.qcow2", "loop2.qcow2"), ("loop2.qcow2", "loop1.qcow2")):
        make.create("-u", "-f", "qcow2", "-F", "qcow2", "-b", other, one, "1M")
    make.create("-u", "-f", "qcow2", "-F", "qcow2", "-b", "./self.qcow2", "self.qcow2", "1M")


def _damaged_images(make: Maker) -> None:
    """Images whose L2 table is at 0x40000, four data clusters following it."""
    make.create("-f", "qcow2", "sound.qcow2", "1M")
    make.io("sound.qcow2", "write 0 256k")
    make.copy("sound.qcow2", "leak.qcow2")
    make.patch("leak.qcow2", 0x40008, bytes(8))
    make.copy("sound.qcow2", "corrupt.qcow2")
    make.patch("corrupt.qcow2", 0x40008, bytes.fromhex("8000000001000000"))
    make.patch("corrupt.qcow2", 0x40018, bytes.fromhex("8000000000050000"))
    make.copy("sound.qcow2", "short.qcow2")
    os.truncate(make.folder / "short.qcow2", 300_000)
    make.copy("sound.qcow2", "header.qcow2")
    os.truncate(make.folder / "header.qcow2", 100)
    make.copy("sound.qcow2", "dirty.qcow2")
    make.patch("dirty.qcow2", 72, bytes.fromhex("0000000000000001"))
    make.copy("sound.qcow2", "marked.qcow2")
    make.patch("marked.qcow2", 72, bytes.fromhex("0000000000000002"))
    make.copy("sound.qcow2", "future.qcow2")
    make.patch("future.qcow2", 72, bytes.fromhex("0000010000000000"))
    make.copy("sound.qcow2", "version9.qcow2")
    make.patch("version9.qcow2", 4, bytes.fromhex("00000009"))
    make.copy("sound.qcow2", "clusterbits.qcow2")
    make.patch("clusterbits.qcow2", 20, bytes.fromhex("00000040"))


@pytest.fixture
def images(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be changed."""
    folder = tmp_path / "images"
    shutil.copytree(pristine, folder, symlinks=True)
    return folder
