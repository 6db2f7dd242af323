"""`-T`: which events are told of, where to, and that nothing of it stays."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from blocklayer.cli.trace import EVENTS
from blocklayer.drivers.file import FileDriver
from blocklayer.graph.root import Root
from cli.runs import ours


def test_opening(images: Path) -> None:
    found = ours("-T bdrv_open* info a.qcow2", images)
    assert found.out == ours("info a.qcow2", images).out
    assert re.fullmatch(
        r'(bdrv_open_common node \S+ (filename "a.qcow2" )?format_name "(file|qcow2)"\n)+',
        found.err,
    )


def test_requests(images: Path) -> None:
    line = "-T blk_* -T *zeroes -f raw -c 'read 512 1k' -c 'writev 0 512 512' -c 'write -zu 4k 4k'"
    found = ours(f"{line} a.raw", images, "qemu-io")
    assert re.sub("node [^ ]+", "node N", found.err).splitlines() == [
        "blk_co_preadv node N offset 512 bytes 1024",
        "blk_co_pwritev node N offset 0 bytes 1024",
        "bdrv_co_pwrite_zeroes node N offset 4096 count 4096 flags unmap+fallback",
        "bdrv_co_pwrite_zeroes node N offset 4096 count 4096 flags unmap",
    ]


@pytest.mark.parametrize(("cache", "least", "most"), [("unsafe", 0, 0), ("writethrough", 4, 99)])
def test_what_cache_modes_mean(cache: str, least: int, most: int, images: Path) -> None:
    """How often a copy of four chunks is flushed: never, or after every chunk."""
    (images / "big.raw").write_bytes(b"x" * (8 << 20))
    line = f"-T file_flush,file=trace.txt convert -t {cache} big.raw x.raw"
    assert ours(line, images).code == 0
    flushed = (images / "trace.txt").read_text().count('file_flush filename "x.raw"')
    # Who ignores flushes does not even ask the file.
    assert least <= flushed <= most


def test_bulk_copies_are_seen(images: Path) -> None:
    found = ours("-T file_write convert base.qcow2 x.raw", images)
    moved = [int(number) for number in re.findall(r'"x.raw" offset \d+ bytes (\d+)', found.err)]
    assert sum(moved) >= 64 << 10


def test_patterns_from_a_file(images: Path) -> None:
    (images / "wanted").write_text("# all of the file's\nfile_*\n-file_read\n\n")
    found = ours("-T events=wanted resize -f raw a.raw 2M", images)
    assert {line.partition(" ")[0] for line in found.err.splitlines()} <= EVENTS.keys()
    assert "file_truncate" in found.err
    assert "file_read" not in found.err


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        ("nonsense", "qemu-img: warning: trace event 'nonsense' does not exist\n"),
        ("foo=1", "qemu-img: Invalid parameter 'foo'\n"),
        ("events=gone", "qemu-img: gone: No such file or directory\n"),
        ("blk_*,file=no/such", "qemu-img: no/such: No such file or directory\n"),
    ],
)
def test_what_cannot_be_told(trace: str, said: str, images: Path) -> None:
    found = ours(f"-T {trace} info a.qcow2", images)
    assert found.err == said
    assert found.code == ("warning" not in said)


@pytest.mark.parametrize("called", ["qemu-img", "qemu-io"])
def test_help_lists_all(called: str, images: Path) -> None:
    assert ours("-T help", images, called).out.split() == list(EVENTS)


def test_nothing_stays(images: Path) -> None:
    methods = [Root.read_into, Root.write, FileDriver.read, FileDriver.thread_safe_io]
    assert ours("-T * convert nosuch x.raw", images).code == 1
    assert ours("-T * convert base.qcow2 x.raw", images).code == 0
    assert [Root.read_into, Root.write, FileDriver.read, FileDriver.thread_safe_io] == methods
    assert all(inspect.unwrap(method) is method for method in methods)
