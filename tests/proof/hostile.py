"""Ways to tamper with a qcow2 image: each yields a name for the case and the image's new bytes.

Structures are found by the header's own offsets, so that every table is hit where it is.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator

Case = tuple[str, bytes]

FIELDS = {
    "magic": (0, 4), "version": (4, 4), "backing_offset": (8, 8), "backing_size": (16, 4),
    "cluster_bits": (20, 4), "size": (24, 8), "crypt_method": (32, 4), "l1_size": (36, 4),
    "l1_offset": (40, 8), "refcount_table_offset": (48, 8), "refcount_table_clusters": (56, 4),
    "snapshot_count": (60, 4), "snapshots_offset": (64, 8), "incompatible": (72, 8),
    "compatible": (80, 8), "autoclear": (88, 8), "refcount_order": (96, 4),
    "header_length": (100, 4), "compression_type": (104, 1),
}  # fmt: skip

COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSETS = 0x00FF_FFFF_FFFF_FE00


class Layout:
    """Where the structures of an image are, by its own header."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.end = len(image)
        self.cluster_size = 1 << self.header("cluster_bits")
        self.l1 = self.header("l1_offset")
        self.refcount_table = self.header("refcount_table_offset")
        self.snapshots = self.header("snapshots_offset")
        self.l1_size = self.header("l1_size")
        self.refcount_block = self.entry(self.refcount_table) & OFFSETS
        tables = [self.entry(self.l1 + 8 * n) & OFFSETS for n in range(self.l1_size)]
        self.l2 = next((table for table in tables if table), 0)

    def header(self, name: str) -> int:
        """A field of the header."""
        offset, width = FIELDS[name]
        return int.from_bytes(self.image[offset : offset + width], "big")

    def entry(self, offset: int) -> int:
        """An entry of a table."""
        return int.from_bytes(self.image[offset : offset + 8].ljust(8, b"\0"), "big")

    def patched(self, *patches: tuple[int, bytes]) -> bytes:
        """The image with bytes replaced; it grows only as far as a patch reaches."""
        image = bytearray(self.image)
        for offset, data in patches:
            image[offset : offset + len(data)] = data
        return bytes(image)

    def offsets(self) -> list[int]:
        """Host offsets that an entry should not have, and some that it might."""
        cluster = self.cluster_size
        end = -(-self.end // cluster) * cluster
        own = {self.l1, self.l2, self.refcount_table, self.refcount_block, self.snapshots}
        wild = {0, cluster, cluster + 512, end, end - cluster, 2 * end, 1 << 40}
        high = {(1 << 56) - cluster, 1 << 56, 1 << 62, (1 << 63) - cluster, (1 << 64) - cluster}
        return sorted(own | wild | high)


def _big(value: int, width: int) -> bytes:
    return (value % (1 << (8 * width))).to_bytes(width, "big")


def header_fields(image: bytes) -> Iterator[Case]:
    """Each field of the header with each value that might hurt."""
    layout = Layout(image)
    narrow = (0, 1, 2, 3, 6, 7, 8, 9, 21, 22, 63, 64, 104, 1023, 1024, 65536, 1 << 22)
    narrow += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1)
    wide = (*layout.offsets(), 1, 511, 4096, (1 << 63) - 1, (1 << 64) - 1, 1 << 44, 1 << 53)
    for name, (offset, width) in FIELDS.items():
        for value in range(4) if width == 1 else narrow if width == 4 else wide:
            yield f"{name}={value:#x}", layout.patched((offset, _big(value, width)))


def feature_bits(image: bytes) -> Iterator[Case]:
    """Each feature bit by itself."""
    layout = Layout(image)
    for name in ("incompatible", "compatible", "autoclear"):
        for bit in (*range(6), 31, 63):
            yield f"{name} bit {bit}", layout.patched((FIELDS[name][0], _big(1 << bit, 8)))


def extensions(image: bytes) -> Iterator[Case]:
    """Header extensions that lie about themselves."""
    layout = Layout(image)
    start = layout.header("header_length") if layout.header("version") > 2 else 72
    room = layout.cluster_size - start
    known = (0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345678)
    for kind in known:
        for length in (0, 1, 7, 8, 16, 24, 48, room - 8, room - 7, room, 1 << 31, (1 << 32) - 1):
            body = struct.pack(">II", kind, length) + b"\xff" * min(length, room - 8)
            yield f"extension {kind:#x} of {length:#x} bytes", layout.patched((start, body[:room]))
        twice = struct.pack(">II", kind, 8) + b"raw\0\0\0\0\0"
        yield f"extension {kind:#x} many times", layout.patched((start, (twice * 999)[:room]))
        empty = struct.pack(">II", kind, 0)
        yield f"extension {kind:#x} without end", layout.patched((start, (empty * 9999)[:room]))


def table_entries(image: bytes) -> Iterator[Case]:
    """Entries of the L1, L2 and refcount tables that point where they must not."""
    layout = Layout(image)
    flags = {"l1": (0, COPIED, 1), "l2": (0, COPIED, 1, COPIED | 1), "refcount_table": (0, 1)}
    for table, kinds in flags.items():
        place = getattr(layout, table)
        if not place:
            continue
        for value in layout.offsets():
            for flag in kinds:
                for index in (0, 1):
                    patch = (place + 8 * index, _big(value | flag, 8))
                    yield f"{table}[{index}]={value | flag:#x}", layout.patched(patch)


def refcounts(image: bytes) -> Iterator[Case]:
    """Reference counts that are too low, too high, or none at all."""
    layout = Layout(image)
    block = layout.refcount_block
    for name, fill in (("zero", b"\0"), ("one", b"\x01"), ("many", b"\xff"), ("some", b"\x80")):
        for length in (2, 16, layout.cluster_size):
            data = (fill * layout.cluster_size)[:length]
            yield f"refcounts {name} for {length} bytes", layout.patched((block, data))


def compressed(image: bytes) -> Iterator[Case]:
    """Compressed clusters that begin, end or unpack where they must not."""
    layout = Layout(image)
    if not layout.l2:
        return
    bits = 62 - (layout.header("cluster_bits") - 8)
    places = {0, 1, layout.l2, layout.end - 1, layout.end, layout.end - 600, (1 << bits) - 1}
    places |= {layout.cluster_size, layout.l1 + 3, 1 << (bits - 1)}
    for place in sorted(places):
        for sectors in (0, 1, (1 << (62 - bits)) - 1):
            entry = COMPRESSED | sectors << bits | place
            for flag in (0, COPIED):
                patch = (layout.l2, _big(entry | flag, 8))
                yield f"compressed {entry | flag:#x}", layout.patched(patch)
    first = layout.end // 512 * 512 - layout.cluster_size
    if first > 0:
        entry = COMPRESSED | 1 << bits | first
        for name, data in (
            ("stored block", b"\x01\xff\xff\x00\x00"),
            ("zeros", bytes(64)),
            ("ones", b"\xff" * 64),
            ("a long run", b"\xed\xc1\x01\x01\x00\x00\x00\x80\x90\xfe\xaf\xee\x08\x0a"),
        ):
            patches = ((layout.l2, _big(entry, 8)), (first, data))
            yield f"compressed: {name}", layout.patched(*patches)


def snapshots(image: bytes) -> Iterator[Case]:
    """The snapshot table, word by word."""
    layout = Layout(image)
    if not layout.snapshots:
        return
    for at in range(0, 64, 4):
        for value in (0, 1, 0xFFFF, 1 << 31, (1 << 32) - 1, layout.cluster_size):
            patch = (layout.snapshots + at, _big(value, 4))
            yield f"snapshot table +{at}={value:#x}", layout.patched(patch)
    for value in layout.offsets():
        patch = (layout.snapshots, _big(value, 8))
        yield f"snapshot L1 at {value:#x}", layout.patched(patch)


def truncated(image: bytes) -> Iterator[Case]:
    """The file ends early."""
    layout = Layout(image)
    cuts = {0, 1, 4, 71, 72, 103, 104, 110, 112, layout.cluster_size - 1, layout.cluster_size}
    for place in (layout.l1, layout.l2, layout.refcount_table, layout.refcount_block):
        cuts |= {place, place + 8, place + layout.cluster_size}
    for length in sorted(cuts):
        yield f"cut to {length} bytes", image[:length]


def noise(image: bytes, seed: int, count: int) -> Iterator[Case]:
    """Random bytes in the metadata."""
    layout = Layout(image)
    rng = random.Random(seed)
    places = [0, layout.l1, layout.l2, layout.refcount_table, layout.refcount_block]
    places += [layout.snapshots] if layout.snapshots else []
    for number in range(count):
        patches = []
        for _ in range(rng.randint(1, 6)):
            start = rng.choice(places)
            reach = rng.choice((8, 64, 128, layout.cluster_size))
            patches.append((start + rng.randrange(reach), rng.randbytes(rng.choice((1, 1, 2, 8)))))
        yield f"noise {seed}/{number}", layout.patched(*patches)


def all_cases(image: bytes) -> Iterable[Case]:
    """Everything but noise."""
    for source in (
        header_fields, feature_bits, extensions, table_entries, refcounts, compressed, snapshots,
        truncated,
    ):  # fmt: skip
        yield from source(image)
