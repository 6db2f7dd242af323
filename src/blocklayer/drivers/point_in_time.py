"""A point in time of a node in use: what of it is still to be saved, and where each part is read.

A filter above the node (``copy-before-write``) calls ``save`` before it lets a change through; a
backup job saves the rest on its own account; ``snapshot-access`` reads.

1. A cluster is *to do* while only the node itself holds what it held at the point in time. Nothing
   changes it before it was saved: ``save`` returns when no cluster of the range is to do.
2. Whoever saves, or reads clusters that are to do, holds a claim on them. A cluster is not to do
   any more from the moment at which its saving begins, within the claim; if that fails it is again.
3. Where the target has the source as its backing file it can be read itself, too: who reads it
   while something is saved has ended before that changes in the source.
4. Once it is ``broken`` nothing is saved, and nothing of it can be read.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from blocklayer.errors import BlockError, StorageError
from blocklayer.graph import edit, io, resolve
from blocklayer.graph.child import Child
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.extent import Kind
from blocklayer.graph.request import Claims
from blocklayer.graph.root import passed_through
from blocklayer.units import MIB, align_down, align_up

_CHUNK: Final = MIB
"""What is copied or read at a time: a bound on memory, and on how long a write has to wait."""
_STATUS_SIZE: Final = 64 * MIB

Save = Callable[[int, int], Awaitable[None]]


class PointInTime:
    """What ``source`` leads to held when this was made; saved to the same place of ``target``."""

    def __init__(self, source: Child, target: Child, cluster_size: int) -> None:
        self.source = source
        self.target = target
        self.cluster_size = cluster_size
        node = source.node
        self.size = node.size
        self.todo = DirtyBitmap(node, None, cluster_size, enabled=False)
        self.known = DirtyBitmap(node, None, cluster_size, enabled=False)
        """The parts that somebody wants to know; only these are ever to do."""
        self.claims = Claims()
        self.copy: Save = self._copy
        """Saves a range that is claimed. A job puts its own way in its place."""
        self.broken: BlockError | None = None
        self.when_broken: Callable[[BlockError], None] = lambda error: None
        self.timeout_s = 0
        """How long a change may have to wait for the saving of what it changes; 0: for ever."""
        self.breaks_itself = False
        """What cannot be saved breaks the point in time, not the change that would destroy it."""
        self._saving: set[asyncio.Task[None]] = set()
        self.want_all()

    def want_all(self) -> None:
        """All of it is to do."""
        for bitmap in (self.todo, self.known):
            bitmap.set_dirty(0, self.size)

    def want_only(self, bitmap: DirtyBitmap) -> None:
        """Only what ``bitmap``, which is loaded, calls dirty is to do. Raises UsageError."""
        self.forget(0, self.size)
        for own in (self.todo, self.known):
            own.merge(bitmap)

    def forget(self, offset: int, length: int) -> None:
        """Nobody needs the range any more: whole clusters only."""
        for bitmap in (self.todo, self.known):
            bitmap.reset_dirty(offset, length)

    def cover(self, offset: int, length: int) -> tuple[int, int]:
        """The start and end of the clusters that the range touches."""
        end = min(align_up(offset + length, self.cluster_size), self.size)
        return min(align_down(offset, self.cluster_size), end), end

    def is_saved(self, start: int, end: int) -> bool:
        """Whether nothing of the range is to do or being saved."""
        if any(held.start < end and held.end > start for held in self.claims.held):
            return False
        return next(self.todo.runs(start, end), None) is None

    async def save(self, offset: int, length: int) -> None:
        """The range is about to change: save what is to do of it.

        Raises StorageError if that fails and the point in time is worth more than the change.
        """
        start, end = self.cover(offset, length)
        if start >= end or self.broken is not None or self.is_saved(start, end):
            return
        try:
            if self.timeout_s:
                await self._in_time(start, end)
            else:
                await self._save(start, end)
        except BlockError as error:
            failure = StorageError(
                f"What '{self.source.node.name}' held at {offset:#x} before this change could not "
                f"be saved to '{self.target.node.name}': {error}",
                error.errno or errno.EIO,
            )
            if not self.breaks_itself:
                raise failure from error
            self.break_off(failure)

    async def _save(self, start: int, end: int) -> None:
        async with self.claims.claim(start, end):
            for offset, length in list(self.todo.runs(start, end)):
                if self.broken is not None:
                    return
                self.todo.reset_dirty(offset, length)
                try:
                    await self.copy(offset, length)
                except BaseException:
                    self.todo.set_dirty(offset, length)
                    raise
            await self._let_readers_pass()

    async def _let_readers_pass(self) -> None:
        """Who reads the target over the source, its backing file, may be about to read in the
        source what is saved now.
        """
        source, target = self.source.node, self.target.node
        if edit.reaches(target, source):
            assert self.source.parent is not None
            await passed_through(target, self.source.parent)

    async def _in_time(self, start: int, end: int) -> None:
        """Save, or give up waiting for it: it then goes on by itself, and keeps its claim."""
        task = asyncio.create_task(self._save(start, end))
        self._saving.add(task)
        epochs = self.source.node.graph.epochs
        epoch = epochs.enter()

        def ended(task: asyncio.Task[None]) -> None:
            epochs.leave(epoch)
            self._saving.discard(task)
            if not task.cancelled():
                # Somebody may have been told already that it failed, whatever became of it.
                task.exception()

        task.add_done_callback(ended)
        done, _ = await asyncio.wait((task,), timeout=self.timeout_s)
        if not done:
            raise StorageError(f"it took longer than {self.timeout_s} s", errno.ETIMEDOUT)
        task.result()

    async def come_to_rest(self) -> None:
        """Wait until nothing is being saved that nobody waits for any more."""
        while self._saving:
            await asyncio.wait(self._saving)

    def break_off(self, error: BlockError) -> None:
        """Give the point in time up."""
        if self.broken is None:
            self.broken = error
            self.when_broken(error)

    async def _copy(self, offset: int, length: int) -> None:
        """Copy a range that is claimed, through the graph."""
        source, target, end = self.source.node, self.target.node, offset + length
        while offset < end:
            run = await resolve.status(source, offset, end - offset)
            step = run.length
            if run.kind is Kind.ZERO:
                await io.write_zeroes(target, offset, step, unmap=True)
            else:
                step = min(step, _CHUNK)
                data = await io.read(source, offset, step)
                if io.is_zero(data):
                    await io.write_zeroes(target, offset, step, unmap=True)
                else:
                    await io.write(target, offset, data)
            offset += step

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with what was there. Raises StorageError if that is not known any more."""
        done = 0
        while done < len(view):
            at = offset + done
            piece = view[done : done + _CHUNK - at % _CHUNK]
            start, end = self.cover(at, len(piece))
            self._check_known(start, end)
            if self.is_saved(start, end):
                await io.read_into(self.target.node, at, piece)
            else:
                async with self.claims.claim(start, end):
                    await self._read_claimed(at, piece)
            # What was saved may have been given up, and what was not changed, meanwhile.
            self._check_known(start, end)
            done += len(piece)

    async def _read_claimed(self, offset: int, view: memoryview) -> None:
        for start, end, saved in self._parts(offset, offset + len(view)):
            node = self.target.node if saved else self.source.node
            await io.read_into(node, start, view[start - offset : end - offset])

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The range cut where it is saved and where it is to do, as (start, end, saved)."""
        for offset, length in list(self.todo.runs(start, end)):
            if start < offset:
                yield start, offset, True
            yield offset, offset + length, False
            start = offset + length
        if start < end:
            yield start, end, True

    def _check_known(self, start: int, end: int) -> None:
        if self.broken is not None:
            raise StorageError(f"The point in time is lost: {self.broken}", errno.EACCES)
        known = next(self.known.runs(start, end), None)
        if known != (start, end - start):
            raise StorageError(
                f"{end - start:#x} bytes at {start:#x} are not, or not any more, part of the "
                f"point in time of '{self.source.node.name}'",
                errno.EACCES,
            )

    async def status(self, offset: int, length: int) -> tuple[Kind, int]:
        """What there was at ``offset``, DATA or ZERO, and for how many bytes of ``length``."""
        length = min(length, _STATUS_SIZE)
        async with self.claims.claim(*self.cover(offset, length)):
            self._check_known(*self.cover(offset, 1))
            _, known = next(self.known.runs(offset, offset + length))
            start, end, saved = next(self._parts(offset, offset + known))
            node = self.target.node if saved else self.source.node
            run = await resolve.status(node, start, end - start)
        return (Kind.ZERO if run.kind is Kind.ZERO else Kind.DATA), run.length

    async def discard(self, offset: int, length: int) -> None:
        """Nobody will read the range, whole clusters, again: neither keep nor save it."""
        async with self.claims.claim(*self.cover(offset, length)):
            self.forget(offset, length)
            await io.discard(self.target.node, offset, length)
