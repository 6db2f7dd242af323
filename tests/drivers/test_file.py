"""``file`` against a model of bytes, against the real tools, and against a failing host."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from blocklayer.drivers import REGISTRY
from blocklayer.drivers.file import FileCreateOptions, FileDriver, FileOptions
from blocklayer.drivers.host import calls
from blocklayer.errors import (
    LockedError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from blocklayer.graph import resolve
from blocklayer.graph.extent import Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.options import decode
from blocklayer.graph.root import Root
from blocklayer.testing.contract import DiskContract, ResizeContract
from drivers.opening import READ, RESIZE, file, take, using
from oracles import Oracle

KIB = 1024
BLOCK = 4096


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def driver_of(root: Root) -> FileDriver:
    assert isinstance(root.node.driver, FileDriver)
    return root.node.driver


class FileTarget:
    """One file; every opening gives the options named."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.options = options

    async def create(self, size: int) -> None:
        await FileDriver.create(Graph(REGISTRY), str(self.path), FileCreateOptions(size=size))

    async def open(self, *, writable: bool = True) -> Root:
        options = {**file(self.path, **self.options), "discard": "unmap"}
        return await take(options, taken=RESIZE if writable else READ)


class FileContract(DiskContract, ResizeContract):
    granularity: ClassVar[int] = 512


class TestOnDisk(FileContract):
    @pytest.fixture
    def target(self, tmp_path: Path) -> FileTarget:
        return FileTarget(tmp_path / "a.raw")


class TestInMemory(FileContract):
    @pytest.fixture
    def target(self, tmpfs: Path) -> FileTarget:
        return FileTarget(tmpfs / "a.raw")


class TestUnbuffered(FileContract):
    @pytest.fixture
    def target(self, tmp_path: Path) -> FileTarget:
        return FileTarget(tmp_path / "a.raw", cache={"direct": True})


class TestPortably(FileContract):
    """With the seam closed: what other systems run."""

    @pytest.fixture
    def target(self, tmpfs: Path, monkeypatch: pytest.MonkeyPatch) -> FileTarget:
        monkeypatch.setattr(calls, "available", False)
        return FileTarget(tmpfs / "a.raw")


# Opening


@pytest.mark.parametrize(
    ("name", "said", "number"),
    [
        ("missing", "Could not open '{}': No such file or directory", errno.ENOENT),
        ("folder", "'file' driver requires '{}' to be a regular file", errno.EINVAL),
        ("pipe", "'file' driver requires '{}' to be a regular file", errno.EINVAL),
        ("regular/below", "Could not open '{}': Not a directory", errno.ENOTDIR),
        ("nul\0", "Could not open '{}': embedded null byte", errno.EINVAL),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path: Path, name: str, said: str, number: int) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "regular").touch()
    os.mkfifo(tmp_path / "pipe")

    async def main() -> None:
        with pytest.raises(StorageError) as caught:
            async with using(file(tmp_path / name)):
                pass
        assert str(caught.value) == said.format(tmp_path / name)
        assert caught.value.errno == number

    run(main())


def test_a_file_name_is_needed() -> None:
    async def main() -> None:
        with pytest.raises(UsageError, match="The 'file' block driver requires a file name"):
            async with using({"driver": "file"}):
                pass

    run(main())


@pytest.mark.parametrize("option", ["locking", "aio"])
def test_unknown_values_and_options_are_errors(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"'{option}' does not accept value 'maybe'"):
        decode(FileOptions, {option: "maybe"})
    with pytest.raises(UsageError, match="Parameter 'drop-cache' is unexpected"):
        decode(FileOptions, {"drop-cache": "on"})


def test_native_aio_needs_direct(tmp_path: Path) -> None:
    (tmp_path / "a").touch()

    async def main() -> None:
        with pytest.raises(UsageError, match=r"requires cache\.direct=on"):
            async with using(file(tmp_path / "a", aio="native")):
                pass

    run(main())


def test_auto_read_only_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"kept" * 128)
    really = os.open

    def refuse(name: str, mode: int, *more: int) -> int:
        if name == str(path) and mode & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return really(name, mode, *more)

    monkeypatch.setattr(os, "open", refuse)

    async def main() -> None:
        with pytest.raises(StorageError, match="Permission denied") as caught:
            async with using(path, format="raw"):
                pass
        assert caught.value.errno == errno.EACCES
        async with using(
            path, format="raw", taken=READ, read_only=False, auto_read_only=True
        ) as root:
            assert root.node.read_only
            assert await root.read(0, 4) == b"kept"

    run(main())


def test_nothing_stays_open_after_a_failed_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        for name in (tmp_path, tmp_path / "missing"):
            with pytest.raises(StorageError):
                async with using(file(name)):
                    pass

    run(main())
    assert len(os.listdir("/proc/self/fd")) == before


# The last sector


def test_an_odd_tail_is_shown_in_whole_sectors(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    for path in (ours, theirs):
        path.write_bytes(b"o" * 1000)

    async def main() -> None:
        async with using(ours, format="raw") as root:
            assert root.node.size == qemu_img.json("info", "--output=json", theirs)["virtual-size"]
            assert await root.read(990, 34) == b"o" * 10 + bytes(24)
            await root.write(1020, b"end!")
            with pytest.raises(StorageError, match="outside"):
                await root.write(1020, b"ended")

    run(main())
    qemu_io("-f", "raw", "-c", "write -s /dev/stdin 1020 4", theirs, input="end!")
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("size", [1000, BLOCK, 5 * BLOCK + 100])
def test_map_tells_what_qemu_img_tells(tmp_path: Path, qemu_img: Oracle, size: int) -> None:
    path = tmp_path / "a.raw"
    with path.open("wb") as stream:
        stream.truncate(size)
        for block in range(0, size, 2 * BLOCK):
            stream.seek(block)
            stream.write(b"d" * min(100, size - block))
    theirs = [
        (run_["start"], run_["length"], run_["zero"])
        for run_ in qemu_img.json("map", "--output=json", "-f", "raw", path)
    ]

    async def main() -> None:
        async with using(path, format="raw", taken=READ) as root:
            found = resolve.runs(root.node, 0, root.node.size)
            ours = [(r.offset, r.length, r.kind is Kind.ZERO) async for r in found]
        assert ours == theirs

    run(main())


def test_many_maps_of_one_run_ask_the_host_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1024 * KIB))
    asked = []
    really = calls.next_data
    monkeypatch.setattr(calls, "next_data", lambda fd, at: asked.append(at) or really(fd, at))

    async def main() -> None:
        async with using(file(path)) as root:
            for offset in range(0, 1024 * KIB, KIB):
                assert (await driver_of(root).map(offset, KIB)).kind is Kind.DATA
            assert asked == [0]
            await root.discard(0, 64 * KIB)
            assert (await driver_of(root).map(0, 64 * KIB)).kind is Kind.ZERO
            await root.write(0, b"x")
            assert (await driver_of(root).map(0, 1)).kind is Kind.DATA
            await root.truncate(KIB, shrink=True)
            assert (await driver_of(root).map(512, 512)).kind is Kind.DATA
            past = await driver_of(root).map(KIB, 512)
            assert (past.kind, past.length) == (Kind.ZERO, 512)

    run(main())


# Moving bytes


def test_a_read_that_would_wait_goes_to_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"cold" * KIB)
    really = calls.read_at
    threads = set()

    def read_at(fd: int, view: memoryview, offset: int) -> int:
        threads.add(threading.get_ident())
        return really(fd, view, offset)

    def cold_after_a_while(fd: int, view: memoryview, offset: int) -> int | None:
        return really(fd, view[:100], offset) if offset < 300 else None

    monkeypatch.setattr(calls, "read_at_once", cold_after_a_while)

    async def main() -> None:
        async with using(file(path)) as root:
            monkeypatch.setattr(calls, "read_at", read_at)
            assert await root.read(0, 4 * KIB) == b"cold" * KIB

    run(main())
    assert threads
    assert threading.get_ident() not in threads


def test_reads_of_a_file_in_memory_need_no_thread(
    tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmpfs / "a.raw"
    path.write_bytes(b"warm" * KIB)

    async def main() -> None:
        async with using(file(path)) as root:
            await root.read(0, 512)
            monkeypatch.setattr(asyncio, "to_thread", None)
            assert await root.read(0, 4 * KIB) == b"warm" * KIB

    run(main())


def test_short_reads_and_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(8 * KIB))
    write_at, read_at_once = calls.write_at, calls.read_at_once
    monkeypatch.setattr(
        calls, "write_at", lambda fd, buffers, at: write_at(fd, [buffers[0][:100]], at)
    )
    monkeypatch.setattr(calls, "read_at_once", lambda fd, view, at: read_at_once(fd, view[:77], at))
    content = bytes(range(256)) * 16

    async def main() -> None:
        async with using(file(path)) as root:
            pieces = [content[at : at + 150] for at in range(0, len(content), 150)]
            await driver_of(root).write(300, [b"", *pieces])
            assert await root.read(300, len(content)) == content
            monkeypatch.setattr(calls, "write_at", lambda fd, buffers, at: 0)
            with pytest.raises(
                StorageError, match=r"Writing 0x5 bytes at 0x12c of .*a\.raw"
            ) as caught:
                await root.write(300, b"never")
            assert caught.value.errno == errno.EIO

    run(main())


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.touch()

    async def main() -> None:
        async with using(file(path)) as root:
            await driver_of(root).write(0, [bytes([at % 251]) for at in range(5000)])

    run(main())
    assert path.read_bytes() == bytes(at % 251 for at in range(5000))


def test_a_host_that_runs_full_stops_the_write(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        async with using(file(path)) as root:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
            try:
                with pytest.raises(StorageError, match="File too large") as caught:
                    await driver_of(root).write(60 * KIB, [b"x" * 8 * KIB])
                with pytest.raises(StorageError, match="Could not resize"):
                    await root.truncate(128 * KIB, preallocation="full")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert caught.value.errno == errno.EFBIG
            # What fitted was written, and is there; the failed resize left nothing.
            assert path.stat().st_size == root.node.size == 64 * KIB
            assert await root.read(60 * KIB, 4 * KIB) == b"x" * 4 * KIB
            await root.write(0, b"again")

    run(main())


def test_a_failed_flush_ends_writes_and_not_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"data" * 128)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def main() -> None:
        async with using(path, format="raw") as root:
            await root.write(0, b"more")
            with monkeypatch.context() as patch:
                patch.setattr(calls, "flush", fail)
                with pytest.raises(StorageError, match="Flushing"):
                    await root.flush()
            assert await root.read(0, 8) == b"moredata"
            for request in (root.write(0, b"x"), root.flush(), root.truncate(KIB)):
                with pytest.raises(StorageError, match="flushing it failed"):
                    await request

    run(main())


def test_threads_may_use_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.touch()

    async def main() -> None:
        async with using(file(path)) as root:
            access = driver_of(root).thread_safe_io()
            assert access is not None
            await asyncio.gather(
                *(
                    asyncio.to_thread(access.write, at * BLOCK, bytes([at]) * BLOCK)
                    for at in range(64)
                )
            )
            assert root.node.size == 64 * BLOCK
            view = bytearray(2 * BLOCK)
            await asyncio.to_thread(access.read_into, 63 * BLOCK, memoryview(view))
            assert view == bytes([63]) * BLOCK + bytes(BLOCK)

    run(main())


# Zeros, holes, sizes


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroing_reaches_past_the_end(tmp_path: Path, tmpfs: Path, unmap: bool) -> None:
    async def main(path: Path) -> None:
        path.write_bytes(b"x" * 10_000)
        async with using(file(path)) as root:
            await driver_of(root).zero(5000, 100_000, unmap=unmap)
            assert path.stat().st_size == 105_000
            assert root.node.size == 105_472
            assert await root.read(4990, 20) == b"x" * 10 + bytes(10)
            allocated = driver_of(root).actual_size()
            assert allocated <= 16 * KIB if unmap else allocated >= 100_000

    for folder in (tmp_path, tmpfs):
        run(main(folder / "a.raw"))


def test_what_the_file_system_lacks_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 64 * KIB)
    asked: list[str] = []

    def lacking(name: str) -> Any:
        def call(fd: int, offset: int, length: int) -> None:
            asked.append(name)
            raise UnsupportedError(name)

        return call

    monkeypatch.setattr(calls, "punch_hole", lacking("hole"))
    monkeypatch.setattr(calls, "zero_range", lacking("zero"))

    async def main() -> None:
        async with using(file(path)) as root:
            for _ in range(3):
                await root.write_zeroes(0, KIB, unmap=True)
                await root.discard(0, KIB)
            assert await root.read(0, KIB + 1) == bytes(KIB) + b"x"
            with pytest.raises(UnsupportedError):
                await root.write_zeroes(0, KIB, fallback=False)

    run(main())
    # Three ways of zeroing and one of discarding, of which two end in the same call.
    assert sorted(asked) == ["hole", "hole", "hole", "zero"]


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_preallocation(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 1000)

    async def main() -> None:
        async with using(file(path)) as root:
            await root.truncate(1024 * KIB, preallocation=preallocation)
            assert root.node.size == 1024 * KIB
            assert await root.read(990, 20) == b"x" * 10 + bytes(10)
            allocated = driver_of(root).actual_size()
            assert allocated < 64 * KIB if preallocation == "off" else allocated >= 1024 * KIB
            with pytest.raises(UsageError, match="Preallocation can't be used for shrinking"):
                await root.truncate(KIB, preallocation="full", shrink=True)

    run(main())


def test_resizing_refuses_what_would_lose_data(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 2000)

    async def main() -> None:
        async with using(file(path)) as root:
            with pytest.raises(UsageError, match="would lose data"):
                await root.truncate(1999)
            with pytest.raises(UnsupportedError, match="Unsupported preallocation mode 'metadata'"):
                await root.truncate(4096, preallocation="metadata")
            await root.truncate(2000)
            assert path.stat().st_size == 2000

    run(main())


# Creation


def create(path: Path, **options: Any) -> None:
    wanted = decode(FileCreateOptions, options)
    run(FileDriver.create(Graph(REGISTRY), str(path), wanted))


def test_creation_empties_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"old" * 1000)
    create(path, size=1000)
    assert path.read_bytes() == bytes(1024)
    create(path, size="64k", preallocation="falloc", nocow="on", extent_size_hint="0")
    assert path.stat().st_blocks * 512 >= 64 * KIB


def test_creation_spares_a_disk_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"in use" * 512)

    async def main() -> None:
        async with using(file(path), shared=READ):
            with pytest.raises(LockedError, match='Failed to get "write" lock'):
                await FileDriver.create(Graph(REGISTRY), str(path), FileCreateOptions(size=KIB))

    run(main())
    assert path.read_bytes() == b"in use" * 512


def test_creation_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"Could not create '.*/no/a': No such file") as caught:
        create(tmp_path / "no" / "a", size=KIB)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(StorageError, match="Is a directory"):
        create(tmp_path, size=KIB)
    with pytest.raises(UsageError, match="Unsupported preallocation mode 'metadata'"):
        create(tmp_path / "a", size=KIB, preallocation="metadata")

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calls, "allocate", full)
    with pytest.raises(StorageError, match="No space left"):
        create(tmp_path / "a", size=KIB, preallocation="falloc")
    assert list(tmp_path.iterdir()) == []


# Unbuffered access


def test_unbuffered_writes_keep_their_neighbours(tmp_path: Path) -> None:
    """Many small writes at once into shared blocks, beyond the end too; sizes stay exact."""
    path = tmp_path / "a.raw"
    path.touch()
    pieces = [(at * 300, bytes([at + 1]) * 300) for at in range(40)]

    async def main() -> None:
        async with using(file(path, cache={"direct": "on"})) as root:
            write = driver_of(root).write
            await asyncio.gather(*(write(at, [data]) for at, data in pieces))
            await root.flush()

    run(main())
    assert path.read_bytes() == b"".join(data for _, data in pieces)


def test_unbuffered_access_is_refused_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.raw"
    path.touch()
    monkeypatch.setattr(calls, "available", False)

    async def main() -> None:
        with pytest.raises(UnsupportedError, match=r"cache\.direct"):
            async with using(file(path), direct=True):
                pass

    run(main())


def test_unbuffered_zeroing_and_writing_of_one_block(tmp_path: Path) -> None:
    """What was written and what was zeroed, at once, in neighbouring bytes: both hold."""
    path = tmp_path / "a.raw"
    path.write_bytes(b"o" * BLOCK)

    async def main() -> None:
        async with using(file(path, cache={"direct": "on"}, discard="unmap")) as root:
            await asyncio.gather(
                root.write(100, b"n" * 100),
                root.write_zeroes(0, 100, unmap=True),
                root.write_zeroes(200, 100),
                root.write(300, b"n" * 100),
            )
            assert await root.read(0, 500) == (
                bytes(100) + b"n" * 100 + bytes(100) + b"n" * 100 + b"o" * 100
            )

    run(main())


# Devices


def test_character_devices(tmp_path: Path) -> None:
    async def main() -> None:
        async with using("/dev/full", format="raw", taken=READ) as root:
            assert root.node.children["file"].node.driver.NAME == "host_device"
            assert root.node.size == 0
        async with using({"driver": "host_device", "filename": "/dev/full"}) as root:
            with pytest.raises(StorageError, match="No space left") as caught:
                await driver_of(root).write(0, [b"x"])
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(UnsupportedError, match="Cannot grow device"):
                await root.truncate(KIB)
        with pytest.raises(StorageError, match="either a character or block device"):
            async with using({"driver": "host_device", "filename": str(tmp_path)}):
                pass

    run(main())
