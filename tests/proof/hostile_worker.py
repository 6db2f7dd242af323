"""Opens images that somebody tampered with, under limits; run as a process of its own.

Reads one path a line from standard input, and answers each with a JSON object: what went wrong
that must not go wrong (`faults`), and what was said. The process limits its own memory, so an
allocation that an image talks us into is a fault and not a frozen machine.

1. A plain open, read-only or writable, writes nothing and does not make the file grow.
2. Only errors of ours come out, each in one line or two, whatever is done to the image.
3. Nothing but the image itself is opened: the policy forbids it.
4. No step takes more than `STEP_CPU_S` of processor time, nor waits for `STEP_TIMEOUT_S`.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

MEMORY_ROOM = 256 << 20
"""What one image may make us allocate; the largest legal tables take a quarter of it."""

STEP_CPU_S = 20
STEP_TIMEOUT_S = 120
"""Longer, for it passes while others have the processor, too."""

GROWTH_LIMIT = 8 << 20
READ_LIMIT = 64 * 1024
DIRTY = 1

opened: list[str] = []


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Note every file that is opened, but for the interpreter's own."""
    if event == "open" and isinstance(arguments[0], str):
        path = arguments[0]
        if not path.endswith((".py", ".pyc", ".so")) and not path.startswith("/proc/"):
            opened.append(path)


class Hang(BaseException):
    """A step took too long."""


def on_alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


class Case:
    """One image, and what is found wrong with how we deal with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.said: list[str] = []

    def step(self, name: str, action: Callable[[], Awaitable[Any]]) -> None:
        """Run one step and judge how it ended."""
        from blocklayer.errors import BlockError

        signal.setitimer(signal.ITIMER_PROF, STEP_CPU_S)
        signal.alarm(STEP_TIMEOUT_S)
        try:
            asyncio.run(self._await(action))
            self.said.append(f"{name}: ok")
        except BlockError as error:
            text = str(error)
            self.said.append(f"{name}: {text}")
            if not text.strip() or text.count("\n") > 1 or len(text) > 2000:
                self.faults.append(f"{name}: not a clear error: {text!r}")
        except Hang:
            self.faults.append(f"{name}: took {STEP_CPU_S} s of work or waited {STEP_TIMEOUT_S} s")
        except BaseException:
            self.faults.append(f"{name}: {traceback.format_exc()}")
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            # What an earlier image left in cycles is not this one's doing.
            gc.collect()

    async def _await(self, action: Callable[[], Awaitable[Any]]) -> None:
        await action()

    def unchanged(self, name: str, before: bytes) -> None:
        """A plain open wrote nothing."""
        after = self.path.read_bytes()
        if len(after) > len(before):
            self.faults.append(f"{name}: the file grew from {len(before)} to {len(after)} bytes")
        elif after != before:
            self.faults.append(f"{name}: the file was written to")


def spelled(path: Path) -> str | dict[str, Any]:
    """How to open the image: as it is, or with the data file that lies beside it."""
    data = path.with_suffix(".data")
    if not data.exists():
        return str(path)
    storage = [{"driver": "file", "filename": str(name)} for name in (path, data)]
    return {"driver": "qcow2", "file": storage[0], "data-file": storage[1]}


async def look(path: Path) -> None:
    """Everything that is done to an image without changing it."""
    from blocklayer.api.disk import Disk
    from blocklayer.api.info import image_info
    from blocklayer.graph.gate import Policy

    disk = await Disk.open(spelled(path), policy=Policy(references=False), format="qcow2")
    try:
        image_info(disk.root.node)
        size = disk.size
        for offset in (0, size // 2, max(0, size - READ_LIMIT)):
            try:
                await disk.read(offset, min(READ_LIMIT, size - offset))
            except Exception as error:
                judge(error)
        entries = 0
        async for _ in disk.map():
            entries += 1
            if entries > 5000:
                break
    finally:
        await disk.close()


def judge(error: Exception) -> None:
    """Only errors of ours may come out; with one of them, go on with the next step."""
    from blocklayer.errors import BlockError

    if not isinstance(error, BlockError):
        raise error


async def open_and_close(path: Path, *, writable: bool) -> None:
    """A plain open."""
    from blocklayer.api.disk import Disk
    from blocklayer.graph.gate import Policy

    policy = Policy(references=False)
    await (await Disk.open(spelled(path), policy=policy, writable=writable, format="qcow2")).close()


async def change(path: Path) -> None:
    """Writes of every kind; each may be refused."""
    from blocklayer.api.disk import Disk
    from blocklayer.graph.gate import Policy

    policy = Policy(references=False)
    disk = await Disk.open(spelled(path), policy=policy, writable=True, format="qcow2")
    size = disk.size
    middle = size // 2
    try:
        for change in (
            lambda: disk.write(0, b"a" * min(5000, size)),
            lambda: disk.write(middle, b"b" * min(5000, size - middle)),
            lambda: disk.write_zeroes(0, min(size, 10000), unmap=True),
            lambda: disk.discard(0, min(size, READ_LIMIT)),
            disk.flush,
            lambda: disk.write(max(0, size - 700), b"c" * min(700, size)),
            lambda: disk.read(0, min(size, READ_LIMIT)),
            lambda: disk.resize(size + 4096),
            lambda: disk.resize(size, shrink=True),
            disk.flush,
        ):
            try:
                await change()
            except Exception as error:
                judge(error)
    finally:
        await disk.close()


async def check(path: Path, *repair: str) -> None:
    """`check`, and its repairs."""
    from blocklayer.api.disk import Disk
    from blocklayer.graph.driver import FormatDriver
    from blocklayer.graph.gate import Policy

    disk = await Disk.open(
        spelled(path),
        policy=Policy(references=False),
        writable=bool(repair),
        format="qcow2",
        backing=False,
    )
    try:
        driver = disk.root.node.driver
        assert isinstance(driver, FormatDriver)
        await driver.check(frozenset(repair))
    finally:
        await disk.close()


def examine(path: Path) -> Case:
    """All steps on one image; those that change it come last."""
    case = Case(path)
    before = path.read_bytes()
    dirty = len(before) > 79 and before[79] & DIRTY
    opened.clear()
    case.step("read-only open", lambda: open_and_close(path, writable=False))
    case.unchanged("read-only open", before)
    case.step("look", lambda: look(path))
    case.step("check", lambda: check(path))
    case.unchanged("look and check", before)
    case.step("writable open", lambda: open_and_close(path, writable=True))
    if not dirty and before[88:96] == bytes(8):
        # Autoclear bits are cleared, and a dirty image is repaired: all others stay as they are.
        case.unchanged("writable open", before)
    case.step("change", lambda: change(path))
    if path.stat().st_blocks * 512 > len(before) + GROWTH_LIMIT:
        case.faults.append(f"the file takes {path.stat().st_blocks * 512} bytes")
    path.write_bytes(before)
    case.step("repair", lambda: check(path, "leaks", "errors"))
    # What an entry names past the end is left alone, so that new structures may come after a hole.
    if path.stat().st_blocks * 512 > len(before) + GROWTH_LIMIT:
        case.faults.append(f"repair made the file take {path.stat().st_blocks * 512} bytes")
    path.write_bytes(before)
    own = {os.path.realpath(path), os.path.realpath(path.with_suffix(".data"))}
    strangers = {name for name in opened if os.path.realpath(name) not in own}
    if strangers:
        case.faults.append(f"opened {sorted(strangers)}")
    return case


def main() -> None:
    """Answer each line."""
    for name in ("api.info", "drivers.file", "drivers.qcow2.driver"):
        importlib.import_module(f"blocklayer.{name}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGPROF, on_alarm)
    sys.addaudithook(audit)
    frozen = False
    for line in sys.stdin:
        case = examine(Path(line.rstrip("\n")))
        if not frozen:
            # All modules are loaded by now: `gc.collect`, called after each step, need not walk
            # through them each time.
            gc.freeze()
            frozen = True
        answer = {"path": str(case.path), "faults": case.faults, "said": case.said}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
