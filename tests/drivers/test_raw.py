"""``raw``: windows, what passes through, resizing, creation, and the guard on sector 0."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocklayer.drivers import REGISTRY
from blocklayer.drivers.host import calls
from blocklayer.errors import BlockError, LockedError, StorageError, UnsupportedError, UsageError
from blocklayer.graph import resolve
from blocklayer.graph.create import create_image
from blocklayer.graph.extent import Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.root import Root
from blocklayer.testing.contract import DiskContract, ResizeContract
from drivers.opening import READ, RESIZE, file, take, using
from effort import examples
from oracles import Oracle

KIB = 1024
MAGIC = b"QFI\xfb\0\0\0\3"


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


class WindowTarget:
    """``raw`` from an odd offset on, over a file."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        self.offset = offset

    async def create(self, size: int) -> None:
        self.path.write_bytes(b"" if not size else b"front" * 1000)
        with self.path.open("r+b") as stream:
            stream.truncate(self.offset)
            stream.truncate(self.offset + size)

    async def open(self, *, writable: bool = True) -> Root:
        options = {"driver": "raw", "offset": self.offset, "file": file(self.path)}
        taken = RESIZE if writable else READ
        return await take({**options, "discard": "unmap"}, taken=taken)


class TestWindowOverAFile(DiskContract, ResizeContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> WindowTarget:
        return WindowTarget(tmpfs / "a.raw", 700 * 512)


@given(
    offset=st.integers(0, 4000),
    size=st.none() | st.integers(0, 4000),
    length=st.integers(0, 6) | st.integers(0, 3000),
)
@settings(max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_are_accepted_and_refused_as_by_qemu_img(
    tmp_path: Path, qemu_img: Oracle, offset: int, size: int | None, length: int
) -> None:
    if length <= 6:
        size = None if size is None else size // 512 * 512
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(length))
    given_ = {"offset": offset} | ({} if size is None else {"size": size})
    text = "".join(f",{name}={value}" for name, value in given_.items())
    theirs = qemu_img(
        *("info", "--output=json", "--image-opts"),
        f"driver=raw,file.driver=file,file.filename={path}{text}",
        check=False,
    )

    async def main() -> None:
        options = {"driver": "raw", "file": file(path), **given_}
        if theirs.returncode:
            with pytest.raises(UsageError) as caught:
                async with using(options, taken=READ):
                    pass
            assert str(caught.value) in theirs.stderr.replace("  ", " ")
        else:
            async with using(options, taken=READ) as root:
                assert f'"virtual-size": {root.node.size},' in theirs.stdout

    run(main())


def test_bytes_outside_the_window_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 4096)

    async def main() -> None:
        window = {"driver": "raw", "offset": 1000, "size": 1024, "file": file(path)}
        async with using(window) as root:
            await root.write(0, b"w" * 1024)
            await root.write_zeroes(10, 1000)
            with pytest.raises(StorageError, match="outside"):
                await root.write(1000, b"z" * 100)
            with pytest.raises(UnsupportedError, match="Cannot resize fixed-size raw disks"):
                await root.truncate(2048)

    run(main())
    inside = b"w" * 10 + bytes(1000) + b"w" * 14
    assert path.read_bytes() == b"x" * 1000 + inside + b"x" * (4096 - 2024)


@pytest.mark.skipif(not calls.available, reason="this system does not tell holes")
def test_holes_of_the_storage_show(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    with path.open("wb") as stream:
        stream.truncate(256 * KIB)
        stream.seek(128 * KIB)
        stream.write(b"d" * 64 * KIB)

    async def main() -> None:
        options = {
            "driver": "raw",
            "offset": 64 * KIB,
            "file": {"driver": "raw", "file": file(path)},
        }
        async with using(options, taken=READ) as root:
            found = [run_ async for run_ in resolve.runs(root.node, 0, root.node.size)]
        assert [(r.offset, r.length, r.kind) for r in found] == [
            (0, 64 * KIB, Kind.ZERO),
            (64 * KIB, 64 * KIB, Kind.DATA),
            (128 * KIB, 64 * KIB, Kind.ZERO),
        ]
        assert found[1].host_offset == 128 * KIB

    run(main())


def test_a_read_only_child_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(512))
    options = {"driver": "raw", "file": file(path, **{"read-only": True})}

    async def main() -> None:
        with pytest.raises(LockedError, match="read-only"):
            async with using(options):
                pass
        async with using({**options, "auto-read-only": "on"}, taken=READ, read_only=False) as root:
            assert root.node.read_only

    run(main())


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_creation_gives_what_qemu_img_gives(
    tmp_path: Path, qemu_img: Oracle, preallocation: str
) -> None:
    ours, theirs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    options = {"size": 1_000_000, "preallocation": preallocation}
    run(create_image(Graph(REGISTRY), str(ours), "raw", options))
    given_ = f"preallocation={preallocation}"
    qemu_img("create", "-q", "-f", "raw", "-o", given_, theirs, "1000000")
    assert ours.read_bytes() == theirs.read_bytes() == bytes(1_000_448)
    assert (ours.stat().st_blocks > 100) == (theirs.stat().st_blocks > 100)


def test_a_creation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    options = {"size": KIB, "preallocation": "metadata"}
    with pytest.raises(BlockError, match="Unsupported preallocation mode 'metadata'"):
        run(create_image(Graph(REGISTRY), str(path), "raw", options))
    assert not path.exists()


@pytest.mark.parametrize(
    ("pieces", "format"),
    [
        ([(0, MAGIC + bytes(504))], None),
        ([(0, MAGIC + bytes(504))], "raw"),
        ([(0, b"Q"), (512, b"x" * 512)], None),
        ([(0, b"harmless")], None),
    ],
    ids=["header", "header-named-raw", "first-letter", "harmless"],
)
def test_the_guard_on_sector_0_is_qemu_ios(
    tmp_path: Path, qemu_io: Oracle, pieces: list[tuple[int, bytes]], format: str | None
) -> None:
    """A disk that was only guessed to be raw never becomes one that is guessed to be another."""
    ours, theirs, source = tmp_path / "ours", tmp_path / "theirs", tmp_path / "source"
    refused = []
    for path in (ours, theirs):
        path.write_bytes(bytes(8 * KIB))
    for offset, data in pieces:
        source.write_bytes(data)
        write = f"write -s {source} {offset} {len(data)}"
        done = qemu_io(*(["-f", format] if format else []), "-c", write, theirs, check=False)
        refused.append("Operation not permitted" in done.stdout + done.stderr)

    async def main() -> None:
        async with using(ours, format=format) as root:
            for (offset, data), refuse in zip(pieces, refused, strict=True):
                if refuse:
                    with pytest.raises(StorageError, match="sector 0") as caught:
                        await root.write(offset, data)
                    assert caught.value.errno == errno.EPERM
                else:
                    await root.write(offset, data)

    run(main())
    assert ours.read_bytes() == theirs.read_bytes()
