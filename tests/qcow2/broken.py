"""Broken qcow2 images for the tests of check: making them, breaking them, checking them twice.

1. Images are made by QEMU's tools and then broken in place.
2. `compare_reports` holds our check against theirs: corruptions, leaks, statistics, exit class, and
   on request every line.
"""

from __future__ import annotations

import asyncio
import functools
import struct
from pathlib import Path
from typing import Any

import msgspec

from blocklayer.api.check import check_image
from blocklayer.codec.qcow2.entries import COPIED, OFFSET_MASK
from blocklayer.codec.qcow2.header import ImageHeader, decode_header
from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from oracles import Oracle

CLUSTER = 65536

STATISTICS = {
    "image-end-offset": "image_end_offset",
    "total-clusters": "total_clusters",
    "allocated-clusters": "allocated_clusters",
    "fragmented-clusters": "fragmented_clusters",
    "compressed-clusters": "compressed_clusters",
}


def check(path: Path, repair: str | None = None) -> tuple[Any, list[str], tuple[int, int]]:
    """As `blk img check` does it: the result, all messages, and (leaks, corruptions) fixed."""
    messages: list[str] = []
    fixed: list[tuple[int, int]] = []

    async def run() -> Any:
        graph = Graph(REGISTRY)
        flags = Flags(read_only=repair is None, repair=True)
        node = await open_image(graph, str(path), format="qcow2", flags=flags)
        root = Root(
            node, "a test", Permission.CONSISTENT_READ | (Permission.WRITE if repair else 0)
        )
        try:
            return await check_image(
                node,
                repair=repair,
                report=messages.extend,
                repaired=lambda leaks, corruptions: fixed.append((leaks, corruptions)),
            )
        finally:
            await root.close()

    return asyncio.run(run()), messages, fixed[0] if fixed else (0, 0)


def exit_class(found: Any) -> int:
    if found.check_errors:
        return 1
    return 2 if found.corruptions else 3 if found.leaks else 0


class Broken:
    """An image in memory, with its words at hand."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.header: ImageHeader = decode_header(content)
        self.refcount_block = self.word(self.header.refcount_table_offset)

    def word(self, offset: int) -> int:
        return int(struct.unpack_from(">Q", self.content, offset)[0])

    def put(self, offset: int, value: int, width: int = 8) -> None:
        self.content[offset : offset + width] = value.to_bytes(width, "big")

    @property
    def l1(self) -> int:
        return self.header.l1_table_offset

    @property
    def refcount_table(self) -> int:
        return self.header.refcount_table_offset

    def l2(self, l1_index: int = 0) -> int:
        return self.word(self.l1 + 8 * l1_index) & OFFSET_MASK

    def flip(self, offset: int, bits: int) -> None:
        self.put(offset, self.word(offset) ^ bits)

    def refcount(self, cluster: int, value: int) -> None:
        self.put(self.refcount_block + 2 * cluster, value, 2)


COMMANDS = (
    "write -P 1 0 256k", "write -P 2 2560k 128k", "write -z -u 1M 64k", "write -P 3 2M 64k",
    "write -z 2M 64k", "write -c -P 5 3M 64k", "write -c -P 6 3136k 64k",
)  # fmt: skip


@functools.cache
def sample(
    qemu_img: Oracle,
    qemu_io: Oracle,
    folder: Path,
    cluster_size: int,
    refcount_bits: int,
    snapshot: bool,
) -> bytes:
    """A small image with a bit of everything."""
    path = folder / "sample.qcow2"
    options = f"cluster_size={cluster_size},refcount_bits={refcount_bits}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "4M")
    arguments = [part for command in COMMANDS for part in ("-c", command)]
    qemu_io("-f", "qcow2", *arguments, path)
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_io("-f", "qcow2", "-c", "write -P 9 64k 128k", path)
    return path.read_bytes()


def compare_reports(path: Path, qemu_img: Oracle, *, text: bool = False) -> Any:
    """Check `path` with both; the same must be found. None if neither opens it."""
    theirs = qemu_img("check", "-f", "qcow2", "--output=json", path, check=False)
    try:
        found, messages, _ = check(path)
    except BlockError:
        assert theirs.returncode == 1
        return None
    assert theirs.stdout, theirs.stderr
    report = msgspec.json.decode(theirs.stdout)
    assert exit_class(found) == theirs.returncode, (messages, theirs.stderr)
    assert found.corruptions == report.get("corruptions", 0), (messages, theirs.stderr)
    assert found.leaks == report.get("leaks", 0), (messages, theirs.stderr)
    for name, field in STATISTICS.items():
        assert getattr(found, field) == report.get(name, 0), name
    if text:
        # What else they print is not about the image, or comes from below check.
        said = [
            line for line in theirs.stderr.splitlines() if not line.startswith(("qemu", "qcow2:"))
        ]
        assert "\n".join(messages).splitlines() == said
    return found


FAULTS = {
    "none": lambda image: None,
    "leak": lambda image: image.refcount(8, 3),
    "lost refcount": lambda image: image.refcount(5, 0),
    "lost refcount of the header": lambda image: image.refcount(0, 0),
    "data shared": lambda image: image.put(image.l2() + 8 * 30, image.word(image.l2())),
    "copied bit lost": lambda image: image.flip(image.l2(), COPIED),
    "copied bit of a table lost": lambda image: image.flip(image.l1, COPIED),
    "reserved bits in L2": lambda image: image.flip(image.l2(), 1 << 57),
    "reserved bits in an empty L2 entry": lambda image: image.put(image.l2() + 8 * 60, 4),
    "reserved bits in L1": lambda image: image.flip(image.l1, 1 << 57),
    "unaligned cluster": lambda image: image.flip(image.l2(), 0x200),
    "unaligned zero cluster": lambda image: image.flip(image.l2(), 0x201),
    "cluster past the end": lambda image: image.put(image.l2(), COPIED | 1 << 30),
    "table past the end": lambda image: image.put(image.l1, COPIED | 1 << 30),
    "compressed and copied": lambda image: image.flip(image.l2() + 8 * 48, COPIED),
    "data in the L1 table": lambda image: image.put(image.l2() + 8 * 30, COPIED | image.l1),
    "data in the refcount table": lambda image: image.put(image.l2() + 8 * 30, COPIED | CLUSTER),
    "refcount block outside": lambda image: image.put(image.refcount_table + 8, 1 << 30),
    "refcount block far outside": lambda image: image.put(image.refcount_table + 8, 1 << 63),
    "first refcount block outside": lambda image: image.put(image.refcount_table, 1 << 30),
    "first refcount block far outside": lambda image: image.put(image.refcount_table, 1 << 63),
    "refcount block missing": lambda image: image.put(image.refcount_table, 0),
    "refcount block twice": lambda image: image.put(image.refcount_table + 8, image.refcount_block),
    "refcount block in data": lambda image: image.put(image.refcount_table + 8, 5 * CLUSTER),
    "reserved bits in the refcount table": lambda image: image.flip(image.refcount_table, 1),
    "L1 table past the end": lambda image: image.put(40, 1 << 30),
    "refcount table past the end": lambda image: image.put(48, 1 << 30),
    "refcount table in data": lambda image: image.put(48, 5 * CLUSTER),
    "dirty": lambda image: image.put(72, 1),
    "corrupt": lambda image: image.put(72, 2),
}
