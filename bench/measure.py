"""Running commands and timing them: wall clock, processor time, memory.

1. Two commands that are compared run in turns, so that what else the machine does hits both.
2. A case gives medians: one slow run is an accident, most of them are the result.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

BLK = str(Path(sys.executable).parent / "blk")
IMG = (BLK, "img")
QEMU_IMG = ("qemu-img",)

Command = Sequence[str | Path]


class Sample(NamedTuple):
    """One run, or the medians of several."""

    wall_s: float
    cpu_s: float
    memory_kib: int


def run(command: Command, folder: Path) -> Sample:
    """Run ``command`` once; it must succeed. Our own scripts say themselves how long it took."""
    with tempfile.TemporaryFile() as output:
        return _run(command, folder, output)


def _run(command: Command, folder: Path, output: IO[bytes]) -> Sample:
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started_s
    process.returncode = os.waitstatus_to_exitcode(status)
    output.seek(0)
    if process.returncode:
        said = output.read().decode(errors="replace")
        raise SystemExit(f"{' '.join(map(str, command))}: {said.strip()}")
    if any(part in ("bench.library", "bench.nbd") for part in command):
        wall_s = float(output.read())
    return Sample(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def in_turns(
    commands: Sequence[Command], folder: Path, runs: int, before: Callable[[], None]
) -> list[Sample]:
    """Run each command ``runs`` times, in turns; ``before`` is called before each run."""
    samples: list[list[Sample]] = [[] for _ in commands]
    for _ in range(runs):
        for command, taken in zip(commands, samples, strict=True):
            before()
            taken.append(run(command, folder))
    return [_median(taken) for taken in samples]


def _median(samples: Sequence[Sample]) -> Sample:
    return Sample(
        statistics.median(sample.wall_s for sample in samples),
        statistics.median(sample.cpu_s for sample in samples),
        int(statistics.median(sample.memory_kib for sample in samples)),
    )
