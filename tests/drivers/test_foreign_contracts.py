"""The contract tests on formats other than qcow2, a shape each."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from blocklayer.api.disk import create
from blocklayer.graph.root import Root
from blocklayer.testing.contract import DiskContract, FormatContract
from proof.test_contracts import take


class Target:
    """Files of one format, made with the given options of `-o`."""

    def __init__(self, folder: Path, format: str, **options: str) -> None:
        self.path = folder / f"disk.{format}"
        self.format = format
        self.options = options

    async def create(self, size: int) -> None:
        self.path.unlink(missing_ok=True)
        await create(self.path, size, format=self.format, **self.options)

    async def open(self, *, writable: bool = True) -> Root:
        file = {"driver": "file", "filename": str(self.path)}
        return await take({"driver": self.format, "file": file}, writable=writable)


class TestVdi(DiskContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vdi")


class TestVpc(DiskContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vpc", force_size="on")


class TestVpcFixed(DiskContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vpc", force_size="on", subformat="fixed")


class TestVhdx(DiskContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vhdx", block_size="1M")


class TestVmdk(FormatContract):
    cluster_size: ClassVar[int] = 65536
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vmdk")


class TestVmdkZeroedGrain(DiskContract):
    cluster_size: ClassVar[int] = 16384
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vmdk", zeroed_grain="on")


class TestVmdkFlat(DiskContract):
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vmdk", subformat="monolithicFlat")


class TestVmdkStream(DiskContract):
    cluster_size: ClassVar[int] = 16384
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "vmdk", subformat="streamOptimized")


class TestQed(FormatContract):
    cluster_size: ClassVar[int] = 65536
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "qed")


class TestQedSmallClusters(FormatContract):
    cluster_size: ClassVar[int] = 4096
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "qed", cluster_size="4096", table_size="1")


class TestQcow(FormatContract):
    cluster_size: ClassVar[int] = 4096
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "qcow")


class TestParallels(FormatContract):
    cluster_size: ClassVar[int] = 65536
    granularity: ClassVar[int] = 512

    @pytest.fixture
    def target(self, tmpfs: Path) -> Target:
        return Target(tmpfs, "parallels", cluster_size="65536")
