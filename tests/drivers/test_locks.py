"""Locks: the same bytes as the real tools, and mutual respect in both directions.

A real qemu-io holds the image by waiting for commands; that it has it open is known from its
prompt. The locks held are read from where the kernel lists them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blocklayer.drivers.host import calls
from blocklayer.errors import LockedError, UnsupportedError
from blocklayer.graph.permission import Permission
from drivers.opening import READ, RESIZE, WRITE, file, using
from oracles import HANG_TIMEOUT_S, Oracle

PROMPT = b"qemu-io> "
SIZE = 1 << 20


@contextmanager
def held_by(qemu_io: Oracle, *arguments: str | Path) -> Iterator[None]:
    """A real qemu-io has the image open meanwhile."""
    command = [qemu_io.path, *map(os.fspath, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.read(len(PROMPT)) == PROMPT
            yield
        finally:
            process.stdin.close()
            process.stdout.read()
            assert process.wait(HANG_TIMEOUT_S) == 0


def locked_bytes(path: Path) -> set[int]:
    """The bytes of the file that anybody holds a lock on."""
    inode = path.stat().st_ino
    held: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "->" not in fields and fields[5].endswith(f":{inode}"):
            held |= set(range(int(fields[6]), int(fields[7]) + 1))
    return held


@pytest.fixture
def images(tmp_path: Path, qemu_img: Oracle) -> Path:
    """``disk.raw``, ``base.qcow2``, and ``top.qcow2`` over it."""
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    return tmp_path


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["writable", "read-only", "shared"])
def test_the_bytes_are_those_of_qemu_io(
    images: Path, qemu_io: Oracle, format: str, mode: str
) -> None:
    top, below = ("disk.raw", "disk.raw") if format == "raw" else ("top.qcow2", "base.qcow2")
    arguments = {"writable": [], "read-only": ["-r"], "shared": ["-r", "-U"]}[mode]
    with held_by(qemu_io, *arguments, "-f", format, images / top):
        theirs = [locked_bytes(images / name) for name in (top, below)]

    async def main() -> None:
        # What qemu-io takes: it resizes only while a command does.
        taken = WRITE if mode == "writable" else READ
        shared = mode == "shared"
        async with using(images / top, format=format, taken=taken, force_share=shared):
            assert [locked_bytes(images / name) for name in (top, below)] == theirs

    run(main())
    assert locked_bytes(images / top) == set()


@pytest.mark.parametrize("window", [{"offset": 512}, {"size": 512}])
def test_a_raw_window_locks_like_qemu_io(
    images: Path, qemu_io: Oracle, window: dict[str, int]
) -> None:
    path = images / "disk.raw"
    option = ",".join(f"{name}={value}" for name, value in window.items())
    with held_by(qemu_io, "--image-opts", f"driver=raw,file.filename={path},{option}"):
        theirs = locked_bytes(path)

    async def main() -> None:
        async with using({"driver": "raw", "file": file(path), **window}, taken=WRITE):
            assert locked_bytes(path) == theirs

    run(main())


def test_a_real_qemu_keeps_us_out(images: Path, qemu_io: Oracle) -> None:
    path = images / "base.qcow2"

    async def attempt(said: str, **how: Any) -> None:
        with pytest.raises(LockedError) as caught:
            async with using(path, format="qcow2", **how):
                pass
        assert str(caught.value).startswith(f"{said} lock")
        assert f"Is another process using the image [{path}]?" in str(caught.value)

    async def main() -> None:
        await attempt('Failed to get "write"')
        await attempt('Failed to get shared "write"', taken=READ)
        async with using(path, format="qcow2", taken=READ, force_share=True) as root:
            assert await root.read(0, 512) == bytes(512)
        unlocked = {"driver": "qcow2", "file": file(path, locking="off")}
        async with using(unlocked, taken=READ) as root:
            assert await root.read(0, 512) == bytes(512)

    with held_by(qemu_io, "-f", "qcow2", path):
        run(main())


def test_a_real_qemu_that_only_reads_lets_us_read(images: Path, qemu_io: Oracle) -> None:
    path = images / "base.qcow2"

    async def main() -> None:
        async with using(path, format="qcow2", taken=READ):
            pass
        with pytest.raises(LockedError, match='Failed to get "write" lock'):
            async with using(path, format="qcow2"):
                pass

    with held_by(qemu_io, "-r", "-f", "qcow2", path):
        run(main())


def test_we_keep_a_real_qemu_out(images: Path, qemu_io: Oracle, qemu_img: Oracle) -> None:
    path = images / "base.qcow2"
    refused = f"Is another process using the image [{path}]?"

    async def main() -> None:
        async with using(path, format="qcow2"):
            for tool, arguments, said in (
                (qemu_io, ["-f", "qcow2", "-c", "write 0 512"], 'Failed to get "write" lock'),
                (qemu_img, ["info"], 'Failed to get shared "write" lock'),
                (qemu_img, ["resize"], 'Failed to get "write" lock'),
            ):
                last = ["2M"] if arguments == ["resize"] else []
                done = tool(*arguments, path, *last, check=False)
                assert done.returncode != 0
                assert said in done.stdout + done.stderr
                assert refused in done.stdout + done.stderr
            qemu_img("info", "-U", path)
        qemu_img("info", path)

    run(main())


@pytest.mark.parametrize("resizing", [False, True])
def test_raw_is_shared_as_qemu_shares_it(
    images: Path, qemu_io: Oracle, qemu_img: Oracle, resizing: bool
) -> None:
    """Two writers of one raw file are let in: it is their users who share it or do not."""
    path = images / "disk.raw"

    async def main() -> None:
        async with using(path, format="raw", taken=RESIZE if resizing else WRITE) as root:
            qemu_io("-f", "raw", "-c", "write -P 7 0 512", path)
            assert await root.read(0, 512) == b"\7" * 512
        async with using(path, format="raw", shared=READ):
            done = qemu_io("-f", "raw", "-c", "write 0 512", path, check=False)
            assert 'Failed to get "write" lock' in done.stdout + done.stderr
        async with using({"driver": "raw", "size": 512, "file": file(path)}):
            done = qemu_img("resize", "-f", "raw", path, "2M", check=False)
            assert 'Failed to get "resize" lock' in done.stderr

    run(main())


def test_a_refused_change_changes_nothing(images: Path) -> None:
    path = images / "disk.raw"

    async def main() -> None:
        async with using(path, format="raw", taken=READ, shared=READ) as first:
            before = locked_bytes(path)
            with pytest.raises(LockedError):
                async with using(path, format="raw", taken=WRITE):
                    pass
            assert locked_bytes(path) == before
            assert await first.read(0, 512) == bytes(512)
        async with using(path, format="raw", taken=WRITE):
            pass

    run(main())


def test_locks_follow_the_users_of_one_node(images: Path) -> None:
    path = images / "disk.raw"

    async def main() -> None:
        async with using(file(path), taken=READ, read_only=False) as reader:
            assert locked_bytes(path) == {100}
            graph = reader.graph
            from blocklayer.graph.root import Root

            writer = Root(reader.node, "a writer", RESIZE, Permission.ALL & ~Permission.RESIZE)
            assert locked_bytes(path) == {100, 101, 103, 203}
            await writer.close()
            assert graph.roots == [reader]
            assert locked_bytes(path) == {100}

    run(main())


def test_locking_on_is_refused_where_it_cannot_be_had(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "available", False)
    path = images / "disk.raw"

    async def main() -> None:
        with pytest.raises(UnsupportedError, match="cannot be locked here"):
            async with using(file(path, locking="on")):
                pass
        async with using(file(path, locking="auto")):
            assert locked_bytes(path) == set()

    run(main())
