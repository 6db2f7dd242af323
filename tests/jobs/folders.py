"""Images that the tests of jobs work on, made by the real tools."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oracles import require
from proof.chains import Layered


@contextmanager
def fresh(parent: Path) -> Iterator[Path]:
    """An empty folder for one example."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def create(folder: Path, *arguments: str) -> None:
    """Run the real ``qemu-img create``."""
    require("qemu-img")("create", "-q", *arguments, cwd=folder)


def send(folder: Path, image: str, *commands: str) -> None:
    """Run commands of the real ``qemu-io``."""
    require("qemu-io")(*(part for line in commands for part in ("-c", line)), image, cwd=folder)


def chain(folder: Path) -> None:
    """base <- mid <- top, each larger than the one below, and ``new``, another base."""
    for name, content in _chain().items():
        (folder / name).write_bytes(content)


@functools.cache
def _chain() -> dict[str, bytes]:
    """What is in the files of a chain, by their names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_chain(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _make_chain(folder: Path) -> None:
    create(folder, "-f", "qcow2", "base.qcow2", "4M")
    send(folder, "base.qcow2", "write -P 1 0 1M")
    create(folder, "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", "6M")
    send(folder, "mid.qcow2", "write -P 2 512k 1M", "write -c -P 4 2M 64k")
    create(folder, "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "8M")
    send(
        folder, "top.qcow2",
        "write -P 3 1M 1M", "write -z 0 128k", "write -P 9 7M 64k", "write -P 7 3000000 4k",
    )  # fmt: skip
    create(folder, "-f", "qcow2", "-o", "cluster_size=4k", "new.qcow2", "5M")
    send(folder, "new.qcow2", "write -P 2 512k 512k", "write -P 8 3M 1M", "write -P 1 12345 777")


def uncompressed(chain: Layered) -> Layered:
    """Without compressed writes, which the real tool refuses over clusters that were written."""
    return Layered(
        [
            (shape, [request for request in requests if request.kind != "compress"])
            for shape, requests in chain.layers
        ]
    )
