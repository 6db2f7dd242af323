"""What is measured through the library, as commands: ``python -m bench.library read IMAGE``."""

from __future__ import annotations

import sys
from pathlib import Path

import blocklayer

_STEP = 1 << 20


def read(image: str) -> None:
    """Read a whole disk from its start to its end."""
    buffer = memoryview(bytearray(_STEP))
    with blocklayer.open(image) as disk:
        for offset in range(0, disk.size, _STEP):
            length = min(_STEP, disk.size - offset)
            disk.read_into(offset, buffer[:length])


def open_all(folder: str) -> None:
    """Open every image in a folder, look at its size, and close it."""
    for path in Path(folder).iterdir():
        with blocklayer.open(path) as disk:
            assert disk.size


if __name__ == "__main__":
    {"read": read, "open": open_all}[sys.argv[1]](sys.argv[2])
