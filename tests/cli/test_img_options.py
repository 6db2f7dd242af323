"""`blk img` beside the real qemu-img, option by option: the same lines, exit codes and images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.runs import first_line, ours, theirs
from oracles import Oracle

LINES = """
info -b top.qcow2
create -f qcow2 --backing base.qcow2 --backing-format qcow2 x.qcow2
create -f qcow2 -u x.qcow2 1M
create -f qcow2 -o list x.qcow2
create -f raw -o help,size=1 x.raw
create -f vdi -o help
create -o ? x
convert a.raw
convert -O vmdk -o help a.raw b.qcow2
convert -q -p -O qcow2 base.qcow2 x.qcow2
convert -W -c -O qcow2 base.qcow2 x.qcow2
convert -W -O qcow2 base.qcow2 x.qcow2
convert -m 0 base.qcow2 x.raw
convert -m 17 base.qcow2 x.raw
convert -m 1 base.qcow2 x.raw
convert -m x base.qcow2 x.raw
convert -m 1x base.qcow2 x.raw
convert --parallel=4 base.qcow2 x.raw
convert -r 0 base.qcow2 x.raw
convert -r x base.qcow2 x.raw
convert -r 10G base.qcow2 x.raw
convert --rate=10G base.qcow2 x.raw
convert -S 0 base.qcow2 x.raw
convert -S 1 base.qcow2 x.raw
convert -S 100M base.qcow2 x.raw
convert -S x base.qcow2 x.raw
convert --target-is-zero base.qcow2 x.raw
convert -n --target-is-zero -O raw base.qcow2 a.raw
convert -n base.qcow2 nofile
convert -n -o cluster_size=1k base.qcow2 a.raw
convert --target-image-opts base.qcow2 driver=raw,file.filename=a.raw
convert --target-image-opts -n base.qcow2 driver=raw,file.driver=file,file.filename=a.raw
convert --image-opts driver=qcow2,file.filename=base.qcow2 x.raw
convert --source-image-opts driver=qcow2,file.filename=base.qcow2 x.raw
convert --image-opts -f qcow2 driver=qcow2,file.filename=base.qcow2 x.raw
convert -f qcow2 a.raw x.raw
convert -f nofmt a.raw x.raw
convert -O nofmt a.raw x.raw
convert -T bad a.raw x.raw
convert -T none -t none a.raw x.raw
convert -T directsync -t writethrough base.qcow2 -O qcow2 x.qcow2
convert -U base.qcow2 x.raw
convert -B base.qcow2 top.qcow2 -O qcow2 x.qcow2
convert -B base.qcow2 -F qcow2 top.qcow2 -O qcow2 x.qcow2
convert -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2 -O qcow2 x.qcow2
convert --salvage base.qcow2 x.raw
convert -l nosnap snaps.qcow2 x.raw
convert -s second snaps.qcow2 x.raw
convert -l second snaps.qcow2 x.raw
convert a.raw odd.raw x.raw
convert -O qcow2 -o preallocation=full -S 4k a.raw x.raw
convert -O raw -c a.raw x.raw
convert a.raw nodir/x.raw
commit top.qcow2
commit -q top.qcow2
commit -d top.qcow2
commit -b base.qcow2 top.qcow2
commit -b nobase top.qcow2
commit -b top.qcow2 top.qcow2
commit -r 1G top.qcow2
commit --rate=1G top.qcow2
commit -r x top.qcow2
commit -t bad top.qcow2
commit -t none top.qcow2
commit a.qcow2
commit a.raw
commit orphan.qcow2
commit nofile
commit
commit --image-opts driver=qcow2,file.filename=top.qcow2
rebase -b base.qcow2 -F qcow2 top.qcow2
rebase -b '' top.qcow2
rebase -u -b '' top.qcow2
rebase -u top.qcow2
rebase top.qcow2
rebase -u -b nofile -F qcow2 top.qcow2
rebase -u -b nofile top.qcow2
rebase -b nofile -F qcow2 top.qcow2
rebase -b base.qcow2 -F nofmt top.qcow2
rebase -c -b '' top.qcow2
rebase -c -u -b '' top.qcow2
rebase -T bad -b '' top.qcow2
rebase -t bad -b '' top.qcow2
rebase -T none -t none -b '' top.qcow2
rebase -U -b '' top.qcow2
rebase -b base.qcow2 -F qcow2 a.raw
rebase -b base.qcow2 --backing-format=qcow2 a.qcow2
rebase -b base.qcow2 -F qcow2 orphan.qcow2
compare a.raw a.qcow2
compare -s a.raw a.qcow2
compare -q a.raw base.qcow2
compare base.qcow2 a.raw
compare -s base.qcow2 a.raw
compare a.raw nofile
compare nofile a.raw
compare a.raw
compare -f raw -F qcow2 a.raw a.qcow2
compare -f qcow2 a.raw a.qcow2
compare -T bad a.raw a.qcow2
compare -T none a.raw a.qcow2
compare -U a.raw a.qcow2
compare --a-format=raw --b-format=qcow2 a.raw a.qcow2
compare --image-opts driver=raw,file.filename=a.raw driver=qcow2,file.filename=a.qcow2
compare --image-opts -f raw driver=raw,file.filename=a.raw driver=qcow2,file.filename=a.qcow2
compare a.raw odd.raw
compare odd.raw empty.raw
compare orphan.qcow2 a.raw
dd if=a.raw of=x.raw
dd if=base.qcow2 of=x.raw bs=64k count=2
dd if=base.qcow2 of=x.raw bs=64k skip=100
dd -O qcow2 if=base.qcow2 of=x.qcow2
dd if=base.qcow2
dd of=x.raw
dd if=base.qcow2 of=x.raw bs=0
dd if=base.qcow2 of=x.raw bs=x
dd if=base.qcow2 of=x.raw count=x
dd if=base.qcow2 of=x.raw skip=-1
dd if=base.qcow2 of=x.raw foo=1
dd if=base.qcow2 of=x.raw foo
dd if=base.qcow2 of=x.raw conv=notrunc
dd -U -f qcow2 if=base.qcow2 of=x.raw
dd --image-opts if=driver=qcow2,file.filename=base.qcow2 of=x.raw
dd -n if=base.qcow2 of=a.raw
dd if=nofile of=x.raw
dd -f nofmt if=a.raw of=x.raw
dd isize=1 if=a.raw of=x.raw
dd if=a.raw of=x.raw count=0
dd bs=1 count=1 if=a.raw of=x.raw bs=2
resize a.qcow2 -- -512k
resize --shrink a.qcow2 -- -512k
resize a.qcow2 --preallocation off 3M
resize -f raw a.raw -1
resize a.qcow2 -x
amend -o lazy_refcounts=on a.qcow2
amend --force -o lazy_refcounts=on a.qcow2
amend -t none -o lazy_refcounts=on a.qcow2
amend -o backing_file=x a.qcow2
amend -o size=2M a.qcow2
amend a.qcow2
amend -t bad -o lazy_refcounts=on a.qcow2
snapshot snaps.qcow2
snapshot -l snaps.qcow2
snapshot -c x snaps.qcow2
snapshot -a second snaps.qcow2
snapshot -d second snaps.qcow2
snapshot -d x -l snaps.qcow2
snapshot -d x snaps.qcow2
snapshot -a x snaps.qcow2
snapshot -c second snaps.qcow2
snapshot -U -l snaps.qcow2
snapshot -U -d second snaps.qcow2
snapshot -q -c x snaps.qcow2
snapshot a.raw
snapshot -c x a.raw
snapshot a b
snapshot
snapshot --image-opts -l driver=qcow2,file.filename=snaps.qcow2
measure --size 1G
measure -O qcow2 snaps.qcow2
measure --output=json -O qcow2 snaps.qcow2
measure -U -O qcow2 snaps.qcow2
measure --target-format=qcow2 --options=compat=0.10 --size=1M
measure
map -s 64k base.qcow2
map -l 64k base.qcow2
map --start-offset 64k --max-length 64k base.qcow2
map --output=xml a.raw
map -U --output=json a.raw
check -r leaks -T none leak.qcow2
check --repair=all leak.qcow2
check -f raw a.qcow2
check --image-opts driver=qcow2,file.filename=a.qcow2
check -U a.qcow2
check a b
-T nonsense info a.raw
-T foo=bar info a.raw
--trace=nonsense* info a.raw
-T
create -6 -f qcow2 x.qcow2 1M
convert -6 a.raw x.raw
convert -C -O raw base.qcow2 x.raw
convert -C -c -O qcow2 base.qcow2 x.raw
convert -C -S 4k -O raw base.qcow2 x.raw
convert --copy-range-offloading -O raw base.qcow2 x.raw
convert -O null-co a.raw x.raw
convert -O qcow2 -c -o preallocation=metadata a.raw x.raw
resize -512k a.qcow2
measure -O qcow2 -l second snaps.qcow2
measure -O qcow2 --snapshot=second snaps.qcow2
measure -O qcow2 -l snapshot.name=second snaps.qcow2
measure -O qcow2 -l nope snaps.qcow2
measure -O qcow2 -l second --size 1G
measure -l x
"""

NEWER = """
create -f qcow2 -b base.qcow2 -B qcow2 x.qcow2 | create -f qcow2 -b base.qcow2 -F qcow2 x.qcow2
convert -b base.qcow2 -F qcow2 top.qcow2 -O qcow2 x.qcow2 | \
convert -B base.qcow2 -F qcow2 top.qcow2 -O qcow2 x.qcow2
convert --rate-limit=1G base.qcow2 x.raw | convert -r 1G base.qcow2 x.raw
convert --source-snapshot=second snaps.qcow2 x.raw | convert -l second snaps.qcow2 x.raw
convert --target-format-options=cluster_size=4k -O qcow2 a.raw x.qcow2 | \
convert -o cluster_size=4k -O qcow2 a.raw x.qcow2
commit --rate-limit=1G top.qcow2 | commit -r 1G top.qcow2
rebase -B qcow2 -b base.qcow2 top.qcow2 | rebase -F qcow2 -b base.qcow2 top.qcow2
snapshot --create x a.qcow2 | snapshot -c x a.qcow2
snapshot --apply second snaps.qcow2 | snapshot -a second snaps.qcow2
snapshot --delete second snaps.qcow2 | snapshot -d second snaps.qcow2
measure -s 1G -O qcow2 | measure --size 1G -O qcow2
measure --source-format=qcow2 -O qcow2 a.qcow2 | measure -f qcow2 -O qcow2 a.qcow2
"""
"""Names of QEMU 10.1 and later, and what the release that is installed calls the same."""

NOT_COMPARED = ("actual-size", "children", "snapshots")
"""Use of disk space, and times of day."""


def lines(table: str) -> list[str]:
    return table.strip("\n").split("\n")


CHAIN = ("base.qcow2", "mid.qcow2", "top.qcow2")


def copies(line: str, pristine: Path, folder: Path) -> tuple[Path, Path]:
    """Two folders with the images that ``line`` is about: ours and theirs."""
    named = [path.name for path in pristine.iterdir() if path.is_file() and path.name in line]
    wanted = {*named, *(CHAIN if "top.qcow2" in line else ())}
    for name in ("ours", "theirs"):
        (folder / name).mkdir()
        for image in wanted:
            shutil.copy(pristine / image, folder / name / image)
    return folder / "ours", folder / "theirs"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_images(before: Path, mine: Path, other: Path, qemu_img: Oracle) -> None:
    """What the two tools made is the same to the real one, wherever the bytes differ."""
    start, left, right = contents(before), contents(mine), contents(other)
    assert left.keys() == right.keys()
    for name in left:
        if left[name] == right[name]:
            continue
        assert left[name] != start.get(name), f"only the real tool changed {name}"
        infos = [
            json.loads(theirs(qemu_img, ["info", "--output=json", name], folder).out)
            for folder in (mine, other)
        ]
        for info in infos:
            for key in NOT_COMPARED:
                info.pop(key, None)
        assert infos[0] == infos[1]
        if infos[0].get("backing-filename") == "nofile":
            continue
        compared = theirs(qemu_img, ["compare", str(mine / name), str(other / name)], mine)
        assert compared.out == "Images are identical.\n"


@pytest.mark.parametrize("line", lines(LINES))
def test_every_option(line: str, tmp_path: Path, pristine: Path, qemu_img: Oracle) -> None:
    mine, other = copies(line, pristine, tmp_path)
    wanted, found = theirs(qemu_img, line, other), ours(line, mine)
    assert (found.code, found.out) == (wanted.code, wanted.out)
    assert first_line(found.err) == first_line(wanted.err)
    assert_same_images(pristine, mine, other, qemu_img)


@pytest.mark.parametrize("lines", lines(NEWER))
def test_names_of_newer_releases(
    lines: str, tmp_path: Path, pristine: Path, qemu_img: Oracle
) -> None:
    line, _, older = lines.partition(" | ")
    mine, other = copies(line, pristine, tmp_path)
    assert theirs(qemu_img, line, other).code == 1, "the installed release knows it: compare it"
    wanted, found = theirs(qemu_img, older, other), ours(line, mine)
    wanted = wanted._replace(out=wanted.out.replace(older, line))
    assert (found.code, found.out, found.err) == (0, wanted.out, "")
    assert_same_images(pristine, mine, other, qemu_img)


def test_limits(pristine: Path) -> None:
    plain = json.loads(ours("info --output=json a.qcow2", pristine).out)
    found = json.loads(ours("info --limits --output=json a.qcow2", pristine).out)
    limits = found.pop("limits")
    below = found["children"][0]["info"].pop("limits")
    assert found == plain
    assert limits["discard-alignment"] == limits["write-zeroes-alignment"] == 65536
    assert limits["request-alignment"] == below["request-alignment"] == 1
    assert {"max-iov", "min-mem-alignment", "opt-mem-alignment"} <= limits.keys() & below.keys()
    shown = ours("info --limits a.qcow2", pristine).out
    assert "Block limits:\n    request alignment: 1\n" in shown


def test_limits_of_direct_access(pristine: Path, tmp_path: Path) -> None:
    shutil.copy(pristine / "a.qcow2", tmp_path / "a.qcow2")
    found = ours("info --limits --output=json -t none a.qcow2", tmp_path)
    if found.code:
        pytest.skip("the file system has no direct access")
    info = json.loads(found.out)
    below = info["children"][0]["info"]["limits"]["request-alignment"]
    assert below >= 512
    assert info["limits"]["min-mem-alignment"] == below
