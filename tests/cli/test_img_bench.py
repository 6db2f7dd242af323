"""`blk img bench` beside the real qemu-img: the same lines and errors, the same bytes written."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from blocklayer.api.disk import Disk
from blocklayer.jobs.bench import Load, bench
from cli.runs import Outcome, ours, theirs
from oracles import Oracle

LINES = """
-c 10 -f raw a.raw
-c 10 -U a.qcow2
-c 10 -q a.qcow2
-c 10 -f raw -s 64k -S 128k -d 4 -o 64k a.raw
-c 1000 -d 3 -s 1000 a.qcow2
-c 10 -w -f raw a.raw
-c 10 -w -d 3 a.raw
-c 10 -w -d 2 --flush-interval 5 a.qcow2
-c 10 -w -d 2 --flush-interval 5 --no-drain --pattern 5 a.qcow2
-c 10 -w --flush-interval 0 a.qcow2
-c 10 --no-drain a.qcow2
-c 3 -t none -n a.qcow2
-c 3 -i threads --image-opts driver=qcow2,file.filename=a.qcow2
-c 3 -S 0 a.qcow2
-c 3 -o 1M -f raw a.raw
-s 400k -c 4 -f raw a.raw

a.raw a.raw
nosuch.raw
-c 0 a.raw
-c x a.raw
-c 1k a.raw
-c -1 a.raw
-c 99999999999 a.raw
-d 0 a.raw
-d x a.raw
-s 0 a.raw
-s 4G a.raw
-s x a.raw
-o x a.raw
-o -1 a.raw
-S x a.raw
-S 4G a.raw
--pattern 256 a.raw
--pattern x a.raw
--pattern -1 a.raw
--flush-interval x a.raw
-t nope a.raw
-i nope a.raw
-i native -f raw a.raw
-n -f raw a.raw
-c 10 --flush-interval 5 a.raw
-c 10 -w --flush-interval 5 a.qcow2
--image-opts -f raw a.raw
"""


def told(outcome: Outcome) -> tuple[int, str, str]:
    """Without the time, and without what our message says beyond the real one's."""
    last = outcome.err.splitlines(keepends=True)
    err = last[-1] if "Failed request" in outcome.err else outcome.err
    return outcome.code, re.sub(r"\d+\.\d{3} seconds", "N seconds", outcome.out), err


@pytest.mark.parametrize("line", LINES.strip("\n").splitlines())
def test_same_lines(line: str, images: Path, qemu_img: Oracle) -> None:
    assert told(ours(f"bench {line}", images)) == told(theirs(qemu_img, f"bench {line}", images))


@pytest.mark.parametrize("options", ["", "--flush-interval 8", "--flush-interval 8 --no-drain"])
def test_writes_reach_the_image(options: str, images: Path, qemu_img: Oracle) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", "1M", cwd=images)
    for tool in ("a.qcow2", "other.qcow2"):
        line = f"bench -w --pattern 0x5a -c 26 -d 8 -s 3000 -S 40000 -o 7000 {options} {tool}"
        outcome = ours(line, images) if tool == "a.qcow2" else theirs(qemu_img, line, images)
        assert outcome.code == 0
    qemu_img("check", "a.qcow2", cwd=images)
    qemu_img("compare", "a.qcow2", "other.qcow2", cwd=images)


class Watched:
    """A root that counts what is in flight."""

    def __init__(self, size: int) -> None:
        self.node = self
        self.size = size
        self.now = self.most = self.flushed = 0
        self.flushed_beside: list[int] = []
        self.offsets: list[int] = []

    async def write(self, offset: int, data: memoryview) -> None:
        self.offsets.append(offset)
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(offset % 5 + 2):
            await asyncio.sleep(0)
        self.now -= 1

    async def flush(self) -> None:
        self.flushed += 1
        self.flushed_beside.append(self.now)


@pytest.mark.parametrize("drain", [True, False])
def test_depth_and_drain(drain: bool) -> None:
    root = Watched(1000)
    load = Load(count=100, depth=7, size=1, step=13, pattern=1, flush_interval=20, drain=drain)
    asyncio.run(bench(root, load))  # type: ignore[arg-type]
    assert root.most == 7
    assert sorted(root.offsets) == sorted(number * 13 % 1000 for number in range(100))
    assert root.flushed == 5
    assert any(root.flushed_beside) is not drain


def test_a_failure_ends_the_run(images: Path) -> None:
    async def failing() -> None:
        async with await Disk.open(images / "a.raw", format="raw") as disk:
            with pytest.raises(Exception, match="0x100000"):
                await bench(disk.root, Load(count=50, depth=8, size=512, offset=1 << 20, step=512))

    asyncio.run(failing())
