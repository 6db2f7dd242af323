"""The contract tests that ship for authors of drivers pass on the toy format."""

from __future__ import annotations

from typing import ClassVar

import pytest

from blocklayer.graph.root import Root
from blocklayer.testing.contract import FormatContract
from graph.toys import SHELF, new_graph, open_root, toy_image


class ToyTarget:
    """A toy image over nothing."""

    async def create(self, size: int) -> None:
        SHELF.reset()
        toy_image("disk", size)

    async def open(self, *, writable: bool = True) -> Root:
        return await open_root(new_graph(), "shelf:disk", writable=writable)


class ToyOverlayTarget(ToyTarget):
    """A toy image over a base of zeros that is larger."""

    async def create(self, size: int) -> None:
        SHELF.reset()
        toy_image("base", size + 700, dict.fromkeys(range(size // 512), bytes(512)))
        toy_image("disk", size, backing="base")


class TestToy(FormatContract):
    persistent: ClassVar[bool] = False

    @pytest.fixture
    def target(self) -> ToyTarget:
        return ToyTarget()


class TestToyOverlay(TestToy):
    @pytest.fixture
    def target(self) -> ToyTarget:
        return ToyOverlayTarget()
