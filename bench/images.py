"""The images that are measured, made once in a folder by the real tools."""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

CLUSTER = 64 << 10
SCATTERED_SIZE = 1 << 40
SCATTERED_CLUSTERS = 100_000
CHAIN_DEPTH = 30
SMALL_IMAGES = 1000


def tool(*command: str | Path, folder: Path, lines: Iterable[str] | None = None) -> None:
    """Run a real tool; ``lines`` are its standard input."""
    subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        check=True,
        text=True,
        input="".join(f"{line}\n" for line in lines) if lines is not None else "",
        stdout=subprocess.DEVNULL,
    )


def full(folder: Path, size: int) -> None:
    """``full.raw`` and ``full.qcow2``: data that does not compress, and no hole."""
    if not (folder / "full.qcow2").exists():
        with (folder / "full.raw").open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        tool("qemu-img", "convert", "-O", "qcow2", "full.raw", "full.qcow2", folder=folder)


def sparse(folder: Path, size: int) -> None:
    """``sparse.*``: a tenth is data, in runs of 64 KiB to 4 MiB, all over the disk."""
    if (folder / "sparse.qcow2").exists():
        return
    pick = random.Random(1)
    with (folder / "sparse.raw").open("wb") as file:
        file.truncate(size * 10)
        left = size
        while left > 0:
            length = pick.choice((1, 4, 16, 64)) * CLUSTER
            file.seek(pick.randrange(0, size * 10 - length, 4096))
            file.write(os.urandom(length))
            left -= length
    tool("qemu-img", "convert", "-O", "qcow2", "sparse.raw", "sparse.qcow2", folder=folder)


def compressible(folder: Path, size: int) -> None:
    """``files.raw``: what a disk holds, taken from the files of this machine; a quarter as much."""
    size //= 4
    path = folder / "files.raw"
    if path.exists():
        return
    with path.open("wb") as file:
        try:
            with tarfile.open(fileobj=file, mode="w|") as archive:
                for root in ("/usr/lib", "/usr/share", "/usr/bin"):
                    archive.add(root, filter=lambda entry: _while_room(entry, file.tell(), size))
        except _FullError:
            pass
        file.truncate(size)


def compressed(folder: Path, size: int) -> None:
    """``deflate.qcow2`` and ``zstd.qcow2``: the same, compressed."""
    compressible(folder, size)
    for name, type in (("deflate.qcow2", "zlib"), ("zstd.qcow2", "zstd")):
        if not (folder / name).exists():
            options = ("-O", "qcow2", "-o", f"compression_type={type}")
            tool("qemu-img", "convert", "-c", *options, "files.raw", name, folder=folder)


class _FullError(Exception):
    pass


def _while_room(entry: tarfile.TarInfo, used: int, size: int) -> tarfile.TarInfo:
    if used >= size:
        raise _FullError
    return entry


def scattered(folder: Path) -> None:
    """``scattered.qcow2`` and a copy: 1 TiB with 100,000 clusters of data all over it."""
    if (folder / "scattered-copy.qcow2").exists():
        return
    tool(
        "qemu-img", "create", "-q", "-f", "qcow2", "scattered.qcow2", str(SCATTERED_SIZE),
        folder=folder,
    )  # fmt: skip
    clusters = random.Random(1).sample(range(SCATTERED_SIZE // CLUSTER), SCATTERED_CLUSTERS)
    lines = [f"write -q -P {index % 255 + 1} {index * CLUSTER} 4k" for index in clusters]
    tool("qemu-io", "-t", "unsafe", "scattered.qcow2", folder=folder, lines=lines)
    tool("cp", "--sparse=always", "scattered.qcow2", "scattered-copy.qcow2", folder=folder)


def chain(folder: Path, size: int) -> None:
    """``layer1.qcow2`` … ``layer30.qcow2``: each over the one before, with 1 MiB in every 30."""
    if (folder / f"layer{CHAIN_DEPTH}.qcow2").exists():
        return
    for depth in range(1, CHAIN_DEPTH + 1):
        below = ("-b", f"layer{depth - 1}.qcow2", "-F", "qcow2") if depth > 1 else ()
        name = f"layer{depth}.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", *below, name, str(size), folder=folder)
        step = CHAIN_DEPTH << 20
        first = 0 if depth == 1 else (depth - 1) << 20
        lines = (
            [f"write -q -P 1 {at} 64M" for at in range(0, size, 64 << 20)]
            if depth == 1
            else [f"write -q -P {depth} {at} 1M" for at in range(first, size - (1 << 20), step)]
        )
        tool("qemu-io", "-t", "unsafe", name, folder=folder, lines=lines)


def small(folder: Path) -> None:
    """``small/0.qcow2`` … ``small/999.qcow2``."""
    place = folder / "small"
    if (place / f"{SMALL_IMAGES - 1}.qcow2").exists():
        return
    place.mkdir(exist_ok=True)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "0.qcow2", "1G", folder=place)
    content = (place / "0.qcow2").read_bytes()
    for number in range(1, SMALL_IMAGES):
        (place / f"{number}.qcow2").write_bytes(content)
