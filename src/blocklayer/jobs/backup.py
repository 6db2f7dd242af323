"""Backup: what a disk in use held at one moment, copied to another node while everybody writes on.

A ``copy-before-write`` filter above the source saves what is about to change; the job saves the
rest. Both take a cluster only once (``drivers.point_in_time``).

1. The moment is the one at which the filter is put in place, with nobody inside.
2. A job that succeeded has saved all of it, and flushed the target.
3. The bitmap that says what to save is frozen meanwhile. What becomes of it follows
   ``bitmap_mode``; on no way does it miss what the target lacks, or what was written since (R5).
"""

from __future__ import annotations

import asyncio
from typing import Final, Literal

import msgspec

from blocklayer.drivers.copy_before_write import CopyBeforeWriteDriver, OnCbwError
from blocklayer.errors import BlockError
from blocklayer.graph import edit, io, resolve
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.node import Node
from blocklayer.graph.request import Claim
from blocklayer.graph.root import Root
from blocklayer.jobs.background import Background, Policies
from blocklayer.jobs.copying import CHUNK_SIZE
from blocklayer.jobs.job import Job
from blocklayer.jobs.ranges import DEFAULT_WORKERS, RangeCopier
from blocklayer.units import MIB

_SCAN: Final = 64 * MIB
"""How much is looked through at a time for what the top layer holds."""

SyncMode = Literal["full", "top", "none", "incremental", "bitmap"]
BitmapMode = Literal["on-success", "never", "always"]


class BackupOptions(msgspec.Struct, kw_only=True):
    """How to back up."""

    sync: SyncMode = "full"
    bitmap: DirtyBitmap | None = None
    """What to save; with ``full`` and ``top`` only kept up to date."""
    bitmap_mode: BitmapMode = "on-success"
    compress: bool = False
    discard_source: bool = False
    """Give up in the source what was saved."""
    on_cbw_error: OnCbwError = "break-guest-write"
    policies: Policies = Policies()
    max_workers: int = 64
    """Copies in flight at most; more than a few gain nothing."""
    max_chunk: int = 0
    """Bytes that are copied at once at most; 0: what is best."""
    min_cluster_size: int = 0


class Moving(RangeCopier):
    """Copies, and gives up the source's part."""

    async def copy(self, offset: int, length: int) -> None:
        """Copy the range, which is claimed, and discard it in the source."""
        await super().copy(offset, length)
        await io.discard(self.source.node, offset, length)


class Backup(Job):
    """The job. ``jobs.starting`` puts its filter in place and makes its roots."""

    TYPE = "backup"

    def __init__(
        self, source: Root, target: Root, filter_node: Node, options: BackupOptions, **job: object
    ) -> None:
        super().__init__(source.graph, **job)  # type: ignore[arg-type]
        driver = filter_node.driver
        assert isinstance(driver, CopyBeforeWriteDriver)
        self.source = source
        self.target = target
        self.filter_node = filter_node
        self.options = options
        self.point = driver.point
        self._ranges = (Moving if options.discard_source else RangeCopier)(
            source,
            target,
            compress=options.compress,
            workers=min(options.max_workers, DEFAULT_WORKERS),
            claims=self.point.claims,
            # What holds a part of the disk goes above something else later: its zeros must be said.
            look_for_zeros=options.sync == "full",
        )
        self._background = Background(
            self, self._ranges, self.point.todo, options.policies,
            max_chunk=min(options.max_chunk or CHUNK_SIZE, CHUNK_SIZE),
        )  # fmt: skip
        self.point.breaks_itself = options.on_cbw_error == "break-snapshot"
        self.point.when_broken = self.fail_with
        self.point.copy = self._save
        if options.sync in ("incremental", "bitmap"):
            assert options.bitmap is not None
            self.point.want_only(options.bitmap)
        if options.bitmap is not None:
            options.bitmap.freeze()
        self._background.update_total()

    async def _save(self, offset: int, length: int) -> None:
        """What a change is about to overwrite."""
        await self._ranges.copy(offset, length)
        self.done += length
        self._background.update_total()

    async def run(self) -> None:
        """Save all there is, or wait for what is written to have it saved."""
        # Whoever listens is told that the job was put in place with everybody stopped.
        self.hold()
        self.release()
        if self.options.sync == "none":
            await asyncio.get_running_loop().create_future()
        if self.options.sync == "top":
            await self._leave_lower_layers()
        while True:
            await self._background.catch_up()
            async with self._all():
                # Nobody is saving anything: whatever failed is to do again.
                if not self.point.todo.count:
                    return

    def _all(self) -> Claim:
        return self.point.claims.claim(0, max(self.point.size, 1))

    async def _leave_lower_layers(self) -> None:
        """What the top layer did not hold then need not be saved."""
        for start in range(0, self.point.size, _SCAN):
            end = min(start + _SCAN, self.point.size)
            async with self.step(), self.source.request(), self.point.claims.claim(start, end):
                # What was written meanwhile was saved before, and is not to do any more.
                absent = start
                async for run in resolve.runs(self.source.node, start, end - start):
                    if run.present and run.depth == 0:
                        self._forget(absent, run.offset)
                        absent = run.end
                self._forget(absent, end)
            self._background.update_total()

    def _forget(self, start: int, end: int) -> None:
        if start < end:
            self.point.forget(start, end - start)

    async def prepare(self) -> None:
        """The backup is on stable storage."""
        await self.target.flush()

    async def commit(self) -> None:
        """The bitmap starts anew from the moment of the backup."""
        bitmap = self.options.bitmap
        if bitmap is None:
            return
        if self.options.bitmap_mode == "never":
            bitmap.reclaim()
        else:
            bitmap.abdicate()

    async def abort(self) -> None:
        """The bitmap is as if nothing had been; with ``always`` without what was saved."""
        bitmap = self.options.bitmap
        if bitmap is None:
            return
        # Whoever is saving something ends first: only then is it known what is missing.
        async with self._all():
            saved = self.options.bitmap_mode == "always" and await self._is_flushed()
            if not saved:
                bitmap.reclaim()
                return
            bitmap.abdicate()
            for offset, length in self.point.todo.runs():
                bitmap.set_dirty(offset, length)

    async def _is_flushed(self) -> bool:
        try:
            await io.flush(self.target.node)
        except BlockError:
            return False
        return True

    async def clean(self) -> None:
        """Take the filter out and let go of both nodes."""
        async with edit.changing(self.graph):
            await self._give_back()

    async def withdraw(self) -> None:
        """Undo ``place_backup``: as if it had never been, within the same ``edit.changing``."""
        if self.options.bitmap is not None:
            self.options.bitmap.reclaim()
        await self._give_back()
        self.group.withdraw(self)

    async def _give_back(self) -> None:
        edit.drop_filter(self.filter_node)
        self.target.node.busy = None
        self._ranges.close()
        await self.graph.release(self.filter_node)
        await self.source.close()
        await self.target.close()
