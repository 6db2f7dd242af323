"""``mirror_top`` and ``commit_top``: the filters that a mirror or a commit puts above its source.

They let everything pass, and mark in the graph where the job is. A mirror in ``write-blocking``
mode sees each write through its filter, so that none is acknowledged before the target has it too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from blocklayer.graph.child import Child
from blocklayer.graph.driver import Buffer
from blocklayer.graph.filter import FilterDriver, FilterOptions
from blocklayer.graph.permission import Permission

Pass = Callable[[], Awaitable[None]]
Guard = Callable[[int, int, Buffer | None, Pass], Awaitable[None]]
"""Called with offset, length, what is written (None: it only becomes zero, or is given up), and
what writes it to the source."""


class MirrorTopOptions(FilterOptions):
    """``commits``: the job below writes to a layer of the chain itself."""

    commits: bool = False


class MirrorTopDriver(FilterDriver):
    """Above the source of a mirror or of a commit of the active layer."""

    NAME = "mirror_top"
    Options = MirrorTopOptions

    guard: Guard | None = None

    def watch(self, guard: Guard | None) -> None:
        """Let ``guard`` see each write from now on."""
        self.guard = guard
        self.sees_writes = guard is not None
        self.node.mapping_changed()

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """What the users take. A commit writes below, which makes no difference to them."""
        if not self.node.parents:
            return Permission.NONE, Permission.ALL
        options = self.node.options
        assert isinstance(options, MirrorTopOptions)
        return taken, shared | (Permission.WRITE | Permission.RESIZE if options.commits else 0)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Through the guard."""
        await self._guarded(offset, len(data), data, partial(super().write_opaque, offset, data))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Through the guard."""
        forward = partial(super().write_zeroes, offset, length, unmap=unmap, fallback=fallback)
        await self._guarded(offset, length, None, forward)

    async def discard(self, offset: int, length: int) -> None:
        """Through the guard."""
        await self._guarded(offset, length, None, partial(super().discard, offset, length))

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Through the guard."""
        forward = partial(super().write_compressed, offset, data)
        await self._guarded(offset, len(data), data, forward)

    async def _guarded(self, offset: int, length: int, data: Buffer | None, forward: Pass) -> None:
        if self.guard is None:
            await forward()
        else:
            await self.guard(offset, length, data, forward)


class CommitTopDriver(FilterDriver):
    """Above the topmost layer that an intermediate commit moves down."""

    NAME = "commit_top"

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """Nothing: below it, the job alone knows what may change while users see no difference."""
        return Permission.NONE, Permission.ALL
