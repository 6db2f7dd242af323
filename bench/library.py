"""What is measured through the library, as commands: ``python -m bench.library read IMAGE``.

Each prints the seconds that count: those of the work, without starting the interpreter.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import blocklayer

_STEP = 1 << 20


def read(image: str) -> None:
    """Read a whole disk from its start to its end."""
    buffer = memoryview(bytearray(_STEP))
    with blocklayer.open(image) as disk:
        started_s = time.perf_counter()
        for offset in range(0, disk.size, _STEP):
            length = min(_STEP, disk.size - offset)
            disk.read_into(offset, buffer[:length])
        print(time.perf_counter() - started_s)


def open_all(folder: str) -> None:
    """Open every image in a folder, look at its size, and close it."""
    started_s = time.perf_counter()
    for path in Path(folder).iterdir():
        with blocklayer.open(path) as disk:
            assert disk.size
    print(time.perf_counter() - started_s)


def clone(folder: str) -> None:
    """Make 10,000 overlays of one image."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        names = [f"{place}/{number}.qcow2" for number in range(10_000)]
        started_s = time.perf_counter()
        blocklayer.clone(f"{folder}/0.qcow2", *names)
        print(time.perf_counter() - started_s)


def copy(folder: str) -> None:
    """Make 10,000 sparse copies of one overlay, which is what it takes without cloning."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        blocklayer.clone(f"{folder}/0.qcow2", f"{place}/first.qcow2")
        started_s = time.perf_counter()
        for number in range(10_000):
            shutil.copyfile(f"{place}/first.qcow2", f"{place}/{number}.qcow2")
        print(time.perf_counter() - started_s)


if __name__ == "__main__":
    {"read": read, "open": open_all, "clone": clone, "copy": copy}[sys.argv[1]](sys.argv[2])
