"""`--output=json` of every subcommand: one declaration gives the shape, here and in Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blocklayer.api import results
from blocklayer.api.check import ImageCheck
from blocklayer.api.progress import Progress
from blocklayer.cli.img import COMMANDS
from blocklayer.cli.main import load_command
from blocklayer.graph.dirty_bitmap import BlockDirtyInfo
from blocklayer.graph.driver import Measurement, SnapshotInfo
from cli.runs import ours
from oracles import Oracle

RESULTS: list[tuple[str, type[Any], dict[str, Any]]] = [
    ("create -f qcow2 x.qcow2 1M", results.Created, {"virtual_size": 1 << 20}),
    ("create -f qcow2 -b base.qcow2 -F qcow2 x.qcow2", results.Created, {"format": "qcow2"}),
    ("resize a.qcow2 +1M", results.Resized, {"old_size": 1 << 20, "virtual_size": 2 << 20}),
    ("resize --shrink a.qcow2 -512k", results.Resized, {"virtual_size": 512 << 10}),
    ("convert -O qcow2 base.qcow2 x.qcow2", results.Converted, {"bytes_covered": 1 << 20}),
    ("convert -n base.qcow2 a.raw", results.Converted, {"filename": "a.raw", "format": "raw"}),
    ("dd if=base.qcow2 of=x.raw bs=64k count=2", results.Converted, {"virtual_size": 128 << 10}),
    ("commit top.qcow2", results.Committed, {"base": "mid.qcow2", "emptied": True}),
    ("commit -b base.qcow2 top.qcow2", results.Committed, {"base": "base.qcow2", "emptied": False}),
    (
        "rebase -b base.qcow2 -F qcow2 top.qcow2",
        results.Rebased,
        {"backing_filename": "base.qcow2"},
    ),
    ("rebase -b '' top.qcow2", results.Rebased, {"backing_filename": None}),
    ("rebase -u -b '' top.qcow2", results.Rebased, {"bytes_copied": 0}),
    ("compare a.raw a.qcow2", results.Compared, {"identical": True, "sizes_differ": False}),
    ("snapshot -c x a.qcow2", results.SnapshotChanged, {"action": "create"}),
    ("snapshot -a second snaps.qcow2", results.SnapshotChanged, {"action": "apply"}),
    ("snapshot -d second snaps.qcow2", results.SnapshotChanged, {"action": "delete"}),
    ("snapshot -l snaps.qcow2", list[SnapshotInfo], {}),
    ("snapshot -l a.qcow2", list[SnapshotInfo], {}),
    ("amend -o lazy_refcounts=on a.qcow2", results.Amended, {"options": {"lazy_refcounts": "on"}}),
    ("bench -c 10 -d 2 a.qcow2", results.Benched, {"count": 10, "depth": 2, "write": False}),
    ("bitmap --add a.qcow2 monday", list[BlockDirtyInfo], {}),
    ("check a.qcow2", ImageCheck, {"check_errors": 0}),
    ("measure -O qcow2 --size 1G", Measurement, {"required": 393216}),
]


@pytest.mark.parametrize(("line", "kind", "members"), RESULTS)
def test_results(line: str, kind: type[Any], members: dict[str, Any], images: Path) -> None:
    name, _, rest = line.partition(" ")
    found = ours(f"{name} --output=json {rest}", images)
    assert (found.code, found.err) == (0, "")
    decoded = msgspec.json.decode(found.out, type=kind)
    for name, value in members.items():
        assert getattr(decoded, name) == value
    # Every member that is printed is declared.
    assert msgspec.to_builtins(decoded) == json.loads(found.out)


@pytest.mark.parametrize(
    ("line", "code", "members"),
    [
        ("compare base.qcow2 a.raw", 1, {"identical": False, "difference": "content", "offset": 0}),
        ("compare -s base.qcow2 a.raw", 1, {"difference": "status"}),
        ("compare -s a.raw odd.raw", 1, {"difference": "size", "sizes-differ": True}),
        ("check leak.qcow2", 3, {"leaks": 1}),
    ],
)
def test_results_that_are_no_success(
    line: str, code: int, members: dict[str, Any], images: Path
) -> None:
    found = ours(f"{line} --output=json", images)
    assert found.code == code
    assert members.items() <= json.loads(found.out).items()


def test_every_subcommand_has_json() -> None:
    for place in COMMANDS.values():
        assert "output" in load_command(place).__struct_fields__


@pytest.mark.parametrize(
    "line",
    [
        "convert -O qcow2 base.qcow2 x.qcow2",
        "commit top.qcow2",
        "rebase -b '' top.qcow2",
        "compare a.raw a.qcow2",
        "amend -o lazy_refcounts=on a.qcow2",
        "dd if=base.qcow2 of=x.raw",
        "bench -c 600 a.qcow2",
    ],
)
def test_progress_as_json(line: str, images: Path) -> None:
    silent, found = ours(f"{line} -q", images.parent), ours(f"{line} --progress=json", images)
    assert silent.code != 0
    assert found.code == 0
    reports = msgspec.json.Decoder(Progress).decode_lines(found.err)
    assert reports[-1].done == reports[-1].total
    assert reports[-1].percent == 100.0
    assert "percent" not in found.out


def test_progress_on_request(images: Path) -> None:
    """SIGUSR1: one line on standard error, and the command goes on."""
    (images / "big.raw").write_bytes(os.urandom(8 << 20))
    program = [sys.executable, "-m", "blocklayer.cli.main", "img", "convert", "-r", "2M"]
    with subprocess.Popen(
        [*program, "--progress=json", "big.raw", "x.raw"],
        cwd=images,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"done":0,' not in line:
                break
        process.send_signal(signal.SIGUSR1)
        shown = next(line for line in process.stderr if not line.startswith("{"))
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert shown.startswith("    (")
    assert shown.endswith("/100%)\n")
    assert 0 < float(shown.strip(" (").partition("/")[0]) < 100


def test_signal_without_progress_ends_nothing(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from blocklayer.cli import main\n"
        "from blocklayer.api.disk import Disk\n"
        "before = Disk.resize\n"
        "async def resize(self, *arguments, **options):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    await before(self, *arguments, **options)\n"
        "Disk.resize = resize\n"
        "sys.exit(main.main(['img', 'resize', '-f', 'raw', 'a.raw', '2M'], 'blk'))\n"
    )
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "a.raw").stat().st_size == 2 << 20


def test_examples_of_help_work(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    """Each subcommand's example, in a folder with the images that they are about."""
    for place in COMMANDS.values():
        folder = tmp_path / place.rpartition(":")[2]
        folder.mkdir()
        for name in ("base.qcow2", "new.qcow2", "disk.qcow2"):
            qemu_img("create", "-q", "-f", "qcow2", name, "4M", cwd=folder)
        qemu_img(
            "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2",
            cwd=folder,
        )  # fmt: skip
        (folder / "disk.raw").write_bytes(bytes(4 << 20))
        arguments, meaning = load_command(place).EXAMPLE
        called = place.rpartition(".")[2].partition(":")[0]
        found = ours(f"{called} {arguments}", folder)
        assert meaning
        assert (found.code, found.err) == (0, ""), f"{called} {arguments}"
