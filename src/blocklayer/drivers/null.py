"""``null-co`` and ``null-aio``: storage that takes everything and keeps nothing.

1. Reads give zeros only with ``read-zeroes``; without it what a read returns is undefined, and here
   it is what the caller's buffer held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.driver import Buffer, ProtocolDriver
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.io import zeros
from blocklayer.graph.options import NodeOptions, Size
from blocklayer.units import GIB, SECTOR, align_up


class NullOptions(NodeOptions):
    """``latency-ns`` is waited for in every request."""

    size: Size = GIB
    latency_ns: Annotated[int, Meta(ge=0)] = 0
    read_zeroes: bool = False


class NullDriver(ProtocolDriver):
    """Nothing, of a given size."""

    NAME = "null-co"
    Options = NullOptions
    filename_option = None

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Any]:
        """Options have no place in the name."""
        if name != f"{cls.NAME}://":
            raise UsageError(f"The only allowed filename for this driver is '{cls.NAME}://'")
        return {}

    async def open(self) -> None:
        """Nothing to open."""
        options = self.node.options
        assert isinstance(options, NullOptions)
        self._size = align_up(options.size, SECTOR)
        self._latency_s = options.latency_ns / 1e9
        self._read_zeroes = options.read_zeroes
        self.node.overrides = {
            name: value
            for name, value, usual in (
                ("size", options.size, GIB),
                ("read-zeroes", options.read_zeroes, False),
            )
            if value != usual
        }

    @property
    def size(self) -> int:
        """As the options say."""
        return self._size

    @property
    def filename(self) -> str | None:
        """The one name there is; it says nothing of options."""
        return None if self.node.overrides else f"{self.NAME}://"

    def actual_size(self) -> int:
        """Nothing is stored."""
        return 0

    async def _wait(self) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def read(self, offset: int, view: memoryview) -> None:
        """Zeros if asked for, else anything."""
        await self._wait()
        if self._read_zeroes:
            view[:] = zeros(len(view))

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Drop it."""
        self.node.check_writable()
        await self._wait()

    async def flush(self) -> None:
        """All there is is on stable storage."""
        await self._wait()

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Drop it."""
        self.node.check_writable()
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:
        """There is nothing to discard."""
        self.node.check_writable()

    async def map(self, offset: int, length: int) -> Extent:
        """Zeros if reads give zeros."""
        kind = Kind.ZERO if self._read_zeroes else Kind.DATA
        return Extent(offset, length, kind, offset, None, writable=True)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """The size is an option, not a property of storage."""
        raise UnsupportedError(f"Image format driver '{self.NAME}' does not support resize")


class NullAioDriver(NullDriver):
    """The same; it differs in nothing that can be seen."""

    NAME = "null-aio"
