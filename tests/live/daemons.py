"""A running daemon for tests of `blk live`: the real storage daemon, or ours.

Each serves its disks over NBD on a Unix socket: that is the guest's side.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blocklayer.qmp.client import Client
from cli.runs import Outcome, ours
from oracles import HANG_TIMEOUT_S, require

THEIRS = "qemu-storage-daemon"
OURS = "blk daemon"


class Daemon:
    """A daemon's process and the ways to talk to it. ``folder`` has its sockets and images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "qmp.sock"
        self.watching = folder / "watching.sock"
        """A monitor of its own for ``qmp``: the other may be held by who waits for a job."""
        self.nbd = folder / "nbd.sock"

    def uri(self, export: str) -> str:
        """Where a guest reaches a disk."""
        return f"nbd+unix:///{export}?socket={self.nbd}"

    def live(self, *arguments: object, code: int = 0, cwd: Path | None = None) -> str:
        """What ``blk live`` prints; its errors when it is to fail."""
        done = live(self.socket, *arguments, cwd=cwd)
        assert done.code == code, done.out + done.err
        return done.out if code == 0 else done.err

    def result(self, *arguments: object) -> Any:
        """What ``blk live … --output=json`` prints."""
        return json.loads(self.live(*arguments, "--output=json"))

    def qmp(self, command: str, **arguments: Any) -> Any:
        """What a command returns; underscores in names stand for dashes."""

        async def ask() -> Any:
            async with await Client.connect(str(self.watching)) as client:
                return await client.execute(
                    command, {name.replace("_", "-"): v for name, v in arguments.items()}
                )

        return asyncio.run(asyncio.wait_for(ask(), HANG_TIMEOUT_S))

    def io(self, export: str, *commands: str, options: tuple[str, ...] = ()) -> str:
        """Requests of a guest, by the real qemu-io over NBD."""
        steps = [word for command in commands for word in ("-c", command)]
        said = require("qemu-io")(*options, "-f", "raw", *steps, self.uri(export)).stdout
        assert "failed" not in said, said
        return said

    def reads(self, export: str, pattern: int, offset: str, length: str) -> None:
        """The guest finds ``pattern`` there."""
        self.io(export, f"read -P {pattern} {offset} {length}", options=("-r",))


def live(socket: object, *arguments: object, cwd: Path | None = None) -> Outcome:
    """Run ``blk live SOCKET …``."""
    return ours(["live", str(socket), *map(str, arguments)], cwd or Path.cwd(), "blk")


@contextmanager
def running(kind: str, folder: Path, *arguments: str) -> Iterator[Daemon]:
    """A daemon of that kind; ended after the test, and it must end well."""
    daemon = Daemon(folder)
    program = (
        [require(THEIRS).path]
        if kind == THEIRS
        else [sys.executable, "-m", "blocklayer.cli.main", "daemon"]
    )
    ready, write_end = os.pipe()
    pid_file = folder / "pid"
    process = subprocess.Popen(
        [
            *program,
            "--chardev", f"socket,id=c,path={daemon.socket},server=on,wait=off",
            "--monitor", "chardev=c",
            "--chardev", f"socket,id=w,path={daemon.watching},server=on,wait=off",
            "--monitor", "chardev=w",
            "--nbd-server", f"addr.type=unix,addr.path={daemon.nbd}",
            *arguments,
            "--pidfile", str(pid_file),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=(write_end,),
    )  # fmt: skip
    os.close(write_end)
    try:
        # The pid file is written last; the pipe tells of a daemon that ended instead.
        while not pid_file.exists():
            ended, _, _ = select.select([ready], [], [], 0.01)
            if ended:
                said = process.communicate(timeout=HANG_TIMEOUT_S)[0]
                raise AssertionError(f"the daemon did not start: {said}")
        yield daemon
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=HANG_TIMEOUT_S)[0]
        assert process.returncode == 0, said
    finally:
        os.close(ready)
        if process.poll() is None:
            process.kill()
            process.communicate()


def disk_arguments(name: str, path: Path, backing: Sequence[tuple[str, Path]] = ()) -> list[str]:
    """Arguments that open the qcow2 chain ``path`` over ``backing`` (the next first) and serve it.

    The node of the top is called ``name-top``, the export ``name``.
    """
    arguments: list[str] = []
    below: str | None = None
    for node, file in [*reversed(backing), (f"{name}-top", path)]:
        options: dict[str, Any] = {
            "driver": "qcow2", "node-name": node, "backing": below,
            "file": {"driver": "file", "filename": str(file)},
            "read-only": node != f"{name}-top",
        }  # fmt: skip
        if options["read-only"]:
            options["file"]["auto-read-only"] = True
            del options["read-only"]
            options["auto-read-only"] = True
            options["read-only"] = True
        arguments += ["--blockdev", json.dumps(options)]
        below = node
    export = {"type": "nbd", "id": name, "name": name, "node-name": below, "writable": True}
    return [*arguments, "--export", json.dumps(export)]
