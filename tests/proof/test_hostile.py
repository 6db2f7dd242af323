"""Images made to hurt: a clear error or a valid result, within limits, and nothing else opened.

The work is done in a process with limits of its own (`hostile_worker`), many images each.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from oracles import Oracle
from proof import hostile, hostile_worker

TIMEOUT_S = 600
IN_CI = 80
"""Cases drawn for each base image in CI; `make soak` runs them all, and noise besides."""

BASES = {
    "plain": ("-o", "cluster_size=512"),
    "version 2": ("-o", "cluster_size=1k,compat=0.10"),
    "wide": ("-o", "cluster_size=4k,refcount_bits=64"),
    "narrow": ("-o", "cluster_size=512,refcount_bits=1"),
    "large clusters": ("-o", "cluster_size=64k,lazy_refcounts=on"),
}


def base_image(qemu_img: Oracle, qemu_io: Oracle, folder: Path, name: str) -> bytes:
    """A small image with data, zeros, compressed clusters and, if it can have one, a snapshot."""
    path = folder / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *BASES[name], path, "200k")
    commands = ["write -P 1 0 9k", "write -c -P 2 64k 64k", "write -P 3 150k 3k"]
    if name != "version 2":
        commands.append("write -z 20k 16k")
    qemu_io("-f", "qcow2", *(p for c in commands for p in ("-c", c)), path)
    if name != "narrow":
        qemu_img("snapshot", "-c", "before", path)
        qemu_io("-f", "qcow2", "-c", "write -P 4 0 2k", path)
    image = path.read_bytes()
    path.unlink()
    return image


def examine(folder: Path, cases: Iterable[hostile.Case]) -> dict[str, list[str]]:
    """Hand the cases to a worker; the answer is what it found wrong, by the name of the case."""
    path = folder / "image.qcow2"
    faults: dict[str, list[str]] = {}
    command = [sys.executable, hostile_worker.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for name, image in cases:
            path.write_bytes(image)
            worker.stdin.write(f"{path}\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                faults[name] = [f"the worker died ({worker.wait()})"]
                break
            found = json.loads(answer)["faults"]
            if found:
                faults[name] = found
                (folder / "faults").mkdir(exist_ok=True)
                (folder / "faults" / f"{len(faults)}.qcow2").write_bytes(image)
    return faults


def report(faults: dict[str, list[str]]) -> str:
    """The faults, the first in full."""
    lines = [f"{len(faults)} cases: " + "; ".join(list(faults)[:40])]
    for name, found in list(faults.items())[:3]:
        lines += [f"--- {name}", *found]
    return "\n".join(lines)


@pytest.mark.parametrize("base", BASES)
def test_tampered_images(qemu_img: Oracle, qemu_io: Oracle, tmpfs: Path, base: str) -> None:
    image = base_image(qemu_img, qemu_io, tmpfs, base)
    cases = list(hostile.all_cases(image))
    drawn = random.Random(base).sample(cases, IN_CI)
    faults = examine(tmpfs, [("untouched", image), *drawn, *hostile.noise(image, 1, 20)])
    assert not faults, report(faults)


@pytest.mark.soak
@pytest.mark.parametrize("base", BASES)
def test_all_tampered_images(qemu_img: Oracle, qemu_io: Oracle, tmpfs: Path, base: str) -> None:
    image = base_image(qemu_img, qemu_io, tmpfs, base)
    faults = examine(tmpfs, [*hostile.all_cases(image), *hostile.noise(image, 2, 3000)])
    assert not faults, report(faults)
