"""`blk img measure` beside the real qemu-img: same numbers, same words, same exit codes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cli.runs import ours, theirs
from oracles import Oracle

GOOD = """
--size 1G
--size 1001
--size 0
-O raw -o preallocation=full --size 1G
-O qcow2 --size 0
-O qcow2 --size 1
-O qcow2 --size 1G
-O qcow2 --size 1G --output json
-O qcow2 --size 1000000000001
-O qcow2 --size 64P -o cluster_size=2M
-O qcow2 --size 10T -o refcount_bits=64
-O qcow2 --size 10T -o refcount_bits=1
-O qcow2 --size 1G -o refcount_bits=64,cluster_size=512
-O qcow2 --size 1G -o compat=0.10
-O qcow2 --size 1G -o compat=0.10,lazy_refcounts=on
-O qcow2 --size 1G -o preallocation=metadata
-O qcow2 --size 1G -o preallocation=falloc
-O qcow2 --size 1G -o preallocation=full
-O qcow2 --size 1G -o extended_l2=on
-O qcow2 --size 1T -o extended_l2=on,cluster_size=16k
-O qcow2 --size 1G -o extended_l2=on,preallocation=full
-O qcow2 extended.qcow2
-O qcow2 -o extended_l2=on top.qcow2
-O qcow2 --size 1G -o backing_file=x,backing_fmt=raw
-O qcow2 --size 1G -o backing_fmt=raw
-O qcow2 --size 1G -o size=5G
-O raw top.qcow2
top.qcow2
-O qcow2 a.raw
-O qcow2 sparse.raw
-O qcow2 odd.raw
-O qcow2 empty.raw
odd.raw
-O qcow2 a.qcow2
-O qcow2 v2.qcow2
-O qcow2 tiny.qcow2
-O qcow2 meta.qcow2
-O qcow2 full.qcow2
-O qcow2 mixed.qcow2
-O qcow2 top.qcow2
-O qcow2 onraw.qcow2
-O qcow2 sub/top.qcow2
-O qcow2 top.qcow2 -o cluster_size=512
-O qcow2 top.qcow2 -o cluster_size=2M
-O qcow2 top.qcow2 -o compat=0.10
-O qcow2 top.qcow2 -o preallocation=metadata
-O qcow2 top.qcow2 -o preallocation=full
-O qcow2 top.qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2
-O qcow2 top.qcow2 --output=json
-O qcow2 a.raw --output=json
-f raw -O qcow2 top.qcow2
-f qcow2 -U -O qcow2 top.qcow2
--image-opts driver=qcow2,file.filename=top.qcow2 -O qcow2
"""

BAD = """

--size 1G a.raw
a.raw top.qcow2
--size 1x
--size -1
--size 9E
-f qcow2 --size 1G
--image-opts --size 1G
--image-opts -f qcow2 a.qcow2
--output=foo --size 1G
-O nope --size 1G
-O vdi --size 1G
-O vdi a.raw
-O vmdk --size 1G
-O file --size 1G
-O null-co --size 1G
-O qcow2 -o nope=1 --size 1G
-O vdi -o nope=1 --size 1G
-o cluster_size=1M a.raw
-O qcow2 -o '' --size 1G
-O qcow2 -o cluster_size=3k --size 1G
-O qcow2 -o cluster_size=1 --size 1G
-O qcow2 -o refcount_bits=3 --size 1G
-O qcow2 -o extended_l2=on,cluster_size=8k --size 1G
-O qcow2 -o extended_l2=on,compat=0.10 --size 1G
-O qcow2 -o refcount_bits=foo --size 1G
-O qcow2 -o lazy_refcounts=maybe --size 1G
-O qcow2 -o compat=0.10,refcount_bits=8 --size 1G
-O qcow2 --size 1E
-O qcow2 --size 64P
-f nope a.raw
-f vdi a.raw
-z
nosuch.raw
orphan.qcow2
"""


@pytest.mark.parametrize("line", GOOD.strip().splitlines())
def test_same_numbers(line: str, pristine: Path, qemu_img: Oracle) -> None:
    assert ours(f"measure {line}", pristine) == theirs(qemu_img, f"measure {line}", pristine)


@pytest.mark.parametrize("line", BAD.strip("\n").splitlines())
def test_same_errors(line: str, pristine: Path, qemu_img: Oracle) -> None:
    assert ours(f"measure {line}", pristine) == theirs(qemu_img, f"measure {line}", pristine)


def test_bitmaps_are_counted(images: Path, qemu_img: Oracle) -> None:
    qemu_img("bitmap", "--add", "a.qcow2", "one", cwd=images)
    qemu_img("bitmap", "--add", "-g", "512", "a.qcow2", "another name", cwd=images)
    for options in ("", "-o cluster_size=512", "-o compat=0.10", "--output=json"):
        line = f"measure -O qcow2 {options} a.qcow2"
        assert ours(line, images) == theirs(qemu_img, line, images)


@pytest.mark.parametrize("seed", range(3))
def test_any_data_is_counted_alike(
    seed: int, tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    chance = random.Random(seed)
    qemu_img("create", "-q", "-f", "qcow2", "s.qcow2", "64M", cwd=tmp_path)
    writes = [
        part
        for _ in range(20)
        for part in ("-c", f"write {chance.randrange(60 << 20)} {chance.randrange(1, 2 << 20)}")
    ]
    qemu_io(*writes, "s.qcow2", cwd=tmp_path)
    bits = chance.choice(["512", "4k", "64k", "1M"])
    target = f"-O qcow2 -o cluster_size={bits}"
    found = ours(f"measure --output=json {target} s.qcow2", tmp_path)
    assert found == theirs(qemu_img, f"measure --output=json {target} s.qcow2", tmp_path)
