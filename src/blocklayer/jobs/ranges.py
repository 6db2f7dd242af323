"""Copying ranges of one node to the same place in another, again and again, in any order.

For jobs that work beside a guest: what is to be copied is found out as they go.

1. Within one ``claim`` nobody else copies, or writes through the job, any byte of the range.
2. ``copy`` enters no request: its caller is inside one of the source and one of the target, or has
   drained both.
3. Zeros take no space in a target that reads as zeros there already, by itself or from a backing
   file other than the source.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from blocklayer.errors import BlockError
from blocklayer.graph import edit, resolve
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.request import Claim, Claims
from blocklayer.graph.root import Root
from blocklayer.jobs.copying import CHUNK_SIZE, DEFAULT_SPARSE_SIZE
from blocklayer.jobs.filling import Filler
from blocklayer.jobs.plan import Gatherer, Piece, piece_of
from blocklayer.jobs.reading import Reader, new_buffer
from blocklayer.jobs.threads import Threads
from blocklayer.jobs.writing import store_chunk

DEFAULT_WORKERS = 4


class ReadError(BlockError):
    """Reading the source failed."""


class WriteError(BlockError):
    """Writing the target failed."""


class RangeCopier:
    """Copies from ``source`` to ``target``; ``close`` it in the end."""

    def __init__(
        self,
        source: Root,
        target: Root,
        *,
        compress: bool = False,
        workers: int = DEFAULT_WORKERS,
        zeros_known: bool = False,
        look_for_zeros: bool = True,
        claims: Claims | None = None,
    ) -> None:
        self.source = source
        self.target = target
        self.claims = claims or Claims()
        self.workers = workers
        self._zeros_known = zeros_known
        driver = target.node.driver
        self.unit = driver.allocation_unit if isinstance(driver, FormatDriver) else 1
        # What shows through from the source reads as zeros only as long as the source does.
        self._look_for_zeros = look_for_zeros and not edit.reaches(target.node, source.node)
        self._loaders = Threads(workers)
        self._filler = Filler(
            Reader(),
            self._loaders,
            size=driver.size,
            unit=self.unit,
            sparse_size=DEFAULT_SPARSE_SIZE,
            pack=driver.pack if compress and isinstance(driver, FormatDriver) else None,
        )
        self._storer = Threads(1)
        self._buffers: list[memoryview] = []

    def close(self) -> None:
        """End the threads; no copy is in progress."""
        self._loaders.close()
        self._storer.close()

    def claim(self, offset: int, length: int) -> Claim:
        """A hold on the range, to be entered before it is copied."""
        return self.claims.claim(offset, offset + length)

    def is_free(self, offset: int, length: int) -> bool:
        """Whether nobody holds any part of the range."""
        end = offset + length
        return not any(held.start < end and held.end > offset for held in self.claims.held)

    async def until_others_end(self) -> None:
        """Wait until the oldest claim that somebody holds is given back."""
        if self.claims.held:
            await self.claims.held[0].gone()

    async def copy(self, offset: int, length: int) -> None:
        """Copy the range, which is claimed. Raises ReadError or WriteError."""
        gatherer = Gatherer(self.unit, CHUNK_SIZE, zeros_known=self._zeros_known)
        buffer = self._buffers.pop() if self._buffers else new_buffer(gatherer.limit)
        chunks = gatherer.chunks(self.pieces(offset, length))
        try:
            async for chunk in chunks:
                try:
                    await self._filler.fill(chunk, buffer)
                except (BlockError, OSError) as error:
                    raise as_kind(ReadError, error) from error
                try:
                    await store_chunk(
                        self.target.node, chunk, buffer, self._storer,
                        zeros_known=self._zeros_known, look_for_zeros=self._look_for_zeros,
                    )  # fmt: skip
                except (BlockError, OSError) as error:
                    raise as_kind(WriteError, error) from error
        finally:
            await chunks.aclose()
            self._buffers.append(buffer)

    async def pieces(self, offset: int, length: int) -> AsyncIterator[Piece]:
        """What is to be copied of the range."""
        node = self.source.node
        try:
            async for run in resolve.runs(node, offset, length):
                yield piece_of(run, node.generation, self.source)
        except BlockError as error:
            raise as_kind(ReadError, error) from error


def as_kind(kind: type[BlockError], error: BlockError | OSError) -> BlockError:
    """``error`` as one of ``kind``, unless it is told already where it happened."""
    if isinstance(error, ReadError | WriteError):
        return error
    failure = kind(str(error))
    if error.errno is not None:
        failure.errno = error.errno
    return failure
