"""Broken images as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracles import Oracle
from qcow2.broken import CLUSTER, Broken, sample


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture
def image(qemu_img: Oracle, qemu_io: Oracle, folder: Path) -> Broken:
    return Broken(sample(qemu_img, qemu_io, folder, CLUSTER, 16, False))
