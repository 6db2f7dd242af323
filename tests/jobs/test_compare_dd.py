"""Compare and dd beside the real tool: the same lines, the same exit codes, the same files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.runs import first_line, ours, theirs
from effort import examples
from jobs.folders import chain, create, fresh, send, uncompressed
from oracles import Oracle
from proof.chains import Layered, layered, qemu_create, qemu_fill

COMPARISONS = """
compare a.qcow2 empty.qcow2
compare -s a.qcow2 empty.qcow2
compare empty.qcow2 longer.qcow2
compare -s empty.qcow2 longer.qcow2
compare a.qcow2 later.qcow2
compare later.qcow2 a.qcow2
compare -q later.qcow2 a.qcow2
compare -q empty.qcow2 longer.qcow2
compare a.qcow2 a.raw
compare -s a.qcow2 a.raw
compare a.qcow2 changed.raw
compare changed.raw a.qcow2
compare -f raw -F qcow2 changed.raw a.qcow2
compare empty.qcow2 zeros.qcow2
compare -s empty.qcow2 zeros.qcow2
compare a.qcow2 over.qcow2
compare -s a.qcow2 over.qcow2
compare -T none a.qcow2 over.qcow2
compare -U a.qcow2 over.qcow2
compare a.qcow2 packed.qcow2
compare packed.qcow2 a.raw
compare odd.raw whole.raw
compare a.qcow2 a.qcow2
compare --image-opts driver=qcow2,file.filename=a.qcow2 driver=raw,file.filename=a.raw
compare a.qcow2 nofile
compare nofile a.qcow2
compare -f raw -F foo a.qcow2 a.qcow2
compare -T foo a.qcow2 empty.qcow2
compare a.qcow2
compare a.qcow2 empty.qcow2 a.raw
compare a.qcow2 corrupt.qcow2
""".strip().splitlines()


@pytest.fixture(scope="module")
def comparable(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("comparable")
    qemu_img: Oracle = request.getfixturevalue("qemu_img")
    for name, size in (("a", "10M"), ("empty", "10M"), ("zeros", "10M"), ("later", "12M")):
        create(folder, "-f", "qcow2", f"{name}.qcow2", size)
    create(folder, "-f", "qcow2", "longer.qcow2", "12M")
    send(folder, "a.qcow2", "write -P 1 1M 64k")
    send(folder, "later.qcow2", "write -P 1 1M 64k", "write -P 1 11M 64k")
    send(folder, "zeros.qcow2", "write -z 2M 64k", "write -P 0 3M 64k")
    create(folder, "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "over.qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", "a.qcow2", "packed.qcow2", cwd=folder)
    qemu_img("convert", "a.qcow2", "a.raw", cwd=folder)
    data = bytearray((folder / "a.raw").read_bytes())
    data[1_050_000] ^= 1
    (folder / "changed.raw").write_bytes(data)
    (folder / "odd.raw").write_bytes(bytes(1000))
    (folder / "whole.raw").write_bytes(bytes(1024))
    # The L2 table of a.qcow2 lies beyond the end of the file.
    content = bytearray((folder / "a.qcow2").read_bytes())
    l1 = int.from_bytes(content[40:48], "big")
    content[l1 : l1 + 8] = ((1 << 63) | (1 << 40)).to_bytes(8, "big")
    (folder / "corrupt.qcow2").write_bytes(content)
    return folder


@pytest.mark.parametrize("line", COMPARISONS)
def test_comparisons(line: str, comparable: Path, qemu_img: Oracle) -> None:
    mine, real = ours(line, comparable), theirs(qemu_img, line, comparable)
    assert (mine.code, mine.out) == (real.code, real.out)
    assert first_line(mine.err).split(":")[:2] == first_line(real.err).split(":")[:2]


@settings(
    max_examples=examples(6),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=layered(most=3, requests=5, granularity=512), seed=st.integers(0, 1 << 32))
def test_first_difference_is_found(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, drawn: Layered, seed: int
) -> None:
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        top = drawn.names[-1]
        qemu_img("convert", "-f", "qcow2", top, "copy.raw", cwd=folder)
        same = ours(f"compare -f qcow2 -F raw {top} copy.raw", folder)
        assert same == (0, "Images are identical.\n", "")
        data = bytearray((folder / "copy.raw").read_bytes())
        places = random.Random(seed).sample(range(len(data)), min(3, len(data)))
        for place in places:
            data[place] ^= 0xFF
        (folder / "copy.raw").write_bytes(data)
        line = f"Content mismatch at offset {min(places) // 512 * 512}!\n"
        assert ours(f"compare -f qcow2 -F raw {top} copy.raw", folder) == (1, line, "")
        assert ours(f"compare -f raw -F qcow2 copy.raw {top}", folder) == (1, line, "")


DDS = """
dd if=in.raw of=out
dd if=in.raw of=out bs=1000 count=3
dd if=in.raw of=out bs=1000 skip=99
dd if=in.raw of=out bs=4k skip=2
dd if=in.raw of=out bs=1M count=0
dd if=in.raw of=out bs=1000 skip=200
dd -f qcow2 if=top.qcow2 of=out bs=1M
dd -f qcow2 if=top.qcow2 of=out bs=100000 count=37
dd --image-opts if=driver=raw,file.filename=in.raw of=out
dd -U if=in.raw of=out
dd of=out
dd if=in.raw
dd if=in.raw of=out bs=0
dd if=in.raw of=out bs=x
dd if=in.raw of=out bs=3G
dd if=in.raw of=out count=x
dd if=in.raw of=out skip=-1
dd if=in.raw of=out foo=1
dd if=in.raw of=out foo
dd if=nofile of=out
dd if=in.raw of=nodir/out
""".strip().splitlines()


@pytest.mark.parametrize("line", DDS)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_dd(line: str, format: str, tmp_path: Path, qemu_img: Oracle) -> None:
    chain(tmp_path)
    (tmp_path / "in.raw").write_bytes(random.Random(1).randbytes(100_000))
    line = f"{line} -O {format}"
    results = []
    for run in (lambda: ours(line, tmp_path), lambda: theirs(qemu_img, line, tmp_path)):
        outcome = run()
        content = None
        if (tmp_path / "out").exists():
            qemu_img("convert", "-f", format, "out", "out.raw", cwd=tmp_path)
            content = (tmp_path / "out.raw").read_bytes()
            (tmp_path / "out").unlink()
        results.append((outcome.code, outcome.out, first_line(outcome.err), content))
    assert results[0] == results[1]


def test_dd_counts_from_what_was_skipped(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(10 * 512)
    (tmp_path / "in.raw").write_bytes(data)
    assert ours("dd -f raw if=in.raw of=out.raw skip=3 count=2", tmp_path) == (0, "", "")
    assert (tmp_path / "out.raw").read_bytes() == data[3 * 512 : 5 * 512]


def test_dd_keeps_holes_and_refuses_its_own_input(tmp_path: Path) -> None:
    create(tmp_path, "-f", "qcow2", "sparse.qcow2", "1G")
    assert ours("dd if=sparse.qcow2 of=sparse.raw bs=1M", tmp_path).code == 0
    status = (tmp_path / "sparse.raw").stat()
    assert (status.st_size, status.st_blocks) == (1 << 30, 0)
    before = (tmp_path / "sparse.qcow2").read_bytes()
    assert ours("dd if=sparse.qcow2 of=sparse.qcow2", tmp_path).code == 1
    assert (tmp_path / "sparse.qcow2").read_bytes() == before
