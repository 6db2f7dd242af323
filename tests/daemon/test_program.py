"""`blk daemon` as a process: its options, its clients, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from oracles import HANG_TIMEOUT_S, Oracle
from qmp.conversation import NEGOTIATE, as_bytes

PROGRAM = (sys.executable, "-m", "blocklayer.cli.main", "daemon")


def monitor(path: Path) -> list[str]:
    return ["--chardev", f"socket,id=m,path={path},server=on,wait=off", "--monitor", "m"]


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The daemon with a monitor at `q` in `folder`, ready for clients."""
    ready = folder / "pid"
    command = [*PROGRAM, *monitor(folder / "q"), *options, "--pidfile", str(ready)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
    try:
        deadline = time.monotonic() + HANG_TIMEOUT_S
        while not ready.exists() or not ready.read_text():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
        yield process
    finally:
        process.kill()
        process.communicate()


def ends_with(process: subprocess.Popen[str]) -> int:
    return process.wait(HANG_TIMEOUT_S)


class Talk:
    """A client in plain bytes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(HANG_TIMEOUT_S)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.file.readline()
        self.ask(NEGOTIATE)

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *failure: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(as_bytes(message))

    def ask(self, message: dict[str, Any]) -> Any:
        """The result; events are passed over."""
        self.send(message)
        while True:
            reply = json.loads(self.file.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    def human(self, line: str) -> str:
        arguments = {"command-line": line}
        return str(self.ask({"execute": "human-monitor-command", "arguments": arguments}))


@pytest.fixture
def image(tmp_path: Path, qemu_img: Oracle) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "16M")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    return top


DISK = '{"driver": "qcow2", "node-name": "disk0", "file": {"driver": "file", "filename": "%s"}}'


def test_a_client_of_qemus_own(tmp_path: Path, image: Path) -> None:
    async def converse() -> list[Any]:
        client = QMPClient("test")
        await client.connect(str(tmp_path / "q"))
        try:
            found = await client.execute("query-named-block-nodes", {"flat": True})
            await client.execute("block_resize", {"node-name": "disk0", "size": 32 << 20})
            await client.execute("quit")
            return list(found)
        finally:
            # The daemon has gone first, of which this client complains.
            with contextlib.suppress(EOFError):
                await client.disconnect()

    with running(tmp_path, "--blockdev", DISK % image) as process:
        found = asyncio.run(converse())
        assert ends_with(process) == 0
    assert {node["drv"] for node in found} == {"qcow2", "file"}
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_in_order(
    tmp_path: Path, image: Path, qemu_img: Oracle, qemu_io: Oracle, number: signal.Signals
) -> None:
    """What was written, and a persistent bitmap, are in the image."""
    with running(tmp_path, "--blockdev", DISK % image) as process:
        with Talk(tmp_path / "q") as client:
            bitmap = {"node": "disk0", "name": "b", "persistent": True}
            client.ask({"execute": "block-dirty-bitmap-add", "arguments": bitmap})
            assert "wrote 65536/65536" in client.human('qemu-io disk0 "write -P 7 1M 64k"')
        process.send_signal(number)
        assert ends_with(process) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    qemu_img("check", image)
    qemu_io("-c", "read -P 7 1M 64k", image)
    info = qemu_img.json("info", "--output=json", image)
    assert info["format-specific"]["data"]["bitmaps"][0]["flags"] == ["auto"]


def test_in_the_background(tmp_path: Path, image: Path) -> None:
    pid_file = tmp_path / "pid"
    options = ["--blockdev", DISK % image, *monitor(tmp_path / "q")]
    command = [*PROGRAM, *options, "--pidfile", str(pid_file), "--daemonize"]
    subprocess.run(command, check=True, timeout=HANG_TIMEOUT_S)
    # Ready now, not soon.
    with Talk(tmp_path / "q") as client:
        assert client.ask({"execute": "query-status"})["running"]
        client.ask({"execute": "quit"})
        while client.file.readline():
            pass
    failing = [*PROGRAM, "--blockdev", "driver=nope,node-name=n", "--daemonize"]
    done = subprocess.run(
        failing, check=False, capture_output=True, text=True, timeout=HANG_TIMEOUT_S
    )
    assert done.returncode == 1
    assert "nope" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--blockdev", "driver=qcow2,node-name=n"], "--blockdev driver=qcow2,node-name=n: "),
        (["--blockdev", '{"driver"'], "invalid JSON"),
        (["--blockdev", "driver=null-co"], "'node-name' must be specified"),
        (["--monitor", "nope"], 'chardev "nope" not found'),
        (["--export", "type=nbd,id=e,node-name=n"], "--export"),
        (["--object", "secret,id=s,data=hush,foo=1"], "--object: Parameter 'foo' is unexpected"),
        (["--object", "secret,id=s,data=hush,file=x"], "--object: "),
        (["-device", "virtio-blk-pci,drive=nope"], "can't find value 'nope'"),
        (["-device", "teapot"], "not a valid device model"),
        (["-drive", "file=nope.qcow2"], "nope.qcow2"),
        (["-drive", "if=none,id=d,cache=lots"], "invalid cache option"),
        (["-add-fd", "fd=99,set=1"], "fd=99"),
        (["--pidfile", "/nonexistent/pid"], "cannot create PID file"),
        (["operand"], "Unexpected argument"),
    ],
)
def test_what_cannot_be_set_up(tmp_path: Path, options: list[str], said: str) -> None:
    """One line, exit code 1, nothing left behind, and nothing said of secrets."""
    command = [*PROGRAM, *options]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_TIMEOUT_S,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "hush" not in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_emulators_options(tmp_path: Path, image: Path, qemu_img: Oracle) -> None:
    """Devices come after what they need, wherever they are given; -snapshot keeps images."""
    before = (tmp_path / "base.qcow2").read_bytes()
    options = [
        *("-device", "virtio-blk-pci,drive=d0,id=v0"),
        *("-drive", f"file={image},if=none,id=d0,cache=none,werror=stop"),
        *("-drive", "file=base.qcow2,format=qcow2,if=virtio,snapshot=on"),
        *("-drive", "if=ide,media=cdrom"),
        *("-qmp", f"unix:{tmp_path}/q2,server,nowait"),
        *("-monitor", "none"),
    ]
    with running(tmp_path, *options) as process:
        with Talk(tmp_path / "q2") as client:
            devices = {each["device"]: each for each in client.ask({"execute": "query-block"})}
            assert set(devices) == {"d0", "virtio0", "ide0-cd0"}
            assert devices["d0"]["qdev"] == "/machine/peripheral/v0/virtio-backend"
            assert devices["d0"]["inserted"]["cache"]["direct"]
            assert "inserted" not in devices["ide0-cd0"]
            assert "wrote" in client.human('qemu-io virtio0 "write -P 1 0 64k"')
            assert "d0 (#block" in client.human("info block")
            client.human("snapshot_blkdev d0 over.qcow2 qcow2")
            assert "wrote" in client.human('qemu-io -d v0 "write -P 2 0 64k"')
            assert "chain depth: 2" in client.human("info block d0")
            client.human("commit d0")
        process.send_signal(signal.SIGTERM)
        assert ends_with(process) == 0
    assert (tmp_path / "base.qcow2").read_bytes() == before
    for name in ("over.qcow2", "top.qcow2", "base.qcow2"):
        qemu_img("check", tmp_path / name)
    assert not list(tmp_path.glob("blk-*"))


def test_by_the_original_name(tmp_path: Path) -> None:
    called = tmp_path / "qemu-storage-daemon"
    code = "import sys; from blocklayer.cli.main import main; sys.exit(main())"
    called.write_text(f"#!{sys.executable}\n{code}\n")
    called.chmod(0o755)
    for option, expected in (
        ("--version", r"qemu-storage-daemon version \d+"),
        ("--help", "usage"),
    ):
        done = subprocess.run(
            [called, option], check=False, capture_output=True, text=True, timeout=HANG_TIMEOUT_S
        )
        assert done.returncode == 0
        assert re.search(expected, done.stdout, re.IGNORECASE)


@pytest.mark.parametrize("round", range(3))
def test_killed_while_it_writes(
    tmp_path: Path, image: Path, qemu_img: Oracle, qemu_io: Oracle, round: int
) -> None:
    """What was flushed holds, and the chain is whole."""
    with running(tmp_path, "--blockdev", DISK % image) as process, Talk(tmp_path / "q") as client:
        for number in range(1, 12 + round):
            line = f"qemu-io disk0 write -P {number} {number * 200}k 64k"
            assert "wrote" in client.human(line)
        client.human("qemu-io disk0 flush")
        if round == 1:
            client.human("snapshot_blkdev_internal disk0 s")
        name = {"node-name": "disk0", "snapshot-file": str(tmp_path / "over.qcow2")}
        client.send({"execute": "blockdev-snapshot-sync", "arguments": name})
        if round:
            client.file.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(HANG_TIMEOUT_S)
    for layer in tmp_path.glob("*.qcow2"):
        if layer.stat().st_size:
            result = qemu_img("check", "-U", layer, check=False)
            assert result.returncode in (0, 3), result
    for number in range(1, 12 + round):
        qemu_io("-c", f"read -P {number} {number * 200}k 64k", image)


def test_the_state_outlives_a_killed_daemon(
    tmp_path: Path, image: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    """The next daemon has the graph that snapshots and commands made, by the same options."""
    over = tmp_path / "over.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", over)
    options = ["--state", str(tmp_path / "state"), "--blockdev", DISK % image]
    with running(tmp_path, *options) as process, Talk(tmp_path / "q") as client:
        client.human('qemu-io disk0 "write -P 1 0 64k"')
        client.human("qemu-io disk0 flush")
        overlay = json.loads(DISK % (tmp_path / "over.qcow2"))
        overlay |= {"node-name": "over", "backing": None}
        client.ask({"execute": "blockdev-add", "arguments": overlay})
        nodes = {"node": "disk0", "overlay": "over"}
        client.ask({"execute": "blockdev-snapshot", "arguments": nodes})
        assert "wrote" in client.human('qemu-io over "write -P 2 64k 64k"')
        client.human("qemu-io over flush")
        node = {"driver": "raw", "node-name": "r", "file": "over", "offset": 512}
        client.ask({"execute": "blockdev-add", "arguments": node})
        os.kill(process.pid, signal.SIGKILL)
        process.wait(HANG_TIMEOUT_S)
    (tmp_path / "pid").unlink()
    (tmp_path / "q").unlink()
    with running(tmp_path, *options) as process, Talk(tmp_path / "q") as client:
        found = client.ask({"execute": "query-named-block-nodes"})
        named = {each["node-name"]: each for each in found if each["node-name"][0] != "#"}
        assert set(named) == {"disk0", "over", "r"}
        assert named["over"]["backing_file_depth"] == 2
        assert named["disk0"]["ro"]
        for line in ("read -P 2 64k 64k", "read -P 1 0 64k"):
            said = client.human(f"qemu-io over {line}")
            assert said.startswith("read 65536"), said
        client.ask({"execute": "blockdev-del", "arguments": {"node-name": "r"}})
        client.ask({"execute": "quit"})
        assert ends_with(process) == 0
    state = json.loads((tmp_path / "state").read_text())
    assert [each["node-name"] for each in state["nodes"]] == ["disk0", "over"]
    qemu_io("-c", "read -P 2 64k 64k", tmp_path / "over.qcow2")
