"""Copies that do not reach their end: storage full, Ctrl-C, a polite and an impolite kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.folders import chain, create, send
from oracles import HANG_TIMEOUT_S, Oracle

BLK = [sys.executable, "-m", "blocklayer.cli.main"]
SLOW = ["-r", "1M", "--progress=json"]

COPIES = {
    "convert": ["img", "convert", "-O", "qcow2", "source.raw", "target.qcow2"],
    "compress": ["img", "convert", "-c", "-O", "qcow2", "source.raw", "target.qcow2"],
    "raw": ["img", "convert", "-O", "raw", "source.raw", "target.raw"],
    "dd": ["img", "dd", "-O", "qcow2", "if=source.raw", "of=target.qcow2"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chain(tmp_path)
    send(tmp_path, "top.qcow2", "write -P 11 3M 3M")
    (tmp_path / "source.raw").write_bytes(os.urandom(8 << 20))
    return tmp_path


def run_limited(arguments: list[str], folder: Path, kib: int) -> subprocess.CompletedProcess[str]:
    """Run our program where no file can grow past ``kib``."""
    limited = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "limited", *BLK, *arguments]
    return subprocess.run(
        limited, cwd=folder, capture_output=True, text=True, timeout=HANG_TIMEOUT_S, check=False
    )


def end_halfway(arguments: list[str], folder: Path, with_signal: int) -> tuple[int, str]:
    """Start our program, send it a signal once it has made some progress, and wait for its end."""
    with subprocess.Popen(
        [*BLK, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"done":0,' not in line:
                break
        process.send_signal(with_signal)
        _, said = process.communicate(timeout=HANG_TIMEOUT_S)
        return process.returncode, said


@pytest.mark.parametrize("name", COPIES)
def test_full_storage_leaves_no_target(name: str, folder: Path) -> None:
    before = sorted(os.listdir(folder))
    done = run_limited(COPIES[name], folder, 1000 if name != "raw" else 9000)
    if name == "raw":
        assert done.returncode == 0
        (folder / "target.raw").unlink()
        done = run_limited(COPIES[name], folder, 1000)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "target" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("name", ["convert", "compress", "raw"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_convert_leaves_no_target(name: str, how: int, folder: Path) -> None:
    before = sorted(os.listdir(folder))
    code, said = end_halfway([*COPIES[name], *SLOW], folder, how)
    assert code == 130
    assert "was removed" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(folder)) == before


def test_existing_target_is_left_valid_and_called_incomplete(
    folder: Path, qemu_img: Oracle
) -> None:
    create(folder, "-f", "qcow2", "target.qcow2", "8M")
    code, said = end_halfway([*COPIES["convert"], "-n", *SLOW], folder, signal.SIGINT)
    assert code == 130
    assert "'target.qcow2' is incomplete" in said
    qemu_img("check", folder / "target.qcow2")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_commit_keeps_what_the_top_shows(
    how: int, folder: Path, qemu_img: Oracle
) -> None:
    qemu_img("convert", "top.qcow2", "before.raw", cwd=folder)
    code, said = end_halfway(["img", "commit", *SLOW, "top.qcow2"], folder, how)
    assert code == (-9 if how == signal.SIGKILL else 130)
    assert "Traceback" not in said
    for name in ("base.qcow2", "mid.qcow2", "top.qcow2"):
        # 3: clusters leaked, which a kill may do.
        assert qemu_img("check", name, cwd=folder, check=False).returncode in (0, 3)
    qemu_img("compare", "top.qcow2", "before.raw", cwd=folder)
    subprocess.run([*BLK, "img", "commit", "top.qcow2"], cwd=folder, check=True)
    qemu_img("compare", "top.qcow2", "before.raw", cwd=folder)


def test_commit_without_room_keeps_what_the_top_shows(folder: Path, qemu_img: Oracle) -> None:
    qemu_img("convert", "top.qcow2", "before.raw", cwd=folder)
    done = run_limited(["img", "commit", "top.qcow2"], folder, 3000)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "mid.qcow2" in done.stderr
    for name in ("mid.qcow2", "top.qcow2"):
        assert qemu_img("check", name, cwd=folder, check=False).returncode in (0, 3)
    qemu_img("compare", "top.qcow2", "before.raw", cwd=folder)


def test_rebase_without_room_keeps_the_overlay_as_it_was(folder: Path, qemu_img: Oracle) -> None:
    qemu_img("convert", "top.qcow2", "before.raw", cwd=folder)
    line = ["img", "rebase", "-b", "new.qcow2", "-F", "qcow2", "top.qcow2"]
    done = run_limited(line, folder, (folder / "top.qcow2").stat().st_size // 1024 + 64)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    info = qemu_img.json("info", "--output=json", "top.qcow2", cwd=folder)
    assert info["backing-filename"] == "mid.qcow2"
    assert qemu_img("check", "top.qcow2", cwd=folder, check=False).returncode in (0, 3)
    qemu_img("compare", "top.qcow2", "before.raw", cwd=folder)
    subprocess.run([*BLK, *line], cwd=folder, check=True)
    qemu_img("compare", "top.qcow2", "before.raw", cwd=folder)
