"""Compression type zstd: what one tool packs the other unpacks; hostile frames stay harmless."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import zstandard

from blocklayer.errors import CorruptionError
from cli.runs import ours
from oracles import Oracle
from qcow2.images import opened, run

CLUSTER = 65536
OFFSET_BITS = 62 - 8
"""Bits of a compressed entry that are the host offset, at 64 KiB clusters."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Raw: text, noise, zeros and an unaligned tail."""
    chance = random.Random(7)
    text = b"".join(b"line %d of many\n" % chance.randrange(1000) for _ in range(40_000))
    path = tmp_path / "disk.raw"
    path.write_bytes(text + chance.randbytes(300_000) + bytes(500_000) + text[:123_392])
    path.write_bytes(path.read_bytes()[: path.stat().st_size & ~511])
    return path


@pytest.mark.parametrize("cluster_size", ["4k", "64k", "2M"])
def test_both_directions(disk: Path, cluster_size: str, qemu_img: Oracle) -> None:
    folder = disk.parent
    options = f"-c -f raw -O qcow2 -o compression_type=zstd,cluster_size={cluster_size}"
    assert ours(f"convert {options} disk.raw ours.qcow2", folder).code == 0
    qemu_img("convert", *options.split(), "disk.raw", "theirs.qcow2", cwd=folder)
    found = [
        qemu_img.json("check", "--output=json", name, cwd=folder)
        for name in ("ours.qcow2", "theirs.qcow2")
    ]
    assert found[0]["compressed-clusters"] == found[1]["compressed-clusters"] > 0
    assert found[0]["allocated-clusters"] == found[1]["allocated-clusters"]
    qemu_img("compare", "-f", "raw", "-F", "qcow2", "disk.raw", "ours.qcow2", cwd=folder)
    assert ours("convert -O raw theirs.qcow2 back.raw", folder).code == 0
    assert (folder / "back.raw").read_bytes() == disk.read_bytes()


def test_noise_is_stored_plain(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    (tmp_path / "noise.raw").write_bytes(random.Random(1).randbytes(4 * CLUSTER))
    line = "convert -c -f raw -O qcow2 -o compression_type=zstd noise.raw noise.qcow2"
    assert ours(line, tmp_path).code == 0
    found = qemu_img.json("check", "--output=json", "noise.qcow2", cwd=tmp_path)
    assert found["allocated-clusters"] == 4
    assert found.get("compressed-clusters", 0) == 0
    qemu_img("compare", "noise.raw", "noise.qcow2", cwd=tmp_path)


def test_single_clusters_through_io(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    image = str(tmp_path / "a.qcow2")
    assert ours(f"create -q -f qcow2 -o compression_type=zstd {image} 1M", tmp_path).code == 0
    assert ours(["-c", "write -c -P 7 64k 64k", image], tmp_path, "qemu-io").code == 0
    qemu_io("-c", "write -c -P 9 128k 64k", image)
    for pattern, offset in ((7, "64k"), (9, "128k"), (0, "192k")):
        command = f"read -P {pattern} {offset} 64k"
        assert "failed" not in qemu_io("-c", command, image).stdout
        assert "failed" not in ours(["-c", command, image], tmp_path, "qemu-io").out
    qemu_img("check", image)


class Patched:
    """An image with one compressed cluster, whose bytes can be replaced."""

    def __init__(self, folder: Path, qemu_img: Oracle) -> None:
        self.path = folder / "one.qcow2"
        chance = random.Random(3)
        (folder / "one.raw").write_bytes(chance.randbytes(CLUSTER * 3 // 4) + bytes(CLUSTER // 4))
        options = ["-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"]
        qemu_img("convert", *options, "one.raw", self.path.name, cwd=folder)
        image = self.path.read_bytes()
        (l1,) = struct.unpack_from(">Q", image, 40)
        (l2,) = struct.unpack_from(">Q", image, l1)
        (entry,) = struct.unpack_from(">Q", image, l2 & ((1 << 56) - 512))
        assert entry >> 62 & 1
        self.place = entry & ((1 << OFFSET_BITS) - 1)
        sectors = (entry & (1 << 62) - 1) >> OFFSET_BITS
        self.room = (sectors + 1) * 512 - self.place % 512

    def hold(self, packed: bytes, padding: bytes = b"\xa5") -> None:
        """Let the cluster be ``packed``, and something else after it."""
        assert len(packed) <= self.room
        with self.path.open("r+b") as file:
            file.seek(self.place)
            file.write(packed + padding * (self.room - len(packed)))

    def read(self) -> bytes:
        async def whole() -> bytes:
            async with opened(self.path, read_only=True) as root:
                return await root.read(0, CLUSTER)

        return run(whole())


@pytest.fixture
def patched(tmp_path: Path, qemu_img: Oracle) -> Patched:
    return Patched(tmp_path, qemu_img)


def frame(data: bytes, *, tell: bool = True, window: int = 17) -> bytes:
    settings = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=tell)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj(
        *([len(data)] if tell else [])
    )
    return packer.compress(data) + packer.flush()


SKIPPED = struct.pack("<II", 0x184D2A50, 100) + bytes(100)
HALF = CLUSTER // 2
WHOLE = b"\x07" * HALF + b"\x09" * HALF


@pytest.mark.parametrize(
    "packed",
    [
        frame(WHOLE),
        frame(WHOLE, tell=False),
        frame(WHOLE[:HALF]) + frame(WHOLE[HALF:]),
        frame(WHOLE[:HALF], tell=False) + frame(WHOLE[HALF:], tell=False),
        frame(WHOLE[:1]) + frame(b"") + frame(WHOLE[1:]),
        SKIPPED + frame(WHOLE),
    ],
)
def test_frames_as_others_write_them(patched: Patched, packed: bytes, qemu_io: Oracle) -> None:
    patched.hold(packed)
    assert patched.read() == WHOLE
    said = qemu_io("-c", "read -P 7 0 32k", "-c", "read -P 9 32k 32k", patched.path).stdout
    assert "failed" not in said


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x28\xb5\x2f\xfd",
        frame(WHOLE)[:-3],
        frame(WHOLE[:HALF]),
        frame(bytes(256 << 20)),
        frame(WHOLE, tell=False, window=27),
        # A header that promises a size of 2^60 bytes.
        b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60),
        SKIPPED,
        struct.pack("<II", 0x184D2A50, 0xFFFFFFFF),
    ],
)
def test_hostile_frames(patched: Patched, packed: bytes) -> None:
    patched.hold(packed)
    with pytest.raises(CorruptionError, match="guest offset 0x0 at host offset"):
        patched.read()


def test_a_frame_without_end_gives_one_cluster(patched: Patched) -> None:
    patched.hold(frame(b"\x07" * (256 << 20), tell=False))
    assert patched.read() == b"\x07" * CLUSTER
