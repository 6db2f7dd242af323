"""Convert beside the real tool: the same disks, sound images, no more space, the same refusals."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.runs import first_line, ours, theirs
from effort import examples
from jobs.folders import chain, create, fresh, send, uncompressed
from oracles import Oracle
from proof.chains import Layered, layered, our_read, qemu_create, qemu_fill

BLOCK = 512

OPTIONS = """
-O qcow2
-O qcow2 -c
-O qcow2 -S 0
-O qcow2 -S 512
-O qcow2 -S 64k -m 1
-O qcow2 -W -m 16
-O qcow2 -o cluster_size=512
-O qcow2 -o cluster_size=2M
-O qcow2 -o cluster_size=2M -c
-O qcow2 -o refcount_bits=1 -c
-O qcow2 -o refcount_bits=2,cluster_size=1k -c
-O qcow2 -o compat=0.10
-O qcow2 -o refcount_bits=1
-O qcow2 -o refcount_bits=64,cluster_size=4k
-O qcow2 -o preallocation=metadata
-O qcow2 -o preallocation=falloc
-O qcow2 -o extended_l2=on
-O qcow2 -o extended_l2=on,cluster_size=16k -c
-O qcow2 -o extended_l2=on,preallocation=metadata
-O qcow2 -t none
-O qcow2 -T none -t writethrough
-O raw
-O raw -S 0
-O raw -S 512
-O raw -S 1M
-O raw -o preallocation=falloc
-f qcow2
""".strip().splitlines()


@pytest.mark.parametrize("options", OPTIONS)
def test_every_way_gives_the_same_disk_and_no_more_space(
    options: str, tmp_path: Path, qemu_img: Oracle
) -> None:
    chain(tmp_path)
    assert ours(f"convert {options} top.qcow2 ours", tmp_path) == (0, "", "")
    assert theirs(qemu_img, f"convert {options} top.qcow2 theirs", tmp_path) == (0, "", "")
    format = "qcow2" if "-O qcow2" in options else "raw"
    formats = ("-f", format, "-F", "qcow2")
    qemu_img("compare", *formats, "ours", "top.qcow2", cwd=tmp_path)
    if format == "qcow2":
        qemu_img("check", "-f", "qcow2", "ours", cwd=tmp_path)
    used, enough = ((tmp_path / name).stat().st_blocks * BLOCK for name in ("ours", "theirs"))
    # Compressing faster costs some space, and tables may lie elsewhere.
    assert used <= enough * (1.15 if "-c" in options else 1.01) + 4 * 4096


REFUSALS = """
convert
convert a.qcow2
convert -O qcow2 a.qcow2 nodir/x.qcow2
convert -O qcow2 nofile b.qcow2
convert -n -O qcow2 a.qcow2 notthere.qcow2
convert --target-is-zero -O qcow2 a.qcow2 b.qcow2
convert -c -O raw a.qcow2 b.raw
convert -m 17 -O qcow2 a.qcow2 b.raw
convert -m x -O qcow2 a.qcow2 b.raw
convert -S 1 -O qcow2 a.qcow2 b.raw
convert -S 1x -O qcow2 a.qcow2 b.raw
convert -O foo a.qcow2 b.raw
convert -f foo a.qcow2 b.raw
convert -r x a.qcow2 b.raw
convert -t foo a.qcow2 b.raw
convert -T foo a.qcow2 b.raw
convert -n -o size=1M a.qcow2 b.raw
convert -B a.qcow2 -O qcow2 a.qcow2 small.qcow2 b.qcow2
convert -B a.qcow2 -O qcow2 a.qcow2 b.qcow2
convert -B a.qcow2 -F qcow2 -O raw a.qcow2 b.raw
convert --bogus a.qcow2 b.raw
convert --target-image-opts a.qcow2 driver=qcow2,file.filename=b.qcow2
convert --image-opts -f qcow2 driver=qcow2,file.filename=b.qcow2 z
convert -O raw . x.raw
convert -O raw a.qcow2 .
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSALS)
def test_refusals_are_those_of_the_real_tool(line: str, tmp_path: Path, qemu_img: Oracle) -> None:
    create(tmp_path, "-f", "qcow2", "a.qcow2", "10M")
    create(tmp_path, "-f", "qcow2", "small.qcow2", "5M")
    before = sorted(os.listdir(tmp_path))
    mine = ours(line, tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    real = theirs(qemu_img, line, tmp_path)
    assert (mine.code, mine.out) == (real.code, real.out)
    assert first_line(mine.err) == first_line(real.err)


def test_target_smaller_than_the_source_is_named_and_kept(tmp_path: Path) -> None:
    create(tmp_path, "-f", "qcow2", "a.qcow2", "10M")
    create(tmp_path, "-f", "qcow2", "small.qcow2", "5M")
    before = (tmp_path / "small.qcow2").read_bytes()
    code, out, err = ours("convert -n -O qcow2 a.qcow2 small.qcow2", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("qemu-img: output file is smaller than input file: 'small.qcow2' has ")
    assert (tmp_path / "small.qcow2").read_bytes() == before


def test_source_is_never_its_own_target(tmp_path: Path) -> None:
    chain(tmp_path)
    os.link(tmp_path / "base.qcow2", tmp_path / "link.qcow2")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for target in ("top.qcow2", "base.qcow2", "link.qcow2"):
        for share in ("", "-U"):
            code, _, err = ours(f"convert {share} -O qcow2 top.qcow2 {target}", tmp_path)
            assert code == 1
            assert target in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_empty_image_keeps_its_size(tmp_path: Path) -> None:
    create(tmp_path, "-f", "qcow2", "empty.qcow2", "10M")
    assert ours("convert -O raw empty.qcow2 empty.raw", tmp_path).code == 0
    status = (tmp_path / "empty.raw").stat()
    assert status.st_size == 10 << 20
    assert status.st_blocks == 0


def test_sources_follow_one_another_in_whole_sectors(tmp_path: Path) -> None:
    (tmp_path / "one.raw").write_bytes(b"1" * 1000)
    (tmp_path / "two.raw").write_bytes(b"2" * 70001)
    assert ours("convert -f raw one.raw two.raw one.raw all.raw", tmp_path).code == 0
    parts = (b"1" * 1000, b"2" * 70001, b"1" * 1000)
    expected = b"".join(part.ljust(-(-len(part) // BLOCK) * BLOCK, b"\0") for part in parts)
    assert (tmp_path / "all.raw").read_bytes() == expected
    assert ours("convert -f raw -O qcow2 -c one.raw two.raw one.raw all.qcow2", tmp_path).code == 0
    assert ours("compare -f qcow2 -F raw all.qcow2 all.raw", tmp_path).code == 0


def test_existing_target_is_overwritten_up_to_the_source(tmp_path: Path, qemu_img: Oracle) -> None:
    chain(tmp_path)
    for name in ("ours.raw", "theirs.raw"):
        (tmp_path / name).write_bytes(b"x" * (9 << 20))
    assert ours("convert -n -O raw top.qcow2 ours.raw", tmp_path).code == 0
    theirs(qemu_img, "convert -n -O raw top.qcow2 theirs.raw", tmp_path)
    assert (tmp_path / "ours.raw").read_bytes() == (tmp_path / "theirs.raw").read_bytes()
    for name in ("ours", "theirs"):
        create(tmp_path, "-f", "qcow2", "-b", "new.qcow2", "-F", "qcow2", f"{name}.qcow2", "9M")
        send(tmp_path, f"{name}.qcow2", "write -P 77 100k 5M")
    assert ours("convert -n -O qcow2 top.qcow2 ours.qcow2", tmp_path).code == 0
    theirs(qemu_img, "convert -n -O qcow2 top.qcow2 theirs.qcow2", tmp_path)
    qemu_img("compare", "ours.qcow2", "theirs.qcow2", cwd=tmp_path)
    qemu_img("check", "ours.qcow2", cwd=tmp_path)


@pytest.mark.parametrize(
    "options", ["", "-c", "-o cluster_size=4k", "-o cluster_size=2M -c", "-o extended_l2=on"]
)
def test_overlay_of_a_copied_base_holds_the_top_layer_only(
    options: str, tmp_path: Path, qemu_img: Oracle
) -> None:
    chain(tmp_path)
    line = f"convert -O qcow2 {options} -B mid.qcow2 -F qcow2 top.qcow2"
    assert ours(f"{line} ours.qcow2", tmp_path) == (0, "", "")
    assert theirs(qemu_img, f"{line} theirs.qcow2", tmp_path).code == 0
    qemu_img("compare", "ours.qcow2", "top.qcow2", cwd=tmp_path)
    qemu_img("check", "ours.qcow2", cwd=tmp_path)
    used, enough = ((tmp_path / f"{name}.qcow2").stat().st_blocks for name in ("ours", "theirs"))
    assert used * BLOCK <= enough * BLOCK + 65536


def test_compressed_sources_are_unpacked(tmp_path: Path, qemu_img: Oracle) -> None:
    chain(tmp_path)
    qemu_img("convert", "-c", "-O", "qcow2", "top.qcow2", "packed.qcow2", cwd=tmp_path)
    assert ours("convert packed.qcow2 plain.raw", tmp_path).code == 0
    qemu_img("compare", "plain.raw", "top.qcow2", cwd=tmp_path)


@settings(
    max_examples=examples(8),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layered(most=4, requests=5, granularity=512),
    st.sampled_from(
        (
            "",
            "-c",
            "-o cluster_size=512",
            "-o cluster_size=1M",
            "-m 2 -W",
            "-S 512",
            "-o extended_l2=on,cluster_size=16k",
            "-c -o extended_l2=on",
        )
    ),
)
def test_generated_chains(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, drawn: Layered, options: str
) -> None:
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        top = drawn.names[-1]
        assert ours(f"convert -O qcow2 {options} {top} ours.qcow2", folder) == (0, "", "")
        qemu_img("check", "-f", "qcow2", "ours.qcow2", cwd=folder)
        assert ours(f"convert -f qcow2 -O raw {top} ours.raw", folder) == (0, "", "")
        qemu_img("convert", "-f", "qcow2", "-O", "raw", top, "theirs.raw", cwd=folder)
        data = (folder / "theirs.raw").read_bytes()
        assert (folder / "ours.raw").read_bytes() == data
        assert asyncio.run(our_read(folder / "ours.qcow2")).ljust(len(data), b"\0") == data
