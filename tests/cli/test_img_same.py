"""`blk img` beside the real qemu-img: the same arguments give the same lines and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.runs import first_line, ours, theirs
from oracles import Oracle

READING = """
info a.raw
info sparse.raw
info odd.raw
info empty.raw
info a.qcow2
info v2.qcow2
info tiny.qcow2
info lazy.qcow2
info meta.qcow2
info mixed.qcow2
info snaps.qcow2
info top.qcow2
info ./top.qcow2
info file:top.qcow2
info orphan.qcow2
info sub/mid.qcow2
info dirty.qcow2
info marked.qcow2
info extended.qcow2
info --output=json --backing-chain extendedtop.qcow2
info short.qcow2
info -f raw a.qcow2
info -f qcow2 a.qcow2
info -fqcow2 a.qcow2
info a.qcow2 --format qcow2
info --form=qcow2 a.qcow2
info -U a.qcow2
info -- a.qcow2
info 'na me,x.qcow2'
info --backing-chain top.qcow2
info --backing-chain sub/top.qcow2
info --backing-chain onraw.qcow2
info --backing-chain a.raw
info --output json a.raw
info --output=json a.qcow2
info --output=json v2.qcow2
info --output=json top.qcow2
info --output=json snaps.qcow2
info --output=json dirty.qcow2
info --output=json --backing-chain top.qcow2
info --output=human a.qcow2
info --image-opts driver=qcow2,file.filename=a.qcow2
info --image-opts driver=qcow2,file.driver=file,file.filename=top.qcow2
info --image-opts driver=qcow2,file.driver=raw,file.file.filename=top.qcow2
info --image-opts driver=file,filename=sparse.raw
info --image-opts 'driver=qcow2,file.filename=na me,,x.qcow2'
info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","file.driver":"file","file.filename":"a.qcow2"}'
map a.raw
map sparse.raw
map odd.raw
map empty.raw
map a.qcow2
map meta.qcow2
map full.qcow2
map snaps.qcow2
map top.qcow2
map onraw.qcow2
map mixed.qcow2
map extended.qcow2
map extendedmeta.qcow2
map extendedtop.qcow2
map --output=json a.raw
map --output=json sparse.raw
map --output=json odd.raw
map --output=json empty.raw
map --output=json a.qcow2
map --output=json tiny.qcow2
map --output=json meta.qcow2
map --output=json full.qcow2
map --output=json mixed.qcow2
map --output=json top.qcow2
map --output=json onraw.qcow2
map --output=json extended.qcow2
map --output=json extendedmeta.qcow2
map --output=json extendedtop.qcow2
map --output=json -s 131k -l 10k extended.qcow2
map --output=json sub/top.qcow2
map --output=json -f raw top.qcow2
map --output=json -s 5 -l 10 mixed.qcow2
map --output=json -s 100k -l 1M mixed.qcow2
map --output=json --start-offset=1M mixed.qcow2
map --output=json --start-offset=3M mixed.qcow2
map --output=json --start-offset=5M mixed.qcow2
map --output=json --max-length=0 mixed.qcow2
map --output=json --max-length=0x10000 mixed.qcow2
map --output=json --image-opts driver=raw,offset=256k,file.driver=file,file.filename=sparse.raw
map --output=json --image-opts driver=null-co,read-zeroes=on,size=1M
check a.qcow2
check v2.qcow2
check tiny.qcow2
check mixed.qcow2
check top.qcow2
check snaps.qcow2
check sound.qcow2
check leak.qcow2
check -q leak.qcow2
check -q a.qcow2
check corrupt.qcow2
check short.qcow2
check marked.qcow2
check extended.qcow2
check extendedmeta.qcow2
check --output=json extendedtop.qcow2
check --output=json a.qcow2
check --output=json mixed.qcow2
check --output=json leak.qcow2
check --output=json corrupt.qcow2
check -T none a.qcow2
check a.raw
check --output=json a.raw
create -f raw -o help new
"""

BAD = """
--foo
nosuchcommand

create
create new.raw
create new.raw 1x
create new.raw 1.5b
create new.raw 9E
create new.raw -- -5
create new.raw 1 2
create --badopt new.raw 1
create -Z new.raw 1
create -f
create --format
create --quiet=1 new.raw 1
create --b x new.raw 1M
create -f nofmt new.raw 1M
create -f null-co new 1M
create -f nofmt -o help
create -f null-co -o help
create -f raw -b a.qcow2 -F qcow2 new.raw 1M
create -f qcow2 -o nonsense=1 new.qcow2 1G
create -f qcow2 -o '' new.qcow2 1M
create -f qcow2 -o =x new.qcow2 1M
create -f qcow2 -o lazy_refcounts=maybe new.qcow2 1G
create -f qcow2 -o preallocation=x new.qcow2 1G
create -f qcow2 -o cluster_size=5 new.qcow2 1G
create -q -f qcow2 -o extended_l2=on,cluster_size=8k new.qcow2 1G
create -q -f qcow2 -o extended_l2=on,compat=0.10,cluster_size=4k new.qcow2 1G
create -q -f qcow2 -o extended_l2=on,compat=v2,refcount_bits=1,lazy_refcounts=on new.qcow2 1G
create -q -f qcow2 -o extended_l2=maybe new.qcow2 1G
create -q -f qcow2 -b base.qcow2 -F qcow2 -o preallocation=metadata new.qcow2
create -f qcow2 -o cluster_size=4M new.qcow2 1G
create -f qcow2 -o refcount_bits=5 new.qcow2 1G
create -f qcow2 -o compat=0.10,refcount_bits=8 new.qcow2 1G
create -f qcow2 -o compat=0.10,lazy_refcounts=on new.qcow2 1G
create -f qcow2 new.qcow2 7E
create -f qcow2 -o size=2M new.qcow2 1M
create -f qcow2 -b no.qcow2 -F qcow2 new.qcow2
create -f qcow2 -b no.qcow2 -F qcow2 new.qcow2 3M
create -f qcow2 -b '' new.qcow2 1M
create -f qcow2 -b a.qcow2 -F nope new.qcow2 1M
create -f qcow2 -u -b no.qcow2 -F qcow2 new.qcow2
create -f qcow2 -b new.qcow2 -F qcow2 new.qcow2
create -f qcow2 -o preallocation=metadata -F qcow2 -b a.qcow2 new.qcow2
create -f qcow2 nodir/new.qcow2 1M
create -f qcow2 folder 1M
create -f qcow2 foo:x 1M
info
info a.raw a.qcow2
info nofile
info folder
info -f qcow2 a.raw
info -f nofmt a.raw
info header.qcow2
info -f qcow2 header.qcow2
info version9.qcow2
info future.qcow2
info --output=xml a.raw
info --image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2
info --image-opts driver=qcow2,file.filename=nofile
info --backing-chain orphan.qcow2
info --backing-chain loop1.qcow2
info 'json:[]'
info foo:bar
map
map nofile
map folder
map orphan.qcow2
map future.qcow2
map --output=json --start-offset=5x a.qcow2
map --output=json --start-offset=-5 a.qcow2
map --output=json --max-length=-5 a.qcow2
map --output=csv a.qcow2
check
check nofile
check -r x a.qcow2
check -r all -U a.qcow2
check -T foo a.qcow2
check future.qcow2
resize
resize a.qcow2
resize 5M
resize a.qcow2 2x
resize a.qcow2 +
resize a.qcow2 ''
resize a.qcow2 -99E
resize a.qcow2 1M x
resize a.qcow2 -512k
resize a.qcow2 512k
resize --shrink a.qcow2 -5M
resize --preallocation=foo a.qcow2 3M
resize --preallocation=full --shrink a.qcow2 512k
resize nofile 2M
resize v2.qcow2
"""


WORDED_OTHERWISE = """
info clusterbits.qcow2 | Unsupported cluster size
info --image-opts a.qcow2 | a.qcow2
info --image-opts driver=qcow2,file.filename=a.qcow2,foo=1 | foo
info 'json:{"driver":"qcow2"' | Could not parse the JSON options
info --backing-chain self.qcow2 | self.qcow2
create -f qcow2 -o cluster_size=x new.qcow2 1G | cluster_size
create -f qcow2 -o compat=v9 new.qcow2 1G | v9
create -f qcow2 -o size=1M,,x new.qcow2 | size
create -f qcow2 -b a.qcow2 new.qcow2 | Backing file specified without backing format
"""


def lines(table: str) -> list[str]:
    return table.strip("\n").split("\n")


@pytest.mark.parametrize("line", lines(READING))
def test_the_same_is_printed(line: str, pristine: Path, qemu_img: Oracle) -> None:
    wanted = theirs(qemu_img, line, pristine)
    if "=json" in line and wanted.code == 0 and not line.startswith("map"):
        found = ours(line, pristine)
        assert (found.code, json.loads(found.out)) == (0, json.loads(wanted.out))
    assert ours(line, pristine) == wanted


@pytest.mark.parametrize("line", lines(BAD))
def test_bad_input_gives_the_same_first_line(line: str, images: Path, qemu_img: Oracle) -> None:
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    found = ours(line, images)
    after = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    wanted = theirs(qemu_img, line, images)
    assert found.code == wanted.code
    assert first_line(found.err).startswith(first_line(wanted.err).rstrip("."))
    assert before == after, "something was touched although the request was refused"


@pytest.mark.parametrize("line", lines(WORDED_OTHERWISE))
def test_bad_input_gives_one_clear_line(line: str, images: Path, qemu_img: Oracle) -> None:
    line, _, named = line.partition(" | ")
    found = ours(line, images)
    assert found.code == theirs(qemu_img, line, images).code == 1
    assert found.out == ""
    assert named in found.err
    assert found.err.count("\n") == 1


LOOPS = ["map loop1.qcow2", "check loop1.qcow2", "map self.qcow2"]


@pytest.mark.parametrize("line", LOOPS)
def test_a_loop_of_backing_files_ends(line: str, images: Path) -> None:
    """The real tool does not end here, so there is nothing to compare with."""
    found = ours(line, images)
    assert found.code == 1
    assert "creates an infinite loop" in found.err
    assert found.err.count("\n") == 1


def test_the_options_that_are_listed_are_described_alike(pristine: Path, qemu_img: Oracle) -> None:
    wanted = theirs(qemu_img, "create -f qcow2 -o help", pristine)
    found = ours("create -f qcow2 -o help", pristine)
    assert found.code == wanted.code == 0
    # Ours makes no images with the old AES encryption, and says so.
    more = [line for line in found.out.splitlines() if line not in wanted.out.splitlines()]
    assert [line.split("=")[0].strip() for line in more] == ["encrypt.format", "encryption"]


@pytest.mark.parametrize("line", ["map --output=json mixed.qcow2", "map full.qcow2"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_output_in_pieces_is_the_same(
    line: str, batch: int, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ours(line, pristine)
    monkeypatch.setattr("blocklayer.cli.img.map._BATCH", batch)
    assert ours(line, pristine) == whole
