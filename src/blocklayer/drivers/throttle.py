"""`throttle`: a filter whose requests keep to the limits of a ``throttle-group``.

1. Reads count as reads; writes, zeros and discards as writes. Flushes never wait.
2. Whoever drains the node waits for no limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.errors import UsageError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.filter import FilterDriver, FilterOptions
from blocklayer.graph.throttling import Member, ThrottleGroup

if TYPE_CHECKING:
    from blocklayer.graph.node import Node


class ThrottleOptions(FilterOptions, kw_only=True):
    """``throttle-group``: the id of the object that holds the limits."""

    throttle_group: str


class ThrottleDriver(FilterDriver):
    """The filter."""

    NAME = "throttle"
    Options = ThrottleOptions
    sees_reads = True
    sees_writes = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._group_member: Member | None = None
        self._drains = 0

    @property
    def _member(self) -> Member:
        assert self._group_member is not None
        return self._group_member

    async def open(self) -> None:
        """Find the group, and open the child."""
        options = self.node.options
        assert isinstance(options, ThrottleOptions)
        _, group = self.node.graph.objects.find(options.throttle_group) or (None, None)
        if not isinstance(group, ThrottleGroup):
            raise UsageError(f"Throttle group '{options.throttle_group}' does not exist")
        await super().open()
        self._group_member = Member(group, self._drains)

    async def close(self) -> None:
        """Leave the group."""
        self._member.leave()

    def begin_drain(self) -> None:
        """What waits goes on."""
        self._drains += 1
        if self._group_member is not None:
            self._group_member.begin_drain()

    def end_drain(self) -> None:
        """The limits hold again."""
        self._drains -= 1
        if self._group_member is not None:
            self._group_member.end_drain()

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Wait for its turn, and pass on."""
        await self._member.passing("read", len(view))
        await super().read_opaque(offset, view)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Wait for its turn, and pass on."""
        await self._member.passing("write", len(data))
        await super().write_opaque(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Wait for its turn, and pass on."""
        await self._member.passing("write", length)
        await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        """Wait for its turn, and pass on."""
        await self._member.passing("write", length)
        await super().discard(offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Wait for its turn, and pass on."""
        await self._member.passing("write", len(data))
        await super().write_compressed(offset, data)
