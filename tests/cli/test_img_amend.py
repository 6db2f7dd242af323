"""`blk img amend` beside the real qemu-img: the same words, and images that it finds sound."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cli.runs import ours, theirs
from oracles import Oracle

BAD = """

a.qcow2
-o help
-f raw -o help a.raw
-f vdi -o help
-o nope=1 a.qcow2
-o compat=nope a.qcow2
-o refcount_bits=3 a.qcow2
-o refcount_bits=128 a.qcow2
-o size=100 a.qcow2
-o cluster_size=4k a.qcow2
-o preallocation=full a.qcow2
-o compression_type=zlib a.qcow2
-o extended_l2=on a.qcow2
-o backing_file=x a.qcow2
-o backing_fmt=raw top.qcow2
-o lazy_refcounts=maybe a.qcow2
-o '' a.qcow2
-t nope -o compat=1.1 a.qcow2
-o compat=1.1 a.qcow2 b
-o compat=1.1 nosuch
-f raw -o size=1M a.raw
-o size=2M a.raw
-o lazy_refcounts=on v2.qcow2
-o compat=0.10 extended.qcow2
-o extended_l2=off extended.qcow2
-o refcount_bits=8 v2.qcow2
-o compat=0.10,lazy_refcounts=on a.qcow2
-o compat=0.10,refcount_bits=8 a.qcow2
-o compat=0.10 tiny.qcow2
-o refcount_bits=1 snaps.qcow2
"""

CHANGES = [
    "compat=0.10",
    "compat=v3",
    "lazy_refcounts=on",
    "lazy_refcounts=off",
    "refcount_bits=1",
    "refcount_bits=64",
    "size=5M",
    "size=512k",
    "compat=1.1,lazy_refcounts=on,refcount_bits=32,size=3M",
    "compat=0.10,refcount_bits=16,size=700k",
]


@pytest.mark.parametrize("line", BAD.strip("\n").splitlines())
def test_same_refusals(line: str, images: Path, qemu_img: Oracle) -> None:
    before = {path: path.read_bytes() for path in images.glob("*.qcow2")}
    assert ours(f"amend {line}", images) == theirs(qemu_img, f"amend {line}", images)
    assert {path: path.read_bytes() for path in images.glob("*.qcow2")} == before


def comparable(image: str, change: str) -> bool:
    """Ours refuses to downgrade snapshots; the real tool takes minutes to widen a large image."""
    return not (
        ("compat=0.10" in change and image == "snaps")
        or ("refcount_bits" in change and image == "lazy")
    )


@pytest.mark.parametrize(
    ("image", "change"),
    [
        (image, change)
        for image in ("mixed", "v2", "lazy", "tiny", "top", "snaps", "meta")
        for change in CHANGES
        if comparable(image, change)
    ],
)
def test_same_changes(change: str, image: str, images: Path, qemu_img: Oracle) -> None:
    name, copy = f"{image}.qcow2", f"copy.{image}.qcow2"
    (images / copy).write_bytes((images / name).read_bytes())
    (images / "before.qcow2").write_bytes((images / name).read_bytes())
    mine = ours(f"amend -o {change} {name}", images)
    their = theirs(qemu_img, f"amend -o {change} {copy}", images)
    assert mine == their
    infos = []
    for one in (name, copy):
        qemu_img("check", one, cwd=images)
        info = qemu_img.json("info", "--output=json", one, cwd=images)
        infos.append((info["virtual-size"], info["format-specific"], info.get("backing-filename")))
    assert infos[0] == infos[1]
    qemu_img("compare", name, copy, cwd=images)


@pytest.mark.parametrize("size", ["512", "4k", "64k"])
def test_every_width_from_every_other(size: str, tmp_path: Path, qemu_img: Oracle) -> None:
    options = f"cluster_size={size},preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "20M", cwd=tmp_path)
    (tmp_path / "raw").write_bytes(bytes(range(256)) * 4096)
    qemu_img("convert", "-n", "-O", "qcow2", "raw", "a.qcow2", cwd=tmp_path, check=False)
    widths = [1, 2, 4, 8, 16, 32, 64]
    order = [width for pair in itertools.pairwise(widths + widths[::-2]) for width in pair]
    for width in (*order, 1, 64):
        assert ours(f"amend -o refcount_bits={width} a.qcow2", tmp_path).code == 0
        found = qemu_img.json("check", "--output=json", "a.qcow2", cwd=tmp_path)
        assert (found.get("leaks", 0), found.get("corruptions", 0)) == (0, 0)


def test_zeros_hide_a_backing_file_in_version_2_too(images: Path, qemu_img: Oracle) -> None:
    qemu_img("convert", "-O", "raw", "top.qcow2", "before.raw", cwd=images)
    assert ours("amend -o compat=0.10 mid.qcow2", images).code == 0
    qemu_img("check", "mid.qcow2", cwd=images)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", "before.raw", "top.qcow2", cwd=images)


def test_help_and_progress(images: Path, qemu_img: Oracle) -> None:
    mine, their = (
        ours("amend -o help a.qcow2", images),
        theirs(qemu_img, "amend -o help a.qcow2", images),
    )
    assert (mine.code, mine.err) == (0, "")
    assert set(mine.out.splitlines()) <= set(their.out.splitlines())
    shown = ours("amend -p -o refcount_bits=64 a.qcow2", images).out
    assert shown.startswith("    (0.00/100%)\r")
    assert shown.endswith("(100.00/100%)\r\n")


def test_version_2_cannot_have_zstd(tmp_path: Path, qemu_img: Oracle) -> None:
    # (The real tool does it, and leaves clusters that nobody can unpack.)
    options = "create -q -f qcow2 -o compression_type=zstd zstd.qcow2 1M"
    qemu_img(*options.split(), cwd=tmp_path)
    mine = ours("amend -o compat=0.10 zstd.qcow2", tmp_path)
    assert mine.code == 1
    assert "Cannot downgrade an image with incompatible features 0x8 set" in mine.err
