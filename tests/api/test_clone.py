"""Clones: sound overlays that read as their base, there complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blocklayer
from blocklayer import BlockError, Policy
from blocklayer.errors import LockedError, PolicyError, UsageError
from cli.runs import ours
from oracles import Oracle

SIZE = 4 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    blocklayer.create(path, SIZE)
    with blocklayer.open(path, writable=True) as disk:
        disk.write(0, b"a" * 65536)
        disk.write(SIZE - 512, b"z" * 512)
    return path


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc"])
def test_a_clone_of_every_format(qemu_img: Oracle, tmp_path: Path, format: str) -> None:
    raw, base = tmp_path / "raw", tmp_path / "base"
    raw.write_bytes(os.urandom(65536) + bytes(SIZE - 65536))
    qemu_img("convert", "-f", "raw", "-O", format, raw, base)
    made = blocklayer.clone(base, tmp_path / "one", tmp_path / "two", format=format)
    assert made == [str(tmp_path / "one"), str(tmp_path / "two")]
    for clone in made:
        qemu_img("check", clone)
        told = qemu_img.json("info", "--output=json", clone)
        assert told["backing-filename"] == str(base)
        assert told["backing-filename-format"] == format
        qemu_img("compare", "-f", format, "-F", "qcow2", base, clone)
        with blocklayer.open(clone, policy=Policy.strict(str(base)), format="qcow2") as disk:
            assert disk.read(0, 65536) == raw.read_bytes()[:65536]


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"cluster_size": 512},
    {"cluster_size": "2M"},
    {"compat": "0.10"},
    {"refcount_bits": 1, "cluster_size": 4096},
    {"lazy_refcounts": True},
    {"compression_type": "zstd"},
    {"size": "100G"},
    {"size": 10 << 40},
    {"size": 512},
    {"size": 0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_as_create_makes(
    qemu_img: Oracle, base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Byte for byte, and with holes where that has zeros."""
    clone, created = tmp_path / "clone", tmp_path / "created"
    blocklayer.clone(base, clone, **options)
    blocklayer.create(created, **{"size": SIZE, **options}, backing=base, backing_format="qcow2")
    assert clone.read_bytes() == created.read_bytes()
    assert clone.stat().st_blocks * 512 <= 64 << 10
    qemu_img("check", clone)
    assert blocklayer.inspect(clone).virtual_size == qemu_img.json(
        "info", "--output=json", clone
    )["virtual-size"]  # fmt: skip


def test_a_clone_is_written_to_and_the_base_is_not(base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    one, two = blocklayer.clone(base, tmp_path / "1", tmp_path / "2")
    with blocklayer.open(one, writable=True) as disk:
        disk.write(100, b"mine")
    with blocklayer.open(two) as disk:
        assert disk.read(0, 65536) == b"a" * 65536
    with blocklayer.open(one) as disk:
        assert disk.read(0, 65536) == (b"a" * 100 + b"mine").ljust(65536, b"a")
    assert base.read_bytes() == before


def test_clones_of_clones_and_of_images_in_use(base: Path, tmp_path: Path) -> None:
    (first,) = blocklayer.clone(base, tmp_path / "1")
    with blocklayer.open(first, writable=True) as disk:
        disk.write(0, b"b" * 512)
        disk.flush()
        (second,) = blocklayer.clone(first, tmp_path / "2", format="qcow2")
    with blocklayer.open(second) as disk:
        assert disk.read(0, 513) == b"b" * 512 + b"a"


def test_relative_names(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    odd = tmp_path / "od:d.qcow2"
    base.rename(odd)
    names = [tmp_path / "x", tmp_path / "a" / "x", tmp_path / "a" / "b" / "x", tmp_path / "a" / "y"]
    blocklayer.clone(odd, *names, relative=True)
    stored = [blocklayer.inspect(name).references[0].name for name in names]
    assert stored == ["./od:d.qcow2", "../od:d.qcow2", "../../od:d.qcow2", "../od:d.qcow2"]
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    with blocklayer.open(moved / "a" / "b" / "x") as disk:
        assert disk.read(0, 1) == b"a"
    moved.rename(tmp_path)


def test_what_exists_is_refused(base: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"taken' exists already.*1 of 3 clones were made"):
        blocklayer.clone(base, tmp_path / "new", taken, tmp_path / "never")
    assert taken.read_bytes() == b"precious"
    assert (tmp_path / "new").exists()
    assert not (tmp_path / "never").exists()
    blocklayer.clone(base, taken, force=True)
    with blocklayer.open(taken) as disk:
        assert disk.read(0, 1) == b"a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2", "new", "taken"]


def test_force_spares_what_it_must(base: Path, tmp_path: Path) -> None:
    (middle,) = blocklayer.clone(base, tmp_path / "middle")
    for target in (base, middle):
        with pytest.raises(UsageError, match="part of the base image"):
            blocklayer.clone(middle, target, force=True)
    with pytest.raises(UsageError, match="no regular file"):
        blocklayer.clone(base, tmp_path, force=True)
    (used,) = blocklayer.clone(base, tmp_path / "used")
    with blocklayer.open(used, writable=True), pytest.raises(LockedError):
        blocklayer.clone(base, used, force=True)


def test_errors_before_anything_is_made(base: Path, tmp_path: Path) -> None:
    for options in (
        {"preallocation": "full"},
        {"cluster_size": 1000},
        {"compat": "0.10", "lazy_refcounts": True},
        {"format": "vdi"},
        {"policy": Policy(probing=False)},
        {"size": "-1"},
    ):
        with pytest.raises(BlockError):
            blocklayer.clone(base, tmp_path / "clone", **options)
    for name in (tmp_path / "no" / "folder", f"{tmp_path}/a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(BlockError, match="Could not create"):
            blocklayer.clone(base, name)
    with pytest.raises(BlockError):
        blocklayer.clone(tmp_path / "missing", tmp_path / "clone")
    with pytest.raises(PolicyError):
        blocklayer.clone(base, tmp_path / "clone", policy=Policy(formats=("raw",)))
    assert [path.name for path in tmp_path.iterdir()] == ["base.qcow2"]


CALLS = ("open", "ftruncate", "pwrite", "fsync", "link", "replace")


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_every_call_failing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool, force: bool
) -> None:
    """Whatever fails, and when: no half of a clone has its name, and nothing is left behind."""
    target = tmp_path / "clone"
    old = b"what was there"
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    with_calls = {name: getattr(os, name) for name in CALLS}
    failed = 0
    for position in range(40):
        if force:
            target.write_bytes(old)
        else:
            target.unlink(missing_ok=True)
        count = [0]

        def failing(
            name: str, *arguments: Any, at: int = position, count: list[int] = count, **named: Any
        ) -> Any:
            count[0] += 1
            if count[0] == at:
                raise OSError(errno.ENOSPC, "no space")
            return with_calls[name](*arguments, **named)

        with monkeypatch.context() as patch:
            from functools import partial

            for name in CALLS:
                patch.setattr(os, name, partial(failing, name))
            try:
                blocklayer.clone(base, target, force=force, sync=True)
            except BlockError:
                failed += 1
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"base.qcow2", "clone"}
        if target.exists() and target.read_bytes() != old:
            with blocklayer.open(target) as disk:
                assert disk.read(0, 1) == b"a"
    assert failed >= 7


@given(
    size=st.integers(0, 1 << 44).map(lambda sectors: sectors & ~511),
    bits=st.integers(9, 21),
    compat=st.sampled_from(["0.10", "1.1"]),
)
@pytest.mark.oracle
def test_any_size(
    tmp_path_factory: pytest.TempPathFactory, size: int, bits: int, compat: str
) -> None:
    from oracles import require

    folder = tmp_path_factory.mktemp("sizes")
    base, clone = folder / "base", folder / "clone"
    blocklayer.create(base, 512, format="raw")
    options = {"format": "raw", "size": size, "cluster_size": 1 << bits, "compat": compat}
    if size > (4 << 20) << (2 * bits - 3):
        with pytest.raises(UsageError, match="too large"):
            blocklayer.clone(base, clone, **options)
        return
    blocklayer.clone(base, clone, **options)
    if clone.stat().st_size < 16 << 20:
        require("qemu-img")("check", "-q", clone)
    assert blocklayer.inspect(clone, content=False).virtual_size == size


def test_the_command(qemu_img: Oracle, base: Path, tmp_path: Path) -> None:
    run = ours(["clone", "base.qcow2", "a", "b"], tmp_path)
    assert (run.code, run.out) == (0, "Made 2 clones of 'base.qcow2'.\n")
    run = ours(
        "clone -q -n 3 --pattern vm-{:03}.img --first 9 -o cluster_size=4k base.qcow2", tmp_path
    )
    assert (run.code, run.out) == (0, "")
    names = sorted(path.name for path in tmp_path.glob("vm-*"))
    assert names == ["vm-009.img", "vm-010.img", "vm-011.img"]
    for name in ("a", "b", *names):
        qemu_img("check", tmp_path / name)
        qemu_img("compare", base, tmp_path / name)
    run = ours(["clone", "base.qcow2", "a"], tmp_path)
    assert run.code == 1
    assert "exists already" in run.err
    assert ours(["clone", "--force", "--sync", "--relative", "base.qcow2", "a"], tmp_path).code == 0
    assert blocklayer.inspect(tmp_path / "a").references[0].name == "base.qcow2"
    assert '"filename": "c"' in ours("clone --output=json base.qcow2 c", tmp_path).out
    assert "cluster_size=<size>" in ours("clone -o help", tmp_path).out
    for wrong in (
        "clone", "clone base.qcow2", "clone -n 2 base.qcow2", "clone -n 2 --pattern x base.qcow2",
        "clone -n 2 --pattern {}{} base.qcow2", "clone -n 2 --pattern {0.real} base.qcow2",
        "clone -n 0 --pattern {} base.qcow2", "clone -n 2 --pattern {} base.qcow2 name",
        "clone -o size=3 base.qcow2 d", "clone -f raw -F vdi base.qcow2 d",
    ):  # fmt: skip
        run = ours(wrong, tmp_path)
        assert run.code == 1, wrong
        assert "internal error" not in run.err
