"""As OpenStack uses the tool: oslo.utils reads what we print and write, under its limits.

``info`` and ``convert`` run in 1 GiB of address space and 60 seconds of processor time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import blocklayer
from blocklayer import BlockError
from cli.runs import ours
from oracles import Oracle, miss
from untrusted.attacks import ATTACKS, Attack

ADDRESS_SPACE = 1 << 30
PROCESSOR_TIME_S = 60
NAMES = {"vpc": "vhd"}
"""Formats that oslo.utils calls otherwise."""

OURS = {
    "qcow2": ("qcow2", {}),
    "qcow2-v2": ("qcow2", {"compat": "0.10"}),
    "qcow2-small": ("qcow2", {"cluster_size": "512"}),
    "vmdk": ("vmdk", {}),
    "vmdk-stream": ("vmdk", {"subformat": "streamOptimized"}),
    "vhdx": ("vhdx", {}),
    "vpc": ("vpc", {"force_size": "on"}),
    "vdi": ("vdi", {}),
}


@pytest.fixture(scope="module")
def oslo() -> ModuleType:
    """``oslo_utils.imageutils``, which brings ``format_inspector``."""
    if importlib.util.find_spec("oslo_utils") is None:
        miss("oracle oslo.utils is not installed (scripts/setup installs it)")
    importlib.import_module("oslo_utils.imageutils.format_inspector")
    return importlib.import_module("oslo_utils.imageutils")


@pytest.mark.parametrize("name", [*OURS, "raw"])
def test_oslo_parses_our_info(oslo: ModuleType, tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    format, options = OURS.get(name, ("raw", {}))
    blocklayer.create(path, "16M", format=format, **options)
    run = ours(["info", "-f", format, "--output=json", str(path)], tmp_path)
    told = oslo.QemuImgInfo(run.out)
    assert (told.image, told.file_format) == (str(path), format)
    assert told.virtual_size == 16 << 20
    assert told.disk_size == path.stat().st_blocks * 512
    assert told.encrypted is None
    assert told.backing_file is None


def test_oslo_parses_chains_and_snapshots(oslo: ModuleType, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    blocklayer.create(base, "1M")
    blocklayer.create(top, backing=base, backing_format="qcow2", cluster_size="128k")
    with blocklayer.open(top, writable=True) as disk:
        disk.create_snapshot("one")
    told = oslo.QemuImgInfo(ours(["info", "--output=json", str(top)], tmp_path).out)
    assert (told.backing_file, told.backing_file_format) == (str(base), "qcow2")
    assert told.cluster_size == 128 << 10
    assert [snapshot["name"] for snapshot in told.snapshots] == ["one"]
    assert told.format_specific["type"] == "qcow2"


@pytest.mark.parametrize("name", OURS)
def test_oslo_accepts_what_we_write(oslo: ModuleType, tmp_path: Path, name: str) -> None:
    path, raw = tmp_path / "image", tmp_path / "raw"
    raw.write_bytes(os.urandom(1 << 20) + bytes(3 << 20))
    format, options = OURS[name]
    given = ",".join(f"{key}={value}" for key, value in options.items())
    line = ["convert", "-f", "raw", "-O", format, *(["-o", given] if given else [])]
    assert ours([*line, str(raw), str(path)], tmp_path).code == 0
    found = oslo.format_inspector.detect_file_format(str(path))
    assert str(found) == NAMES.get(format, format)
    found.safety_check()
    with blocklayer.open(path) as disk:
        assert found.virtual_size == disk.size
    assert blocklayer.inspect(path).verdict == "clean"


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_both_reject_the_attacks(
    oslo: ModuleType, qemu_img: Oracle, tmp_path: Path, attack: Attack
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    folder = tmp_path / "images"
    folder.mkdir()
    image = attack.make(folder, secret)
    assert blocklayer.inspect(image).verdict == "unsafe"
    if attack.name == "nested":
        # Nobody but us looks into the disk.
        return
    with pytest.raises(
        (oslo.format_inspector.SafetyCheckFailed, oslo.format_inspector.ImageFormatError)
    ):
        oslo.format_inspector.detect_file_format(str(image)).safety_check()


def limited(*line: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run ``blk img`` as OpenStack runs qemu-img: what ``prlimit --as= --cpu=`` does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_TIME_S, PROCESSOR_TIME_S))

    command = [sys.executable, "-m", "blocklayer.cli.main", "img", *line]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        check=False,
        timeout=10 * PROCESSOR_TIME_S,
        preexec_fn=limit,
    )


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB of data of all kinds in 1 GiB."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    noise, text = os.urandom(1 << 20), b"the quick brown fox " * 52429
    with path.open("wb") as file:
        for number in range(32):
            file.seek(number << 25)
            file.write(noise + text[: 1 << 20] + os.urandom(1 << 20))
        file.truncate(1 << 30)
    return path


CONVERTS = (
    ("qcow2", ()),
    ("qcow2", ("-c",)),
    ("qcow2", ("-c", "-o", "compression_type=zstd")),
    ("vmdk", ()),
    ("vmdk", ("-o", "subformat=streamOptimized")),
    ("vhdx", ()),
)


@pytest.mark.parametrize(
    ("format", "options"), CONVERTS, ids=lambda value: "".join(value) or "plain"
)
def test_within_openstacks_limits(
    qemu_img: Oracle, disk: Path, tmp_path: Path, format: str, options: tuple[str, ...]
) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    done = limited(
        "convert", "-f", "raw", "-O", format, *options, str(disk), str(image), cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, b"")
    done = limited("info", "-f", format, "--output=json", str(image), cwd=tmp_path)
    assert json.loads(done.stdout)["virtual-size"] == 1 << 30
    done = limited("convert", "-f", format, "-O", "raw", str(image), str(back), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    qemu_img("compare", "-f", "raw", "-F", "raw", disk, back)


@pytest.mark.parametrize("command", ["info", "convert"])
@pytest.mark.parametrize("given", ["vmdk", "vdi", "vhdx", "vpc", "qcow2"])
def test_a_format_that_is_not_the_files(tmp_path: Path, command: str, given: str) -> None:
    image = tmp_path / "image"
    blocklayer.create(image, "16M", format="vdi" if given == "qcow2" else "qcow2")
    if given == "vpc":
        # Whatever it is, it is not cut short to one either.
        image.write_bytes(image.read_bytes()[:-8])
    line = [command, "-f", given, str(image)]
    line += ["-O", "raw", str(tmp_path / "out")] if command == "convert" else []
    done = limited(*line, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"Could not open" in done.stderr
    assert b"internal error" not in done.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(BlockError, match=f"is not in {given} format"):
        blocklayer.inspect(image, given)
