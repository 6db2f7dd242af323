"""Long operations from Python: their results, and being called off in every way there is."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import blocklayer
from blocklayer.api.progress import Progress
from blocklayer.api.results import Converted
from jobs.folders import chain, create, send
from oracles import HANG_TIMEOUT_S, Oracle

RATE = 4 << 20
"""Slow enough for a copy of some chunks to be under way when its first report comes."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chain(tmp_path)
    send(tmp_path, "top.qcow2", "write -P 11 3M 3M")
    (tmp_path / "source.raw").write_bytes(os.urandom(8 << 20))
    return tmp_path


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_convert(format: str, folder: Path, qemu_img: Oracle) -> None:
    reports: list[Progress] = []
    found = blocklayer.convert("top.qcow2", folder / "copy", format=format, progress=reports.append)
    assert found.virtual_size == found.bytes_covered == 8 << 20
    assert (found.filename, found.format) == (str(folder / "copy"), format)
    assert (reports[-1].done, reports[-1].total) == (8 << 20, 8 << 20)
    qemu_img("compare", "-F", format, "top.qcow2", "copy")


def test_convert_takes_options_of_the_format(folder: Path, qemu_img: Oracle) -> None:
    blocklayer.convert(["source.raw", "source.raw"], "copy.qcow2", compress=True, cluster_size="4k")
    info = qemu_img.json("info", "--output=json", "copy.qcow2")
    assert (info["cluster-size"], info["virtual-size"]) == (4096, 16 << 20)
    qemu_img("check", "copy.qcow2")


def test_convert_to_an_overlay(folder: Path, qemu_img: Oracle) -> None:
    blocklayer.convert("top.qcow2", "copy.qcow2", backing="mid.qcow2", backing_format="qcow2")
    qemu_img("compare", "top.qcow2", "copy.qcow2")
    with pytest.raises(blocklayer.BlockError, match="one source"):
        blocklayer.convert(["a", "b"], "c", backing="mid.qcow2", backing_format="qcow2")


@pytest.mark.parametrize("target", ["source.raw", "mid.qcow2"])
def test_a_source_is_never_the_target(target: str, folder: Path) -> None:
    before = (folder / target).read_bytes()
    source = "top.qcow2" if target == "mid.qcow2" else target
    with pytest.raises(blocklayer.BlockError, match="is read by this command"):
        blocklayer.convert(source, target)
    assert (folder / target).read_bytes() == before


def test_commit(folder: Path, qemu_img: Oracle) -> None:
    qemu_img("convert", "top.qcow2", "before.raw")
    found = blocklayer.commit("top.qcow2")
    assert (found.base, found.emptied, found.virtual_size) == ("mid.qcow2", True, 8 << 20)
    assert found.bytes_committed >= 3 << 20
    qemu_img("compare", "mid.qcow2", "before.raw")
    kept = blocklayer.commit("top.qcow2", base="base.qcow2")
    assert (kept.base, kept.emptied) == ("base.qcow2", False)
    qemu_img("compare", "base.qcow2", "before.raw")
    with pytest.raises(blocklayer.BlockError, match="Did not find"):
        blocklayer.commit("top.qcow2", base="gone.qcow2")


def test_rebase(folder: Path, qemu_img: Oracle) -> None:
    qemu_img("convert", "top.qcow2", "before.raw")
    found = blocklayer.rebase("top.qcow2", "new.qcow2", backing_format="qcow2")
    assert (found.backing_filename, found.backing_filename_format) == ("new.qcow2", "qcow2")
    assert found.bytes_copied > 0
    qemu_img("compare", "top.qcow2", "before.raw")
    assert blocklayer.rebase("top.qcow2", None).backing_filename is None
    qemu_img("compare", "top.qcow2", "before.raw")
    unsafe = blocklayer.rebase("top.qcow2", "gone", backing_format="raw", unsafe=True)
    assert unsafe.bytes_copied == 0


def test_compare(folder: Path) -> None:
    assert blocklayer.compare("top.qcow2", "top.qcow2").identical
    found = blocklayer.compare("base.qcow2", "mid.qcow2")
    assert (found.identical, found.difference, found.sizes_differ) == (False, "content", True)
    assert found.offset == 512 << 10
    assert blocklayer.compare("base.qcow2", "mid.qcow2", strict=True).difference == "size"


def test_disks_tell_of_themselves(folder: Path, qemu_img: Oracle) -> None:
    with blocklayer.open("mid.qcow2") as disk:
        assert disk.info().backing_filename == "base.qcow2"
        assert disk.info().limits is None
        assert disk.info(limits=True).limits is not None
        assert disk.check().corruptions == 0
        sizes = qemu_img.json("measure", "-O", "qcow2", "--output=json", "mid.qcow2")
        assert disk.measure("qcow2").required == sizes["required"]
        with pytest.raises(blocklayer.BlockError, match="Invalid repair"):
            disk.check(repair="most")
    with blocklayer.open("mid.qcow2", writable=True) as disk:
        disk.amend(lazy_refcounts="on")
    info = qemu_img.json("info", "--output=json", "mid.qcow2")
    assert info["format-specific"]["data"]["lazy-refcounts"]


Operation = Callable[..., Any]

OPERATIONS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "convert": ("convert", ("source.raw", "copy.qcow2"), {"rate": RATE}),
    "compressed": ("convert", ("source.raw", "copy.qcow2"), {"rate": RATE, "compress": True}),
    "commit": ("commit", ("top.qcow2",), {"rate": RATE}),
    "rebase": ("rebase", ("top.qcow2", "new.qcow2"), {"backing_format": "qcow2"}),
    "compare": ("compare", ("top.qcow2", "before.raw"), {}),
}


def assert_nothing_lost(folder: Path, before: list[str], qemu_img: Oracle) -> None:
    """The state that every operation promises when it is called off."""
    assert sorted(os.listdir(folder)) == before
    for name in ("base.qcow2", "mid.qcow2", "top.qcow2"):
        qemu_img("check", name)
    qemu_img("compare", "top.qcow2", "before.raw")
    assert qemu_img.json("info", "--output=json", "top.qcow2")["backing-filename"] == "mid.qcow2"


@pytest.mark.parametrize("name", OPERATIONS)
def test_called_off_by_a_token(name: str, folder: Path, qemu_img: Oracle) -> None:
    function, arguments, options = OPERATIONS[name]
    qemu_img("convert", "top.qcow2", "before.raw")
    before, token = sorted(os.listdir(folder)), blocklayer.Cancellation()
    reports: list[Progress] = []

    def stop(report: Progress) -> None:
        reports.append(report)
        token.cancel()

    with pytest.raises(blocklayer.CancelledError):
        getattr(blocklayer, function)(*arguments, **options, progress=stop, cancel=token)
    assert reports
    assert_nothing_lost(folder, before, qemu_img)
    # The token stays used up; without it all goes well.
    with pytest.raises(blocklayer.CancelledError):
        getattr(blocklayer, function)(*arguments, **options, cancel=token)
    assert_nothing_lost(folder, before, qemu_img)
    getattr(blocklayer, function)(
        *arguments, **{**options, "rate": 0} if "rate" in options else options
    )
    qemu_img("compare", "top.qcow2", "before.raw")


@pytest.mark.parametrize("name", OPERATIONS)
def test_called_off_as_a_task(name: str, folder: Path, qemu_img: Oracle) -> None:
    function, arguments, options = OPERATIONS[name]
    qemu_img("convert", "top.qcow2", "before.raw")
    before = sorted(os.listdir(folder))

    async def cancel() -> None:
        begun = asyncio.Event()
        work = getattr(blocklayer.aio, function)(
            *arguments, **options, progress=lambda report: begun.set()
        )
        task = asyncio.create_task(work)
        waiting = asyncio.create_task(begun.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        # What ends with its first report has ended: there is nothing to call off.
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_nothing_lost(folder, before, qemu_img)

    asyncio.run(cancel())


def test_called_off_from_another_thread(folder: Path) -> None:
    token, begun = blocklayer.Cancellation(), threading.Event()
    other = threading.Thread(target=lambda: (begun.wait(), token.cancel()))
    other.start()
    with pytest.raises(blocklayer.CancelledError):
        blocklayer.convert(
            "source.raw", "copy.raw", format="raw", rate=RATE, cancel=token,
            progress=lambda report: begun.set(),
        )  # fmt: skip
    other.join()
    assert not (folder / "copy.raw").exists()


def test_interrupted_by_control_c(folder: Path) -> None:
    """The target is gone, and the caller gets what Ctrl-C always gives."""
    script = (
        "import os, signal, blocklayer\n"
        "stop = lambda report: os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        f"    blocklayer.convert('source.raw', 'copy.qcow2', rate={RATE}, progress=stop)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', os.path.exists('copy.qcow2'))\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "print(blocklayer.convert('source.raw', 'copy.qcow2').virtual_size)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_TIMEOUT_S,
    )
    assert done.stderr == ""
    assert done.stdout == "interrupted False\nTrue\n8388608\n"


def test_a_handler_of_the_program_is_left_alone(folder: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        found = blocklayer.convert(
            "source.raw", "copy.raw", format="raw",
            progress=lambda report: seen or signal.raise_signal(signal.SIGINT),
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
    assert isinstance(found, Converted)


def test_failure_leaves_no_target(folder: Path) -> None:
    create(folder, "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "over.qcow2")
    with (folder / "base.qcow2").open("r+b") as file:
        file.truncate(200 << 10)
        file.seek(4 << 16)
    before = sorted(os.listdir(folder))
    with pytest.raises(blocklayer.BlockError):
        blocklayer.convert("over.qcow2", "copy.raw", format="nonsense")
    assert sorted(os.listdir(folder)) == before
