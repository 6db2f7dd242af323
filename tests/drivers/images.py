"""What the tests of formats other than qcow2 share: kinds of images, and a model of a disk.

A `Kind` is one way of making an image; tests run over all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

import blocklayer
from oracles import Oracle, require

MIB = 1 << 20


class Kind(msgspec.Struct, frozen=True):
    """A format with create options; `size` is what is asked for."""

    format: str
    options: dict[str, str] = {}
    size: int = 10 * MIB
    resizes_to: int | None = None
    """The disk's size where the format rounds."""

    def __str__(self) -> str:
        return "-".join([self.format, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def is_stream(self) -> bool:
        """qemu-io cannot write such an image piece by piece."""
        return self.options.get("subformat") == "streamOptimized"

    @property
    def disk_size(self) -> int:
        """The size of the disk that creation gives."""
        return self.resizes_to or self.size

    def create(self, path: Path) -> None:
        """Make the image with blocklayer."""
        blocklayer.create(path, self.size, format=self.format, **self.options)

    def create_with(self, qemu_img: Oracle, path: Path) -> None:
        """Make the image with qemu-img."""
        extra = [f"-o{key}={value}" for key, value in self.options.items()]
        qemu_img("create", "-q", "-f", self.format, *extra, path, str(self.size))


KINDS = [
    Kind("vdi"),
    Kind("vdi", {"static": "on"}),
    Kind("vdi", size=3 * MIB + 1536),
    Kind("vpc", resizes_to=10514432),
    Kind("vpc", {"force_size": "on"}),
    Kind("vpc", {"subformat": "fixed", "force_size": "on"}),
    Kind("vhdx"),
    Kind("vhdx", {"block_size": "1M"}),
    Kind("vhdx", {"block_size": "2M", "block_state_zero": "off"}),
    Kind("vhdx", {"subformat": "fixed", "block_size": "1M"}),
    Kind("vmdk"),
    Kind("vmdk", {"zeroed_grain": "on"}, size=3 * MIB + 1536),
    Kind("vmdk", {"subformat": "monolithicFlat"}),
    Kind("vmdk", {"subformat": "twoGbMaxExtentSparse"}),
    Kind("vmdk", {"subformat": "twoGbMaxExtentFlat"}),
    Kind("vmdk", {"subformat": "streamOptimized"}),
    Kind("qed"),
    Kind("qed", {"cluster_size": "4096", "table_size": "2"}, size=3 * MIB + 1536),
    Kind("qcow"),
    Kind("qcow", size=3 * MIB + 1536),
    Kind("parallels"),
    Kind("parallels", {"cluster_size": "64k"}, size=3 * MIB + 1536),
    Kind("parallels", {"cluster_size": "129024"}),
]


def operations(seed: int, size: int, count: int = 24) -> Iterator[tuple[str, int, int, int]]:
    """A repeatable list of (what, offset, length, byte), in whole sectors, some across blocks."""
    chance = random.Random(seed)
    for _ in range(count):
        what = chance.choice(["write", "write", "write", "zero"])
        length = chance.choice([512, 4096, 65536, 200 * 1024, 3 * MIB + 512])
        offset = chance.randrange(0, size, 512)
        yield what, offset, min(length, size - offset), chance.randrange(1, 256)


def apply(model: bytearray, what: str, offset: int, length: int, byte: int) -> None:
    """What an operation does to the model of the disk."""
    model[offset : offset + length] = bytes([byte if what == "write" else 0]) * length


def write_ours(path: Path, kind: Kind, seed: int, *, flushes: bool = True) -> bytearray:
    """Run the operations through blocklayer; the answer is the model."""
    with blocklayer.open(path, format=kind.format, writable=True) as disk:
        model = bytearray(disk.size)
        for number, (what, offset, length, byte) in enumerate(operations(seed, disk.size)):
            if what == "write":
                disk.write(offset, bytes([byte]) * length)
            else:
                disk.write_zeroes(offset, length, unmap=bool(number % 2))
            apply(model, what, offset, length, byte)
            if flushes and number % 7 == 6:
                disk.flush()
    return model


def write_theirs(qemu_io: Oracle, path: Path, kind: Kind, seed: int) -> bytearray:
    """Run the operations through qemu-io; the answer is the model."""
    model = bytearray(kind.disk_size)
    commands: list[str] = []
    for what, offset, length, byte in operations(seed, kind.disk_size):
        how = f"write -q -P {byte}" if what == "write" else "write -q -z"
        commands += ["-c", f"{how} {offset} {length}"]
        apply(model, what, offset, length, byte)
    if kind.is_stream:
        raw = path.with_suffix(".raw")
        raw.write_bytes(model)
        extra = [f"-o{key}={value}" for key, value in kind.options.items()]
        require("qemu-img")("convert", "-f", "raw", "-O", kind.format, *extra, raw, path)
    else:
        qemu_io("-f", kind.format, *commands, path)
    return model


def read_all(path: Path, format: str) -> bytes:
    """The whole disk, read in odd pieces."""
    with blocklayer.open(path, format=format) as disk:
        step = 3 * MIB // 2 + 77
        return b"".join(
            disk.read(at, min(step, disk.size - at)) for at in range(0, disk.size, step)
        )
