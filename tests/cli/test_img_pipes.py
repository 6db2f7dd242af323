"""`convert` through real pipes: images to standard output, raw disks from standard input."""

from __future__ import annotations

import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effort import examples
from jobs.folders import create, send
from oracles import HANG_TIMEOUT_S, Oracle

CONVERT = [sys.executable, "-m", "blocklayer.cli.main", "img", "convert"]
MIB = 1 << 20


def converted(line: str, folder: Path, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run our convert, whose standard output is a pipe unless ``more`` says otherwise."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    command = [*CONVERT, *shlex.split(line)]
    return subprocess.run(command, cwd=folder, timeout=HANG_TIMEOUT_S, check=False, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """disk.raw: text, noise, zeros and holes; top.qcow2 over it."""
    chance = random.Random(2)
    with (tmp_path / "disk.raw").open("wb") as file:
        file.write(b"some text\n" * 200_000 + chance.randbytes(700_000) + bytes(600_000))
        file.truncate(12 * MIB)
    create(tmp_path, "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "top.qcow2")
    send(tmp_path, "top.qcow2", "write -P 5 1M 1M", "write -z 0 300k", "write -P 6 9000000 4k")
    return tmp_path


TO_PIPE = """
-O qcow2 top.qcow2
-O qcow2 -c top.qcow2
-O qcow2 -c -o compression_type=zstd --compression-level 5 top.qcow2
-O qcow2 -o cluster_size=4k,compat=0.10 -m 1 top.qcow2
-O qcow2 -S 512 -p top.qcow2
-O qcow2 -S 0 --progress=json top.qcow2
-O qcow2 -B disk.raw -F raw top.qcow2
-O qcow2 -B disk.raw -F raw -c top.qcow2
-O qcow2 -B disk.raw -F raw -o compat=0.10 top.qcow2
-O qcow2 -o backing_file=disk.raw,backing_fmt=raw top.qcow2
-O vmdk top.qcow2
-O raw top.qcow2
top.qcow2
""".strip().splitlines()


@pytest.mark.parametrize("line", TO_PIPE)
def test_to_a_pipe_and_to_a_file(line: str, folder: Path, qemu_img: Oracle) -> None:
    done = converted(f"{line} -", folder)
    assert done.returncode == 0, done.stderr
    assert (b"100.0" in done.stderr) == ("-p" in line)
    format = line.split()[1] if "-O" in line else "raw"
    (folder / "out").write_bytes(done.stdout)
    if format == "qcow2":
        qemu_img("check", "-f", format, "out", cwd=folder)
    qemu_img("compare", "-f", format, "-F", "qcow2", "out", "top.qcow2", cwd=folder)
    with (folder / "file").open("wb") as file:
        assert converted(f"{line} -", folder, stdout=file).returncode == 0
    same = (folder / "file").read_bytes() == done.stdout
    # A VMDK has a number of its own.
    assert same or format == "vmdk"


def test_concatenated_sources(folder: Path, qemu_img: Oracle) -> None:
    (folder / "odd.raw").write_bytes(b"y" * 70_001)
    done = converted("-f raw -O qcow2 odd.raw disk.raw odd.raw -", folder)
    (folder / "out").write_bytes(done.stdout)
    qemu_img("convert", "-f", "raw", "odd.raw", "disk.raw", "odd.raw", "all.raw", cwd=folder)
    qemu_img("check", "-f", "qcow2", "out", cwd=folder)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "out", "all.raw", cwd=folder)


@pytest.mark.parametrize("line", ["-O qcow2", "-O qcow2 -c", "-O raw"])
def test_a_reader_that_leaves(line: str, folder: Path) -> None:
    (folder / "noise.raw").write_bytes(os.urandom(8 * MIB))
    with subprocess.Popen(
        [*CONVERT, *line.split(), "-f", "raw", "noise.raw", "-"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(100_000)) == 100_000
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(HANG_TIMEOUT_S) == 1
    assert "standard output was closed by its reader after " in said
    assert "'standard output' is incomplete" in said
    assert "Traceback" not in said
    assert "Exception" not in said


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_does_not_read(how: int, folder: Path) -> None:
    (folder / "noise.raw").write_bytes(os.urandom(8 * MIB))
    with subprocess.Popen(
        [*CONVERT, "-f", "raw", "noise.raw", "-"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(how)
        said = process.stderr.read().decode()
        assert process.wait(HANG_TIMEOUT_S) == 130
    assert "interrupted: 'standard output' is incomplete" in said
    assert "Traceback" not in said


def test_a_full_disk(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = converted("-O qcow2 top.qcow2 -", folder, stdout=full)
    assert done.returncode == 1
    assert b"standard output after 0 bytes: No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-O qcow2 top.qcow2 - >&-", "standard output is closed"),
        ("-f raw - new.raw <&-", "standard input is closed"),
        ("-O qcow2 -p top.qcow2 new.qcow2 >&-", "standard output is closed"),
    ],
)
def test_closed_streams(line: str, said: str, folder: Path) -> None:
    before = sorted(os.listdir(folder))
    command = f"{shlex.join(CONVERT)} {line}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=folder, stderr=subprocess.PIPE, check=False, text=True
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == before


def test_a_terminal_is_no_place_for_an_image(folder: Path) -> None:
    leader, follower = pty.openpty()
    try:
        done = converted("-O qcow2 top.qcow2 -", folder, stdout=follower)
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 1
    assert b"not written to a terminal" in done.stderr


REFUSED = """
-O vdi top.qcow2 -: cannot be written as a stream
-n -O qcow2 top.qcow2 -: -n cannot be used
-O qcow2 -o preallocation=metadata top.qcow2 -: preallocation=metadata cannot be written
-c -O raw top.qcow2 -: Compression not supported
-c -O qcow2 --compression-level 10 top.qcow2 -: use 1 (the fastest) to 9
-c -O qcow2 --compression-level x top.qcow2 -: Invalid compression level
-O qcow2 --compression-level 2 top.qcow2 -: requires use of -c
-c -O qcow2 --compression-level 10 top.qcow2 new.qcow2: use 1 (the fastest) to 9
-c -O vmdk --compression-level 1 top.qcow2 new.vmdk: not offered for format 'vmdk'
- new.raw: -f raw
-f qcow2 - new.raw: only raw can
-f raw - top.qcow2 new.raw: the one source
-f raw - -: the one source
-f raw -O qcow2 -o backing_file=top.qcow2,backing_fmt=qcow2 - new.qcow2: the one source
-f raw -O vdi - new.vdi: cannot grow
-f raw -O qcow2 -o preallocation=full - new.qcow2: preallocation needs a size
-f raw -n -O qcow2 - small.qcow2: the input is larger than the output file: 'small.qcow2' has 65536
""".strip().splitlines()


@pytest.mark.parametrize("row", REFUSED)
def test_refusals(row: str, folder: Path) -> None:
    line, _, said = row.partition(": ")
    create(folder, "-f", "qcow2", "small.qcow2", "64k")
    before = sorted(os.listdir(folder))
    done = converted(line, folder, input=b"x" * 100_000)
    assert done.returncode == 1
    assert done.stdout == b""
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert sorted(os.listdir(folder)) == before


LENGTHS = st.one_of(
    st.sampled_from((0, 1, 511, 512, 513, 65536, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 5 * MIB)),
    st.integers(0, 300_000),
)


@settings(
    max_examples=examples(6),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    LENGTHS,
    st.sampled_from(
        (
            "-O qcow2",
            "-O qcow2 -c",
            "-O qcow2 -c -o compression_type=zstd",
            "-O qcow2 -o cluster_size=512",
            "-O qcow2 -S 0 -m 1",
            "-O raw",
            "-O raw -S 0",
        )
    ),
    st.integers(0, 1 << 30),
)
def test_from_a_pipe(tmpfs: Path, qemu_img: Oracle, length: int, options: str, seed: int) -> None:
    chance = random.Random(seed)
    parts = [chance.randbytes(40_000), bytes(150_000), b"text" * 20_000]
    data = b"".join(chance.choices(parts, k=length // 40_000 + 1))[:length].ljust(length, b"z")
    with tempfile.TemporaryDirectory(dir=tmpfs) as name:
        folder = Path(name)
        with subprocess.Popen(
            [*CONVERT, *shlex.split(f"-f raw {options} - out")], cwd=folder, stdin=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            step = chance.choice((1000, 65536, 3_000_000)) if length < MIB else 3_000_000
            for at in range(0, length, step):
                process.stdin.write(data[at : at + step])
                process.stdin.flush()
            process.stdin.close()
            assert process.wait(HANG_TIMEOUT_S) == 0
        (folder / "disk.raw").write_bytes(data + bytes(-length % 512))
        format = options.split()[1]
        if format == "qcow2":
            qemu_img("check", "-f", format, "out", cwd=folder)
        info = qemu_img.json("info", "-f", format, "--output=json", "out", cwd=folder)
        assert info["virtual-size"] == length + -length % 512
        qemu_img("compare", "-f", format, "-F", "raw", "out", "disk.raw", cwd=folder)


def test_zeros_of_a_pipe_take_no_room(tmp_path: Path) -> None:
    done = converted("-f raw -O qcow2 - out", tmp_path, input=bytes(64 * MIB))
    assert done.returncode == 0
    assert (tmp_path / "out").stat().st_size < MIB // 2


def test_from_a_file_on_standard_input(folder: Path, qemu_img: Oracle) -> None:
    with (folder / "disk.raw").open("rb") as file:
        done = converted("--progress=json -f raw -O qcow2 - out", folder, stdin=file)
    assert done.returncode == 0
    assert b'"done":2097152,"total":12582912' in done.stderr
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "out", "disk.raw", cwd=folder)


def test_a_pipe_over_what_a_target_held(folder: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    create(folder, "-f", "qcow2", "old.qcow2", "20M")
    send(folder, "old.qcow2", "write -P 3 0 20M")
    data = (folder / "disk.raw").read_bytes()
    assert converted("-f raw -n -O qcow2 - old.qcow2", folder, input=data).returncode == 0
    qemu_img("check", "old.qcow2", cwd=folder)
    said = qemu_io("-c", "read -P 3 12M 8M", "old.qcow2", cwd=folder).stdout
    assert "failed" not in said
    qemu_img("convert", "-O", "raw", "old.qcow2", "old.raw", cwd=folder)
    assert (folder / "old.raw").read_bytes()[: len(data)] == data


def test_an_interrupted_pipe_leaves_no_target(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*CONVERT, "-f", "raw", "-O", "qcow2", "-r", "1M", "-", "out"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(os.urandom(3 * MIB))
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        assert process.wait(HANG_TIMEOUT_S) == 130
    assert "'out' was removed" in said
    assert os.listdir(tmp_path) == []


def test_a_name_of_a_file_called_dash(folder: Path) -> None:
    assert converted("-O raw top.qcow2 ./-", folder).returncode == 0
    assert (folder / "-").stat().st_size == 12 * MIB
