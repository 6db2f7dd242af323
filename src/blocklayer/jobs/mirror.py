"""Mirror: a disk in use, copied to another node until both are the same; then, on request, the copy
takes its place. Commit of the active layer is the same, with a node of the chain as the target.

1. A write is dirty before it is acknowledged; so what is clean is the same on both sides. In
   ``write-blocking`` mode a write to a clean part reaches both sides before it is acknowledged.
2. The last of it is copied, and the target flushed, with nobody inside the source; users move to
   the target before they are let in again. Until then a failure leaves them on the source.
3. Whatever comes, the target is never used by anybody before it is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import ClassVar, Final, Literal

import msgspec

from blocklayer.drivers.job_filters import MirrorTopDriver, Pass
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph import edit, events, io, resolve
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.driver import Buffer
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.background import Background, Policies
from blocklayer.jobs.job import Job
from blocklayer.jobs.ranges import RangeCopier
from blocklayer.units import KIB, MIB, align_down, align_up, is_power_of_two

_SMALL_REST: Final = 4 * MIB
"""What may be left to copy when users are stopped for the last of it."""
_RUNS_A_REQUEST: Final = 64

SyncMode = Literal["full", "top", "none", "incremental", "bitmap"]


class MirrorOptions(msgspec.Struct, kw_only=True):
    """How to mirror."""

    base: Node | None = None
    """What this layer and those below hold is in the target already; None: nothing is."""
    everything: bool = True
    """Copy what is there, too; False: only what is written from now on."""
    granularity: int = 0
    """Bytes that become dirty at once; 0: the target's cluster size, within 4 KiB to 64 KiB."""
    copy_mode: Literal["background", "write-blocking"] = "background"
    policies: Policies = Policies()
    replaces: Node | None = None
    """Whose users move to the target in the end; None: the source's."""


class Mirror(Job):
    """The job. ``jobs.starting`` puts its filter in place and makes its roots."""

    TYPE: ClassVar[events.JobType] = "mirror"

    def __init__(
        self, source: Root, target: Root, filter_node: Node, options: MirrorOptions, **job: object
    ) -> None:
        super().__init__(source.graph, **job)  # type: ignore[arg-type]
        self.source = source
        self.target = target
        self.filter_node = filter_node
        # Without users between the pivot and the end: it stays all the same.
        self._filter_hold = Root(filter_node, source.label, Permission.NONE, follows=False)
        self.options = options
        self.todo = DirtyBitmap(source.node, None, granularity_for(target.node, options))
        # A copy of a part of the disk goes above something else later: its zeros must be said.
        whole = options.everything and options.base in (None, target.node)
        self._ranges = RangeCopier(source, target, look_for_zeros=whole)
        self._background = Background(self, self._ranges, self.todo, options.policies)
        self._news = asyncio.Event()
        self._soft = False
        self._write_blocking = options.copy_mode == "write-blocking"
        self._marked = False
        self._pivoted: edit.Change | None = None
        source.node.watch(self.todo)
        source.node.watch(self)

    # As a watcher of the source.

    def changed(self, offset: int, length: int) -> None:
        """Something became dirty: there is work."""
        self._news.set()

    def resized(self, size: int) -> None:
        """The source keeps its size while the job runs."""

    @property
    def actively_synced(self) -> bool:
        """Ready, and every write reaches both sides before it is acknowledged."""
        return self.ready and self.copy_mode == "write-blocking" and not self.todo.count

    @property
    def copy_mode(self) -> Literal["background", "write-blocking"]:
        """The mode in force."""
        driver = self.filter_node.driver
        watched = isinstance(driver, MirrorTopDriver) and driver.guard is not None
        return "write-blocking" if watched else "background"

    def set_copy_mode(self, copy_mode: Literal["background", "write-blocking"]) -> None:
        """From ``background`` to ``write-blocking``; there is no way back."""
        self.check_verb("change")
        if copy_mode != "write-blocking":
            raise UsageError("Change to copy mode 'background' is not implemented")
        self._write_blocking = True
        if self._marked:
            self._watch_writes()

    def _watch_writes(self) -> None:
        self._mirror_top.watch(self._write_both)

    @property
    def _mirror_top(self) -> MirrorTopDriver:
        driver = self.filter_node.driver
        assert isinstance(driver, MirrorTopDriver)
        return driver

    async def run(self) -> None:
        """Copy until both sides are the same, then follow the source until told to end."""
        if self.options.everything:
            await self._mark_all()
        # Not before: while all is being marked, what is clean need not be the same on both sides.
        self._marked = True
        if self._write_blocking:
            self._watch_writes()
        self._background.update_total()
        while True:
            self._news.clear()
            await self._background.catch_up()
            if self.todo.count:
                continue
            if not self.ready:
                await self.target.flush()
                self.become_ready()
            if self.told_to_complete or self._soft:
                # Told while it is paused: it ends when it is resumed.
                async with self.step():
                    return
            await self._until_news()

    async def _until_news(self) -> None:
        waiting = [
            asyncio.ensure_future(self._news.wait()),
            asyncio.ensure_future(self.until_told()),
        ]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    async def _mark_all(self) -> None:
        """What the layers above the base hold is dirty from the beginning."""
        async for offset, length in self._held():
            self.todo.set_dirty(offset, length)

    async def _held(self) -> AsyncIterator[tuple[int, int]]:
        node, base = self.source.node, self.options.base
        distance = node.chain().index(base) if base is not None else None
        offset = 0
        while offset < node.size:
            async with self.source.request():
                for _ in range(_RUNS_A_REQUEST):
                    if offset >= node.size:
                        break
                    run = await resolve.status(node, offset, node.size - offset)
                    if distance is None or run.depth < distance:
                        yield run.offset, run.length
                    offset = run.end

    async def _write_both(
        self, offset: int, length: int, data: Buffer | None, forward: Pass
    ) -> None:
        """A write in ``write-blocking`` mode. The target's error is the job's, not the guest's."""
        start = align_down(offset, self.todo.granularity)
        end = min(align_up(offset + length, self.todo.granularity), self.todo.size)
        async with self._ranges.claim(start, end - start):
            dirty = list(self.todo.runs(start, end))
            await forward()
            try:
                if data is not None:
                    await io.write(self.target.node, offset, data)
                else:
                    await self._ranges.copy(offset, length)
            except BlockError as error:
                # It is dirty, and will be tried again in the background.
                if self.judge(self.options.policies.on_target_error, "write", error) == "report":
                    self.fail_with(error)
                return
            self.todo.reset_dirty(start, end - start)
            for dirty_offset, dirty_length in dirty:
                self.todo.set_dirty(dirty_offset, dirty_length)

    def cancel_softly(self) -> bool:
        """A ready mirror ends with what the target holds: a copy of this moment."""
        if not self.ready:
            return False
        self._soft = True
        self._news.set()
        return True

    async def prepare(self) -> None:
        """Copy the rest with nobody inside, and let the users move."""
        while self._background.behind > _SMALL_REST:
            await self._background.catch_up()
        async with edit.changing(self.graph):
            await self._background.finish()
            await io.flush(self.target.node)
            # What is written from here on is no more of the copy's business.
            self._mirror_top.watch(None)
            if not self._soft:
                self._pivoted = await self.pivot()

    async def pivot(self) -> edit.Change:
        """Let the users of the source use the target; drained."""
        replaced = self.options.replaces or self.filter_node
        with edit.Change() as change:
            change.permit(self.target, Permission.NONE, Permission.ALL)
            edit.replace(change, replaced, self.target.node)
        return change

    async def abort(self) -> None:
        """Users stay, or go back, to the source."""
        if self._pivoted is not None:
            async with edit.changing(self.graph):
                self._pivoted.undo()
            self._pivoted = None

    async def clean(self) -> None:
        """Take the filter out and let go of both nodes."""
        node = self.source.node
        node.unwatch(self.todo)
        node.unwatch(self)
        node.busy = self.target.node.busy = None
        async with edit.changing(self.graph):
            edit.drop_filter(self.filter_node)
        self._ranges.close()
        await self._filter_hold.close()
        await self.source.close()
        await self.target.close()


def granularity_for(target: Node, options: MirrorOptions) -> int:
    """The granularity in force. Raises UsageError."""
    wanted = options.granularity
    if wanted:
        if not 512 <= wanted <= 64 * MIB:
            raise UsageError("Parameter 'granularity' expects a value in range [512B, 64MB]")
        if not is_power_of_two(wanted):
            raise UsageError("Parameter 'granularity' expects a power of 2")
        return wanted
    info = target.driver.info()
    cluster = info.cluster_size if info is not None else 0
    return min(max(cluster or 64 * KIB, 4 * KIB), 64 * KIB)
