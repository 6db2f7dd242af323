"""The one copy engine: plans on the loop, moves bytes in threads, several chunks at once.

A worker takes a chunk, reads it, waits for its turn, sets space aside in the target, writes, and
commits. The kernel copies while the interpreter's lock is free: two workers keep two cores busy.

1. Zeros that the source's block status knows of are never read; data that turns out to be zero is
   not written where the target reads as zeros already.
2. Space in the target is allocated in guest order, unless ``in_order`` is False.
3. Data is in its place before ``commit`` shows it. Space that could not be filled is given back.
4. When ``copy`` returns or raises, no thread touches a buffer or a file any more.
5. Every chunk is a request of the source and of the target: a drained section waits for it, and it
   waits for a drained section.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack

import msgspec

from blocklayer.graph import io
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.root import Root, requests
from blocklayer.jobs.filling import Filler, Pack
from blocklayer.jobs.pace import Pace
from blocklayer.jobs.plan import Chunk, Gatherer, Piece
from blocklayer.jobs.reading import Reader, Warn, new_buffer
from blocklayer.jobs.threads import Threads, crew
from blocklayer.jobs.writing import store_chunk
from blocklayer.units import KIB, MIB

CHUNK_SIZE = 2 * MIB
"""What is read and written at once. Less costs hand-overs; writes of 4 MiB at once sometimes take
ext4 twice the processor time."""
DEFAULT_WORKERS = 3
DEFAULT_SPARSE_SIZE = 4 * KIB


class CopyOptions(msgspec.Struct, kw_only=True):
    """How to copy."""

    zeros_known: bool = False
    """The target reads as zeros wherever nothing was written to it."""
    sparse_size: int = DEFAULT_SPARSE_SIZE
    """Zero runs of this length or more become holes; 0: everything is written, zeros too."""
    compress: bool = False
    compression_level: int | None = None
    """One that the target's format offers; None: its default, the fast one."""
    in_order: bool = True
    workers: int = DEFAULT_WORKERS
    bytes_per_s: int = 0
    """The rate limit; 0: none."""
    salvage: Warn | None = None
    """Where to report what cannot be read and is taken for zeros; None: that is an error."""


class Turns:
    """Lets tickets 0, 1, 2, … pass one after the other."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def wait(self, ticket: int) -> None:
        """Wait until all tickets before ``ticket`` have passed."""
        if ticket != self._next:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting[ticket] = waiter
            await waiter

    def passed(self) -> None:
        """The ticket whose turn it is has passed."""
        self._next += 1
        waiter = self._waiting.pop(self._next, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Copier:
    """Copies pieces of guest data to ``target``. For one use."""

    def __init__(
        self,
        target: Root,
        options: CopyOptions,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.target = target
        self.options = options
        self.done = 0
        """Bytes of the target that are finished."""
        driver = target.node.driver
        self.unit = driver.allocation_unit if isinstance(driver, FormatDriver) else 1
        self._progress = progress
        self._pace = Pace(options.bytes_per_s)
        self._turns = Turns()
        self._ticket = 0
        self._taking = asyncio.Lock()

    async def copy(self, pieces: AsyncIterator[Piece]) -> None:
        """Copy all ``pieces``, which come in order. Raises the first error met."""
        options = self.options
        gatherer = Gatherer(
            self.unit,
            CHUNK_SIZE,
            zeros_known=options.zeros_known,
            materialise=not options.sparse_size,
        )
        chunks = gatherer.chunks(pieces)
        try:
            # A file takes one write at a time: more threads would spin on its lock, not help.
            with Threads(options.workers) as loaders, Threads(1) as storer:
                filler = self._filler(loaders)
                await crew(
                    options.workers,
                    lambda: self._work(chunks, gatherer.limit, filler, storer),
                )
        finally:
            await chunks.aclose()

    def _filler(self, loaders: Threads) -> Filler:
        options, driver = self.options, self.target.node.driver
        pack: Pack | None = None
        if options.compress:
            assert isinstance(driver, FormatDriver)
            pack = functools.partial(driver.pack, level=options.compression_level)
        return Filler(
            Reader(options.salvage),
            loaders,
            size=driver.size,
            unit=self.unit,
            sparse_size=options.sparse_size,
            pack=pack,
        )

    async def _work(
        self,
        chunks: AsyncGenerator[Chunk, None],
        capacity: int,
        filler: Filler,
        storer: Threads,
    ) -> None:
        buffer = new_buffer(capacity)
        while True:
            async with AsyncExitStack() as inside:
                async with self._taking:
                    # Entered in the order of tickets: whoever waits for a turn inside a request
                    # waits for somebody inside a request, never for a drained section to end.
                    chunk = await anext(chunks, None)
                    if chunk is None:
                        return
                    await self._pace.wait()
                    self._pace.charge(chunk.length)
                    ticket, self._ticket = self._ticket, self._ticket + 1
                    await self._enter(chunk, inside)
                await self._copy_chunk(chunk, buffer, ticket, filler, storer)
            self.done += chunk.covered
            if self._progress is not None:
                self._progress(self.done)

    async def _enter(self, chunk: Chunk, inside: AsyncExitStack) -> None:
        roots = {self.target: None}
        for segment in chunk.segments:
            for piece in segment.pieces:
                if piece.source is not None:
                    roots[piece.source] = None
        await inside.enter_async_context(requests(*roots))

    async def _copy_chunk(
        self, chunk: Chunk, buffer: memoryview, ticket: int, filler: Filler, storer: Threads
    ) -> None:
        await filler.fill(chunk, buffer)
        if self.options.in_order:
            await self._turns.wait(ticket)
        await store_chunk(
            self.target.node, chunk, buffer, storer, zeros_known=self.options.zeros_known,
            placed=self._turns.passed,
        )  # fmt: skip
        if self.target.write_through:
            await io.flush(self.target.node)
