"""What is measured through the library, as commands: ``python -m bench.library read IMAGE``.

Each prints the seconds that count: those of the work, without starting the interpreter.
"""

from __future__ import annotations

import sys
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


if __name__ == "__main__":
    {"read": read, "open": open_all}[sys.argv[1]](sys.argv[2])
