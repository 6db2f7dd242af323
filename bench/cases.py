"""The cases: what runs, against what, and the ratio that is wanted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import images
from bench.measure import BLK, IMG, QEMU_IMG, Command

Prepare = Callable[[Path, int], None]


class Case(NamedTuple):
    """Two commands and the largest good ratio of the first one's time to the second one's."""

    name: str
    prepare: Prepare
    ours: Command
    peer: Command
    most: float = 1.0
    made: str | None = None
    """A file that both make; it is removed before each run."""
    runs: int | None = None


def _img(name: str, prepare: Prepare, line: str, most: float = 1.0) -> Case:
    """A command of ``blk img`` against the same of ``qemu-img``."""
    words = line.split()
    made = words[-1] if words[0] == "convert" else None
    return Case(name, prepare, (*IMG, *words), (*QEMU_IMG, *words), most, made)


def _piped(name: str, prepare: Prepare, line: str) -> Case:
    """A stream to a file through a pipe, against the real tool that writes the file itself."""
    through = ("sh", "-c", f"{shlex.join((*IMG, *line.split(), '-'))} | cat > out")
    return Case(name, prepare, through, (*QEMU_IMG, *line.split(), "out"), 2.0, "out")


def _served(name: str, image: str, load: str, most: float) -> Case:
    """A load on ``blk nbd`` against the same on ``qemu-nbd``."""
    ours, peer = (
        (sys.executable, "-m", "bench.nbd", server, image, *load.split())
        for server in ("blk", "qemu-nbd")
    )
    return Case(f"nbd {name}", images.full, ours, peer, most)


def _scattered(folder: Path, size: int) -> None:
    images.scattered(folder)


def _small(folder: Path, size: int) -> None:
    images.small(folder)


_LIBRARY = (sys.executable, "-m", "bench.library")
_EVERY_INFO = "for image in small/*; do qemu-img info $image; done"
_IMPORTS = "import asyncio, msgspec, argparse"

CASES = (
    _img("convert full raw → qcow2", images.full, "convert -O qcow2 full.raw out"),
    _img("convert full qcow2 → raw", images.full, "convert -O raw full.qcow2 out"),
    _img("convert full qcow2 → qcow2", images.full, "convert -O qcow2 full.qcow2 out"),
    _img("convert sparse raw → qcow2", images.sparse, "convert -O qcow2 sparse.raw out"),
    _img("convert sparse qcow2 → raw", images.sparse, "convert -O raw sparse.qcow2 out"),
    _img("convert sparse qcow2 → qcow2", images.sparse, "convert -O qcow2 sparse.qcow2 out"),
    _img("convert -c deflate", images.compressible, "convert -c -O qcow2 files.raw out", 1 / 8),
    _img("convert -c zstd", images.compressible,
         "convert -c -O qcow2 -o compression_type=zstd files.raw out", 0.5),
    _img("convert deflate → raw", images.compressed, "convert -O raw deflate.qcow2 out", 0.5),
    _img("convert zstd → raw", images.compressed, "convert -O raw zstd.qcow2 out", 0.5),
    _piped("convert full qcow2 → qcow2 | cat", images.full, "convert -O qcow2 full.qcow2"),
    _img("compare 1 TiB, 100k clusters", _scattered,
         "compare scattered.qcow2 scattered-copy.qcow2", 2.0),
    _img("check 1 TiB, 100k clusters", _scattered, "check scattered.qcow2", 2.0),
    _img("map 1 TiB, 100k clusters", _scattered, "map --output=json scattered.qcow2", 2.0),
    Case("read through 30 layers / 1", images.chain,
         (*_LIBRARY, "read", f"layer{images.CHAIN_DEPTH}.qcow2"),
         (*_LIBRARY, "read", "layer1.qcow2"), 1.1),
    Case("info / importing asyncio …", _small,
         (BLK, "img", "info", "small/0.qcow2"), (sys.executable, "-c", _IMPORTS), 1.5, runs=15),
    Case("open 1,000 / 1,000 × info", _small,
         (*_LIBRARY, "open", "small"), ("sh", "-c", _EVERY_INFO), 0.1, runs=1),
    Case("clone 10,000 / copying one file", _small,
         (*_LIBRARY, "clone", "small"), (*_LIBRARY, "copy", "small"), 1.0, runs=1),
    _served("4 KiB random read, depth 1", "full.qcow2", "randread 4k 1 20000", 1 / 1.3),
    _served("4 KiB random read, depth 16", "full.qcow2", "randread 4k 16 60000", 1 / 3),
    _served("4 KiB random write, depth 1", "full.qcow2", "randwrite 4k 1 20000", 1 / 1.3),
    _served("4 KiB random write, depth 16", "full.qcow2", "randwrite 4k 16 60000", 1 / 3),
    _served("64 KiB random read, depth 16", "full.qcow2", "randread 64k 16 10000", 1 / 2),
    _served("1 MiB read", "full.qcow2", "read 1M 4 1500", 1 / 2),
    _served("1 MiB write", "full.qcow2", "write 1M 4 1500", 1 / 2),
)  # fmt: skip
