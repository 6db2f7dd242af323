"""The contract tests on our own drivers: storage, raw windows on it, qcow2 of several shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from blocklayer.api.disk import create
from blocklayer.drivers import REGISTRY
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.testing.contract import DiskContract, FormatContract, ResizeContract
from proof.crashes import new_image, raw_disk
from proof.crashes import take as open_crashing


async def take(image: str | dict[str, Any], *, writable: bool, **arguments: Any) -> Root:
    """Open an image on a graph of its own, and take hold of it."""
    flags = Flags(read_only=not writable, discard_unmap=True)
    graph = Graph(REGISTRY)
    node = await open_image(graph, image, flags=flags, **arguments)
    taken = int(Permission.CONSISTENT_READ)
    if writable:
        taken |= Permission.WRITE | Permission.RESIZE
    return Root(node, "a test", taken)


class MemoryTarget:
    """Options of a node over, or made of, memory; `{size}` stands for the disk's size."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.size = 0

    async def create(self, size: int) -> None:
        self.size = size

    async def open(self, *, writable: bool = True) -> Root:
        options = {"driver": "memory", "size": self.size, **self.options}
        if options["driver"] == "raw":
            window = options.get("offset", 0)
            options["file"] = {"driver": "memory", "size": window + self.size + window}
            if not window:
                del options["size"]
        return await take(options, writable=writable)


class TestMemory(DiskContract, ResizeContract):
    persistent: ClassVar[bool] = False

    @pytest.fixture
    def target(self) -> MemoryTarget:
        return MemoryTarget()


class TestRaw(DiskContract, ResizeContract):
    persistent: ClassVar[bool] = False

    @pytest.fixture
    def target(self) -> MemoryTarget:
        return MemoryTarget(driver="raw")


class TestRawWindow(DiskContract):
    persistent: ClassVar[bool] = False
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self) -> MemoryTarget:
        return MemoryTarget(driver="raw", offset=1536)


class FileTarget:
    """A file, as a protocol node."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def create(self, size: int) -> None:
        self.path.write_bytes(bytes(size))

    async def open(self, *, writable: bool = True) -> Root:
        return await take({"driver": "file", "filename": str(self.path)}, writable=writable)


class TestFile(DiskContract, ResizeContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> FileTarget:
        return FileTarget(tmpfs / "disk")


class Qcow2Target:
    """Files made with the given options of `-o`, over a base image if one is named."""

    def __init__(self, folder: Path, opening: dict[str, Any], **options: Any) -> None:
        self.path = folder / "disk.qcow2"
        self.opening = opening
        self.options = options
        self.base: Path | None = None

    async def create(self, size: int) -> None:
        self.path.unlink(missing_ok=True)
        base = None if self.base is None else {"backing": self.base, "backing_format": "raw"}
        await create(self.path, size, **(base or {}), **self.options)

    async def open(self, *, writable: bool = True) -> Root:
        file = {"driver": "file", "filename": str(self.path)}
        options = {"driver": "qcow2", "file": file, **self.opening}
        return await take(options, writable=writable)


LITTLE_CACHE = {"l2-cache-size": 1024, "refcount-cache-size": 2048, "l2-cache-entry-size": 512}


class TestQcow2(FormatContract, ResizeContract):
    cluster_size: ClassVar[int] = 512
    granularity: ClassVar[int] = 512
    kinds: ClassVar[tuple[str, ...]] = (*DiskContract.kinds, "compress")

    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {}, cluster_size=512)


class TestQcow2LittleCache(TestQcow2):
    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, LITTLE_CACHE, cluster_size=512)


class TestQcow2Version2(TestQcow2):
    cluster_size: ClassVar[int] = 1024

    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {}, cluster_size=1024, compat="0.10")


class TestQcow2LazyRefcounts(TestQcow2):
    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {}, cluster_size=512, lazy_refcounts=True, refcount_bits=64)


class TestQcow2DiscardsKeepSpace(TestQcow2):
    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {"discard-no-unref": True}, cluster_size=512)


class TestQcow2LargeClusters(TestQcow2):
    cluster_size: ClassVar[int] = 16384

    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {}, cluster_size=16384)


class TestQcow2ExtendedL2(TestQcow2):
    cluster_size: ClassVar[int] = 16384

    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        target = Qcow2Target(tmpfs, LITTLE_CACHE, cluster_size=16384, extended_l2=True)
        target.base = tmpfs / "base.raw"
        target.base.write_bytes(bytes(3 * 16384 + 512))
        return target


class TestQcow2ExtendedL2Preallocated(TestQcow2ExtendedL2):
    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        options = {"cluster_size": 16384, "extended_l2": True, "preallocation": "metadata"}
        return Qcow2Target(tmpfs, {}, **options)


class TestQcow2Preallocated(TestQcow2):
    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        return Qcow2Target(tmpfs, {}, cluster_size=512, preallocation="metadata")


class TestQcow2OverZeros(TestQcow2):
    """The backing file ends inside the disk; it holds zeros that only a read can find."""

    @pytest.fixture
    def target(self, tmpfs: Path) -> Qcow2Target:
        target = Qcow2Target(tmpfs, {}, cluster_size=512)
        target.base = tmpfs / "base.raw"
        target.base.write_bytes(bytes(20 * 512 + 512))
        return target


class InterleavingTarget:
    """A disk whose every request lets others run first: whatever can race, does."""

    def __init__(self, opening: dict[str, Any], *, overlay: bool = False, **options: Any) -> None:
        self.opening = opening
        self.overlay = overlay
        self.options = options

    async def create(self, size: int) -> None:
        self.base = None
        if self.overlay:
            self.base = raw_disk(bytes(size // 2 // 512 * 512 + 512))
        self.disk = await new_image(size, base=self.base, **self.options)
        self.disk.concurrent = True

    async def open(self, *, writable: bool = True) -> Root:
        return await open_crashing(self.disk, writable=writable, **self.opening)


class TestQcow2Interleaved(TestQcow2):
    @pytest.fixture
    def target(self) -> InterleavingTarget:
        return InterleavingTarget({})


class TestQcow2InterleavedOverlay(TestQcow2):
    @pytest.fixture
    def target(self) -> InterleavingTarget:
        return InterleavingTarget(LITTLE_CACHE, overlay=True)


class TestQcow2InterleavedLargerClusters(TestQcow2):
    cluster_size: ClassVar[int] = 2048

    @pytest.fixture
    def target(self) -> InterleavingTarget:
        return InterleavingTarget({}, overlay=True, cluster_size=2048, refcount_bits=1)


class TestQcow2InterleavedExtendedL2(TestQcow2):
    cluster_size: ClassVar[int] = 16384

    @pytest.fixture
    def target(self) -> InterleavingTarget:
        options = {"cluster_size": 16384, "extended_l2": True}
        return InterleavingTarget({}, overlay=True, **options)
