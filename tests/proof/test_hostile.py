"""Images made to hurt: a clear error or a valid result, within limits, and nothing else opened.

The work is done in a process with limits of its own (`hostile_worker`), many images each.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from blocklayer.api.disk import Disk
from blocklayer.errors import BlockError
from blocklayer.graph.gate import Policy
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
    "extended L2": ("-o", "cluster_size=16k,extended_l2=on"),
    "data file": ("-o", "cluster_size=512,data_file=image.data"),
    "raw data file": ("-o", "cluster_size=4k,data_file=image.data,data_file_raw=on"),
    "extended L2, data file": ("-o", "cluster_size=16k,extended_l2=on,data_file=image.data"),
}


def base_image(qemu_img: Oracle, qemu_io: Oracle, folder: Path, name: str) -> bytes:
    """A small image with data, zeros, compressed clusters and, if it can have one, a snapshot."""
    path = folder / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *BASES[name], path, "200k", cwd=folder)
    commands = ["write -P 1 0 9k", "write -P 3 150k 3k"]
    if "data file" not in name:
        commands.append("write -c -P 2 64k 64k")
    if name != "version 2":
        commands.append("write -z 20k 16k")
    qemu_io("-f", "qcow2", *(p for c in commands for p in ("-c", c)), path, cwd=folder)
    if name != "narrow" and "data file" not in name:
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
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        # Each thread's arena would take 64 MiB of the limit, used or not.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
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


SECRET = "/etc/passwd"
NAMES = [
    SECRET,
    f"file:{SECRET}",
    "../" * 40 + SECRET[1:],
    "inside/../../../../../../../../../../.." + SECRET,
    "link",
    'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    'json:{"driver":"raw","file.driver":"file","file.filename":"/etc/passwd"}',
    'json:{"file":{"driver":"raw","file":{"driver":"host_device","filename":"/etc/passwd"}}}',
    'json:{"driver":"qcow2","file":"#block001"}',
    'json:{"driver":5,"file":[]}',
    'json:{"file":7}',
    "json:" + "[" * 900,
    "json:" + '{"file":' * 120,
    "json:" + '{"file":' * 60 + '"x"' + "}" * 60,
    "nbd://127.0.0.1:1/disk",
    "unknown:thing",
    "a\nb",
    "x" * 1000,
    "/dev/stdin",
    "/proc/self/mem",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
def test_names_in_images(
    qemu_img: Oracle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    backing_format: str,
) -> None:
    """Where the policy forbids it, what an image names is not opened; all errors are ours."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "link").symlink_to(SECRET)
    image = folder / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64k")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", backing_format, "-b", name, image)
    opened: list[str] = []
    plain = os.open

    def noting(path: str, *arguments: int, **options: int) -> int:
        opened.append(os.path.realpath(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(os, "open", noting)
    for policy in (Policy(references=False), Policy(allow=(str(folder),)), Policy(probing=False)):
        strict = policy.probing
        opened.clear()
        try:
            asyncio.run(read_and_close(image, policy))
        except BlockError as error:
            said = str(error)
        else:
            said = "opened"
            assert not strict, "the policy forbids it"
        assert said
        assert len(said) < 4000
        if strict:
            assert set(opened) <= {str(image)}


async def read_and_close(image: Path, policy: Policy) -> None:
    async with await Disk.open(image, format="qcow2", policy=policy) as disk:
        await disk.read(0, 4096)
