"""`blk img` commands that change images: the result is what the real tool makes of the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.runs import ours, theirs
from oracles import Oracle

CREATING = """
create new.raw 1M
create -f raw new.raw 513
create -f raw -o preallocation=full new.raw 1M
create -f raw -o preallocation=full,preallocation=off new.raw 1M
create -o size=64k new.raw
create -q new.raw 1.5k
create new.raw 0x1000
create -f qcow2 new.qcow2 1M
create -f qcow2 new.qcow2 0
create -f qcow2 new.qcow2 1
create -f qcow2 new.qcow2 2T
create new.qcow2 1M -f qcow2
create --format=qcow2 new.qcow2 1M
create -qf qcow2 new.qcow2 1M
create -f qcow2 -o compat=0.10 new.qcow2 1M
create -f qcow2 -o compat=v3,lazy_refcounts=on new.qcow2 1M
create -f qcow2 -o cluster_size=64k -o compat=1.1 new.qcow2 1M
create -f qcow2 -o cluster_size=2M,refcount_bits=64 new.qcow2 1G
create -f qcow2 -o cluster_size=512,refcount_bits=1 new.qcow2 10M
create -f qcow2 -o preallocation=metadata new.qcow2 1M
create -f qcow2 -o preallocation=falloc new.qcow2 1M
create -f qcow2 -o preallocation=full,preallocation=off,cluster_size=4k new.qcow2 1M
create -f qcow2 -o size=2M new.qcow2
create -f qcow2 -o nocow=off new.qcow2 1M
create -f qcow2 -o extended_l2=on new.qcow2 1M
create -f qcow2 -o extended_l2=on,cluster_size=16k,refcount_bits=1 new.qcow2 10M
create -f qcow2 -o extended_l2=on,preallocation=falloc new.qcow2 1M
create -f qcow2 -o extended_l2=on,preallocation=metadata -b a.qcow2 -F qcow2 new.qcow2 3M
create -f qcow2 -b a.qcow2 -F qcow2 new.qcow2
create -f qcow2 -b a.qcow2 -F qcow2 new.qcow2 3M
create -f qcow2 -b a.qcow2 -F raw new.qcow2
create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 new.qcow2 3M
create -f qcow2 -b base.qcow2 -o backing_file=top.qcow2 -F qcow2 new.qcow2
create -f qcow2 -u -b no.qcow2 -F qcow2 new.qcow2 1M
create -f qcow2 -u -o backing_file=a,,b,backing_fmt=raw new.qcow2 1M
create -f qcow2 -F qcow2 -b mid.qcow2 sub/new.qcow2
create -f qcow2 mixed.qcow2 1M
create -f qcow2 'file:new,1.qcow2' 1M
"""

RESIZING = """
resize a.qcow2 2M
resize a.qcow2 +1M
resize a.qcow2 +0
resize a.qcow2 1M
resize a.qcow2 0x200000
resize --shrink a.qcow2 512k
resize --shrink a.qcow2 -512k
resize a.qcow2 --shrink -- -512k
resize -q a.qcow2 3M
resize -f qcow2 a.qcow2 3M
resize --image-opts driver=qcow2,file.filename=a.qcow2 3M
resize mixed.qcow2 5M
resize --shrink mixed.qcow2 1M
resize tiny.qcow2 8M
resize top.qcow2 4M
resize --shrink base.qcow2 300k
resize onraw.qcow2 3M
resize snaps.qcow2 2M
resize --preallocation=metadata a.qcow2 2M
resize --preallocation=falloc a.qcow2 2M
resize --preallocation=full a.qcow2 2M
resize -f raw a.raw 2M
resize a.raw 3M
resize -f raw --preallocation=full a.raw 2M
resize -f raw --shrink sparse.raw 100
"""

REPAIRING = """
check -r leaks leak.qcow2
check -r all leak.qcow2
check -q -r all leak.qcow2
check -r leaks --output=json leak.qcow2
check -r all sound.qcow2
check -r all --output=json sound.qcow2
check -r all dirty.qcow2
check -r all marked.qcow2
check -r leaks corrupt.qcow2
check -r all a.raw
"""

DISK_USE = ("actual-size", "children")


def lines(table: str) -> list[str]:
    return table.strip("\n").split("\n")


@pytest.fixture
def pair(pristine: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of the images: ours and theirs."""
    for name in ("ours", "theirs"):
        shutil.copytree(pristine, tmp_path / name, symlinks=True)
    return tmp_path / "ours", tmp_path / "theirs"


def changed(before: Path, after: Path) -> list[str]:
    """The names of the files that are new or have other contents."""
    return [
        str(path.relative_to(after))
        for path in sorted(after.rglob("*"))
        if path.is_file()
        and not (
            (before / path.relative_to(after)).exists()
            and path.read_bytes() == (before / path.relative_to(after)).read_bytes()
        )
    ]


def described(qemu_img: Oracle, folder: Path, name: str) -> dict[str, object]:
    """What the real tool says of an image, but for its use of disk space."""
    info = json.loads(theirs(qemu_img, ["info", "--output=json", name], folder).out)
    return {key: value for key, value in info.items() if key not in DISK_USE}


@pytest.mark.parametrize("line", lines(CREATING + RESIZING.lstrip("\n")))
def test_the_image_is_the_same(
    line: str, pair: tuple[Path, Path], pristine: Path, qemu_img: Oracle
) -> None:
    mine, other = pair
    wanted = theirs(qemu_img, line, other)
    assert wanted.code == 0
    assert ours(line, mine) == wanted
    names = changed(pristine, other)
    for name in sorted({*names, *changed(pristine, mine)}):
        assert described(qemu_img, mine, name) == described(qemu_img, other, name)
        if name.endswith(".qcow2"):
            checked = theirs(qemu_img, ["check", name], mine)
            assert checked.code == 0 or "Could not open backing file" in checked.err
    for name in names:
        if "-b" not in line and "backing" not in line:
            compared = theirs(qemu_img, ["compare", f"{mine}/{name}", f"{other}/{name}"], mine)
            assert compared.out == "Images are identical.\n"


@pytest.mark.parametrize("line", lines(REPAIRING))
def test_repair_leaves_a_sound_image(line: str, pair: tuple[Path, Path], qemu_img: Oracle) -> None:
    mine, other = pair
    wanted, found = theirs(qemu_img, line, other), ours(line, mine)
    name = line.rsplit(maxsplit=1)[-1]
    assert found.code == wanted.code
    assert (found.out, bool(found.err)) == (wanted.out, bool(wanted.err))
    assert theirs(qemu_img, ["check", name], mine).code in (wanted.code, 0)


def test_nothing_half_made_is_left(tmp_path: Path) -> None:
    assert ours("create -f qcow2 -o preallocation=falloc new.qcow2 4096T", tmp_path).code == 1
    assert list(tmp_path.iterdir()) == []
