"""`blk nbd` beside the real qemu-nbd: what it refuses and lists, what clients get, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocklayer.cli.main import main
from nbd.certificates import make_certificates
from oracles import HANG_TIMEOUT_S, Oracle

BLK = [sys.executable, "-m", "blocklayer.cli.main", "nbd"]


def blk(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BLK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_TIMEOUT_S,
    )


@contextmanager
def running(folder: Path, *arguments: str | Path) -> Iterator[str]:
    """`blk nbd --fork` on a socket in `folder`; its URI. It must end well, and tidy up."""
    path, pid = folder / "blk.sock", folder / "blk.pid"
    done = blk("--fork", "--pid-file", pid, "-k", path, *arguments)
    assert done.returncode == 0, done.stderr
    try:
        yield f"nbd+unix:///?socket={path}"
    finally:
        if pid.exists():
            _end(int(pid.read_text()))
    assert not path.exists()
    assert not pid.exists()


def _end(pid: int) -> None:
    watch = os.pidfd_open(pid)
    signal.pidfd_send_signal(watch, signal.SIGTERM)
    _wait(watch)


def _wait(watch: int) -> None:
    import select

    ready, _, _ = select.select([watch], [], [], HANG_TIMEOUT_S)
    assert ready, "it does not end"
    os.close(watch)


REFUSED = [
    "",
    "a b",
    "nonexistent",
    "-e x DISK",
    "-e -1 DISK",
    "--cache=foo DISK",
    "--discard=foo DISK",
    "--aio=foo DISK",
    "--detect-zeroes=foo DISK",
    "--detect-zeroes=unmap DISK",
    "-o x DISK",
    "-L DISK",
    "-L -k /nonexistent",
    "--tls-creds=x DISK",
    "--tls-authz=x DISK",
    "--handshake-limit=x DISK",
    "-n --cache=none DISK",
    "--image-opts -f raw DISK",
    "-f nope DISK",
    "-f qcow2 -k SOCKET -B nope DISK",
    "-f qcow2 -k SOCKET -l nope DISK",
    "-f qcow2 -k SOCKET -o 1000G DISK",
    "-f qcow2 -k /nonexistent/s DISK",
]


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_in_the_same_words(
    tmp_path: Path,
    line: str,
    qemu_img: Oracle,
    qemu_nbd: Oracle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    words = [
        {"DISK": str(disk), "SOCKET": str(tmp_path / "s")}.get(word, word) for word in line.split()
    ]
    theirs = qemu_nbd(*words, check=False)
    assert main(["nbd", *words], "blk") == theirs.returncode == 1
    said = theirs.stderr.replace("qemu-nbd: ", "blk nbd: ").splitlines()
    assert capsys.readouterr().err.splitlines()[0] == said[0]


def test_it_serves_until_its_last_client_has_left(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, nbdinfo: Oracle
) -> None:
    disk = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    with running(tmp_path, "-f", "qcow2", disk) as uri:
        watch = os.pidfd_open(int((tmp_path / "blk.pid").read_text()))
        assert blk("--list", "-k", tmp_path / "blk.sock").returncode == 0
        qemu_io("-f", "raw", "-c", "write -P 5 0 64k", uri)
        _wait(watch)
    qemu_io("-c", "read -P 5 0 64k", disk)
    qemu_img("check", disk)


def test_a_persistent_one_stays(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, qemu_nbd: Oracle
) -> None:
    disk = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    qemu_img("bitmap", "--add", disk, "b0")
    options = ["-t", "-e", "3", "-D", "words", "-A", "-B", "b0", "-f", "qcow2", disk]
    with running(tmp_path, *options) as uri:
        qemu_io("-f", "raw", "-c", "write -P 5 0 64k", uri)
        qemu_io("-f", "raw", "-c", "read -P 5 0 64k", uri)
        theirs = qemu_nbd("--list", "-k", tmp_path / "blk.sock").stdout
        assert blk("--list", "-k", tmp_path / "blk.sock").stdout == theirs
        assert "qemu:dirty-bitmap:b0" in theirs
        assert " multi " in theirs


def test_a_listing_of_the_real_server(tmp_path: Path, qemu_img: Oracle, qemu_nbd: Oracle) -> None:
    disk, path, pid = tmp_path / "a.raw", tmp_path / "s", tmp_path / "pid"
    qemu_img("create", "-q", "-f", "raw", disk, "1M")
    qemu_nbd("--fork", "--pid-file", pid, "-t", "-r", "-x", "n", "-f", "raw", "-k", path, disk)
    try:
        assert blk("-L", "-k", path).stdout == qemu_nbd("-L", "-k", path).stdout
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)


def test_views_of_the_image(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    disk = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "1M")
    qemu_io("-c", "write -P 1 0 1M", disk)
    qemu_img("snapshot", "-c", "old", disk)
    qemu_io("-c", "write -P 2 64k 64k", disk)
    with running(tmp_path, "-t", "-l", "old", "-f", "qcow2", disk) as uri:
        qemu_io("-f", "raw", "-r", "-c", "read -P 1 0 1M", uri)
    with running(tmp_path, "-t", "-o", "64k", "-f", "qcow2", disk) as uri:
        qemu_io("-f", "raw", "-c", "read -P 2 0 64k", "-c", "write -P 3 64k 64k", uri)
        assert qemu_img.json("info", "--output=json", uri)["virtual-size"] == (1 << 20) - 65536
    with running(tmp_path, "-t", "-s", "-f", "qcow2", disk) as uri:
        qemu_io("-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", uri)
    qemu_io(
        *("-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k", "-c", "read -P 3 128k 64k"),
        disk,
    )
    with running(tmp_path, "-t", "-r", "-f", "qcow2", disk) as uri:
        assert qemu_io("-f", "raw", "-c", "write 0 1", uri, check=False).returncode


def test_encrypted_by_objects(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    disk = tmp_path / "a.raw"
    qemu_img("create", "-q", "-f", "raw", disk, "1M")
    folder = make_certificates(tmp_path)
    for identity, admitted in (("O=blocklayer,,CN=tester", True), ("CN=other", False)):
        objects = [
            *("--object", f"tls-creds-x509,id=t,endpoint=server,dir={folder}"),
            *("--object", f"authz-simple,id=z,identity={identity}"),
            *("--tls-creds", "t", "--tls-authz", "z"),
        ]
        with running(tmp_path, "-t", *objects, "-f", "raw", disk):
            done = qemu_io(
                *("--object", f"tls-creds-x509,id=t,endpoint=client,dir={folder}"),
                *("-c", "write -P 7 0 64k", "--image-opts"),
                f"driver=nbd,path={tmp_path / 'blk.sock'},tls-creds=t,tls-hostname=localhost",
                check=False,
            )
            assert (done.returncode == 0) == admitted, done.stderr


def test_a_socket_that_is_handed_over(tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    disk, path = tmp_path / "a.raw", tmp_path / "handed.sock"
    qemu_img("create", "-q", "-f", "raw", disk, "1M")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        command = ["bash", "-c", script, "sh", str(listener.fileno()), *BLK, "-f", "raw", str(disk)]
        server = subprocess.Popen(command, pass_fds=[listener.fileno()])
        try:
            qemu_io("-f", "raw", "-c", "write -P 7 0 64k", f"nbd+unix:///?socket={path}")
            assert server.wait(HANG_TIMEOUT_S) == 0
        finally:
            server.kill()
            server.wait()
    qemu_io("-f", "raw", "-c", "read -P 7 0 64k", disk)


def test_called_qemu_nbd_it_is_one(tmp_path: Path) -> None:
    name = tmp_path / "qemu-nbd"
    name.write_text(
        f"#!{sys.executable}\nimport sys\nfrom blocklayer.cli.main import main\nsys.exit(main())\n"
    )
    name.chmod(0o755)
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
    assert "10.0" in done.stdout
    done = subprocess.run([name], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("qemu-nbd: Invalid number of arguments")
