"""Commit and rebase beside the real tool: the same chains give the same disks, maps and lines."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.runs import first_line, ours, theirs
from effort import examples
from jobs.folders import chain, create, fresh, send, uncompressed
from oracles import Oracle
from proof.chains import Layered, layered, qemu_create, qemu_fill

IMAGES = ("base.qcow2", "mid.qcow2", "top.qcow2", "new.qcow2")

FEW = settings(
    max_examples=examples(6),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that `twins` are copies of."""
    mine = tmp_path_factory.mktemp("pristine")
    chain(mine)
    create(mine, "-f", "raw", "plain.raw", "4M")
    create(mine, "-f", "qcow2", "-b", "plain.raw", "-F", "raw", "onraw.qcow2", "5M")
    send(mine, "onraw.qcow2", "write -P 5 12345 100000", "write -P 6 4M 64k", "write -z 1M 1M")
    create(mine, "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "short.qcow2", "1M")
    send(mine, "short.qcow2", "write -P 5 100k 100k")
    return mine


@pytest.fixture
def twins(pristine: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same images: one for us, one for the real tool."""
    mine, real = tmp_path / "ours", tmp_path / "theirs"
    for folder in (mine, real):
        shutil.copytree(pristine, folder)
    return mine, real


def same_disks(qemu_img: Oracle, one: Path, other: Path) -> None:
    """Every image of the two folders reads the same, is sound, and has the same size."""
    for path in sorted(one.glob("*.*")):
        if filecmp.cmp(path, other / path.name, shallow=False):
            # And so is what lies below: it is looked at by itself.
            continue
        if path.suffix == ".qcow2":
            infos = [qemu_img.json("info", "--output=json", p / path.name) for p in (one, other)]
            for name in ("virtual-size", "backing-filename", "backing-filename-format"):
                assert infos[0].get(name) == infos[1].get(name), (path.name, name)
            if "backing-filename" in infos[0] and not _present(one, infos[0]):
                continue
            qemu_img("check", path)
        qemu_img("compare", path, other / path.name)


def _present(folder: Path, info: dict[str, object]) -> bool:
    return (folder / str(info["backing-filename"])).exists()


def held(qemu_img: Oracle, image: Path) -> int:
    """Bytes that the image's own layer holds as data."""
    entries = json.loads(qemu_img("map", "--output=json", image).stdout)
    return sum(e["length"] for e in entries if e["depth"] == 0 and e["data"] and not e["zero"])


COMMITS = """
commit top.qcow2
commit -d top.qcow2
commit -b mid.qcow2 top.qcow2
commit -b base.qcow2 top.qcow2
commit -b ./base.qcow2 top.qcow2
commit -q -t none top.qcow2
commit -r 1G top.qcow2
commit onraw.qcow2
commit -f qcow2 onraw.qcow2
commit short.qcow2
commit --image-opts driver=qcow2,file.filename=top.qcow2
commit --image-opts driver=qcow2,file.filename=top.qcow2,backing.file.filename=new.qcow2
commit
commit base.qcow2
commit plain.raw
commit nofile
commit -b nofile top.qcow2
commit -b top.qcow2 top.qcow2
commit -r x top.qcow2
commit -t foo top.qcow2
""".strip().splitlines()

REBASES = """
rebase -b base.qcow2 -F qcow2 top.qcow2
rebase -b new.qcow2 -F qcow2 top.qcow2
rebase -c -b new.qcow2 -F qcow2 top.qcow2
rebase -b plain.raw -F raw top.qcow2
rebase -t none -T none -b new.qcow2 -F qcow2 top.qcow2
rebase -b "" top.qcow2
rebase -c -b "" top.qcow2
rebase -b mid.qcow2 -F qcow2 new.qcow2
rebase -b top.qcow2 -F qcow2 onraw.qcow2
rebase -b new.qcow2 -F qcow2 short.qcow2
rebase -u -b "" top.qcow2
rebase -u -b new.qcow2 -F qcow2 top.qcow2
rebase -u -b nofile -F qcow2 top.qcow2
rebase -u -b nofile top.qcow2
rebase -b new.qcow2 top.qcow2
rebase -b nofile -F qcow2 top.qcow2
rebase -b new.qcow2 -F foo top.qcow2
rebase top.qcow2
rebase
""".strip().splitlines()


@pytest.mark.parametrize("line", COMMITS + REBASES)
def test_same_lines_and_same_disks(line: str, twins: tuple[Path, Path], qemu_img: Oracle) -> None:
    mine, real = ours(line, twins[0]), theirs(qemu_img, line, twins[1])
    assert (mine.code, mine.out) == (real.code, real.out)
    assert first_line(mine.err) == first_line(real.err)
    same_disks(qemu_img, *twins)
    if "nofile" not in line:
        for name in ("base.qcow2", "mid.qcow2", "top.qcow2", "new.qcow2"):
            assert held(qemu_img, twins[0] / name) <= held(qemu_img, twins[1] / name), name


def test_rebase_keeps_the_disk_over_a_base_of_another_size(
    tmp_path: Path, qemu_img: Oracle
) -> None:
    chain(tmp_path)
    for name, size in (("tiny.qcow2", "65k"), ("huge.qcow2", "20M")):
        create(tmp_path, "-f", "qcow2", name, size)
        send(tmp_path, name, "write -P 200 0 65k")
    send(tmp_path, "huge.qcow2", "write -P 201 0 20M")
    qemu_img("convert", "top.qcow2", "before.raw", cwd=tmp_path)
    for backing in ("tiny.qcow2", "huge.qcow2", "base.qcow2"):
        assert ours(f"rebase -b {backing} -F qcow2 top.qcow2", tmp_path) == (0, "", "")
        qemu_img("compare", "top.qcow2", "before.raw", cwd=tmp_path)
        qemu_img("check", "top.qcow2", cwd=tmp_path)


def test_names_are_relative_to_the_overlay(tmp_path: Path, qemu_img: Oracle) -> None:
    chain(tmp_path)
    folder = tmp_path / "sub"
    folder.mkdir()
    shutil.copy(tmp_path / "new.qcow2", folder / "other.qcow2")
    shutil.move(tmp_path / "top.qcow2", folder / "top.qcow2")
    assert ours("rebase -u -b ../mid.qcow2 -F qcow2 sub/top.qcow2", tmp_path).code == 0
    qemu_img("convert", "sub/top.qcow2", "before.raw", cwd=tmp_path)
    assert ours("rebase -b other.qcow2 -F qcow2 sub/top.qcow2", tmp_path) == (0, "", "")
    qemu_img("compare", "sub/top.qcow2", "before.raw", cwd=tmp_path)
    info = qemu_img.json("info", "--output=json", "sub/top.qcow2", cwd=tmp_path)
    assert info["backing-filename"] == "other.qcow2"


@pytest.mark.parametrize("backing", ["top.qcow2", "./top.qcow2", "link.qcow2", "above.qcow2"])
def test_rebase_onto_itself_is_refused(backing: str, tmp_path: Path) -> None:
    chain(tmp_path)
    os.symlink("top.qcow2", tmp_path / "link.qcow2")
    create(tmp_path, "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "above.qcow2")
    before = (tmp_path / "top.qcow2").read_bytes()
    for share in ("", "-U"):
        code, _, err = ours(f"rebase {share} -b {backing} -F qcow2 top.qcow2", tmp_path)
        assert code == 1
        assert "Could not open new backing file" in err
    assert (tmp_path / "top.qcow2").read_bytes() == before


def test_base_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    chain(tmp_path)
    before = (tmp_path / "top.qcow2").read_bytes()
    os.replace(tmp_path / "mid.qcow2", tmp_path / "real.qcow2")
    (tmp_path / "mid.qcow2").mkdir()
    code, _, err = ours("commit top.qcow2", tmp_path)
    assert code == 1
    assert "mid.qcow2" in err
    assert (tmp_path / "top.qcow2").read_bytes() == before


@FEW
@given(drawn=layered(most=4, requests=5, granularity=512), deep=st.booleans())
def test_generated_commits(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, drawn: Layered, deep: bool
) -> None:
    if len(drawn.layers) < 2:
        return
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        top, base = drawn.names[-1], drawn.names[0 if deep else -2]
        qemu_img("convert", "-f", "qcow2", top, "before.raw", cwd=folder)
        assert ours(f"commit -q -f qcow2 -b {base} {top}", folder) == (0, "", "")
        for name in drawn.names:
            qemu_img("check", "-f", "qcow2", name, cwd=folder)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", top, "before.raw", cwd=folder)
        # The base now shows the same, up to the end of the top.
        size = (folder / "before.raw").stat().st_size
        qemu_img("convert", "-f", "qcow2", base, "base.raw", cwd=folder)
        assert (folder / "base.raw").read_bytes()[:size] == (folder / "before.raw").read_bytes()


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_zeros_of_no_backing_file_hide_the_new_one(
    tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle, compat: str
) -> None:
    for name in ("top", "below"):
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", name, "1M", cwd=tmpfs)
    qemu_io("-c", "write -P 1 0 1M", "below", cwd=tmpfs)
    qemu_io("-c", "write -P 2 64k 64k", "top", cwd=tmpfs)
    assert ours("rebase -f qcow2 -b below -F qcow2 top", tmpfs) == (0, "", "")
    reads = ("read -P 0 0 64k", "read -P 2 64k 64k", "read -P 0 128k 896k")
    for read in reads:
        assert "failed" not in qemu_io("-c", read, "top", cwd=tmpfs).stdout


@FEW
@given(
    drawn=layered(most=4, requests=5, granularity=512),
    other=layered(most=2, requests=5, granularity=512),
    compress=st.booleans(),
)
def test_generated_rebases(
    tmpfs: Path,
    qemu_img: Oracle,
    qemu_io: Oracle,
    drawn: Layered,
    other: Layered,
    compress: bool,
) -> None:
    with fresh(tmpfs) as folder:
        qemu_create(qemu_img, folder, drawn)
        qemu_fill(qemu_io, folder, uncompressed(drawn))
        below = folder / "other"
        below.mkdir()
        qemu_create(qemu_img, below, other)
        qemu_fill(qemu_io, below, uncompressed(other))
        top = drawn.names[-1]
        qemu_img("convert", "-f", "qcow2", top, "before.raw", cwd=folder)
        flags = "-c" if compress else ""
        line = f"rebase {flags} -f qcow2 -b other/{other.names[-1]} -F qcow2 {top}"
        assert ours(line, folder) == (0, "", "")
        qemu_img("check", "-f", "qcow2", top, cwd=folder)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", top, "before.raw", cwd=folder)
        assert ours(f"rebase -f qcow2 -b '' {top}", folder) == (0, "", "")
        qemu_img("check", "-f", "qcow2", top, cwd=folder)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", top, "before.raw", cwd=folder)
