"""`quorum`: several copies of one disk; what enough of them agree on is what is read.

1. A write has succeeded when ``vote-threshold`` children have taken it. So has a flush.
2. A read asks all children, and at least ``vote-threshold`` must agree (``quorum``), or the first
   that answers is believed (``fifo``). Children that fail, or are outvoted, are told of by events.
3. Children that are written to at this moment may differ for that reason alone: before anything is
   said or rewritten, the range is read again while no write is in it.
4. With ``rewrite-corrupted`` those that are outvoted get what the others agree on.
5. With ``blkverify`` the two children must agree, and a difference fails the read.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import UNSET, Meta

from blocklayer.errors import BlockError, LockedError, StorageError, UsageError
from blocklayer.graph import edit, io
from blocklayer.graph.child import Role
from blocklayer.graph.driver import Buffer, FormatDriver
from blocklayer.graph.events import QuorumFailure, QuorumOpType, QuorumReportBad
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import NodeOptions, Reference
from blocklayer.graph.permission import Permission
from blocklayer.graph.request import Claims
from blocklayer.units import SECTOR, align_down, align_up

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.node import Node

_PREFIX = "children."


class QuorumOptions(NodeOptions, kw_only=True):
    """The copies, and how many of them must agree."""

    children: list[Reference]
    vote_threshold: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
    blkverify: bool = False
    rewrite_corrupted: bool = False
    read_pattern: Literal["quorum", "fifo"] = "quorum"

    def check(self) -> None:
        """Raise UsageError unless they fit together."""
        if not self.children:
            raise UsageError("Number of provided children must be 1 or more")
        if self.vote_threshold < 1:
            raise UsageError("Parameter 'vote-threshold' expects a value >= 1")
        if self.vote_threshold > len(self.children):
            raise UsageError("threshold may not exceed children count")
        if self.blkverify and (len(self.children), self.vote_threshold) != (2, 2):
            raise UsageError(
                "blkverify=on can only be set if there are exactly two files and vote-threshold "
                "is 2"
            )
        if self.blkverify and self.rewrite_corrupted:
            raise UsageError("rewrite-corrupted=on cannot be used with blkverify=on")


class QuorumDriver(FormatDriver):
    """The copies as one disk."""

    NAME = "quorum"
    Options = QuorumOptions

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        # Of its own: jobs read and write while they hold claims on the node.
        self._claims = Claims()
        self._number = 0
        """The next child's; a number that was used is not used again."""

    async def open(self) -> None:
        """Open the children; one reopened keeps those that it has."""
        options = self.node.options
        assert isinstance(options, QuorumOptions)
        options.check()
        self._options = options
        if not self.node.children:
            for number, reference in enumerate(options.children):
                await self.node.open_child(f"{_PREFIX}{number}", reference, Role.STORAGE)
        numbers = [int(name.removeprefix(_PREFIX)) for name in self.node.children]
        self._number = max(numbers) + 1
        sizes = {node.size for node in self._copies}
        if len(sizes) > 1:
            raise UsageError(f"The children of a quorum differ in size: {sorted(sizes)} bytes")

    async def retire(self) -> bool:
        """Nothing is kept here."""
        return True

    @property
    def _copies(self) -> list[Node]:
        return [edge.node for edge in self.node.children.values()]

    @property
    def size(self) -> int:
        """That of any child."""
        return self._copies[0].size

    def actual_size(self) -> int | None:
        """What the children take."""
        sizes = [node.driver.actual_size() for node in self._copies]
        return sum(size for size in sizes if size is not None) or None

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """What the users take, and to rewrite; others may only read: copies change together."""
        if self._options.rewrite_corrupted and not self.node.flags.read_only:
            taken |= Permission.WRITE
        return taken, int(Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED)

    async def map(self, offset: int, length: int) -> Extent:
        """All requests come here."""
        return Extent(offset, length, Kind.OPAQUE, writable=True)

    # Children that come and go.

    def add_child(self, node: Node) -> None:
        """Make ``node`` one more copy: it holds what the others hold. Call it drained."""
        if node.parents:
            raise LockedError(f"The node {node.name} already has a parent")
        if self._options.blkverify:
            raise UsageError("Cannot add a child to a quorum in blkverify mode")
        if node.size != self.size:
            raise UsageError(f"'{node.name}' has {node.size} bytes, the other children {self.size}")
        with edit.Change() as change:
            change.attach(self.node, f"{_PREFIX}{self._number}", node, Role.STORAGE)
        self._number += 1

    def remove_child(self, name: str) -> Node:
        """Let a copy go; the answer is its node, to be released. Call it drained."""
        if len(self.node.children) <= self._options.vote_threshold:
            raise UsageError(
                "The number of children cannot be lower than the vote threshold "
                f"{self._options.vote_threshold}"
            )
        edge = self.node.children[name]
        with edit.Change() as change:
            change.detach(edge)
        return edge.node

    # Reading.

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """What enough children agree on, or what the first one says."""
        if self._options.read_pattern == "fifo":
            await self._read_first(offset, view)
            return
        answers = await self._read_all(offset, len(view))
        if all(answer == answers[0] for answer in answers) and isinstance(answers[0], bytearray):
            view[:] = answers[0]
            return
        async with self._claims.claim(offset, offset + len(view)):
            await self._vote(offset, view)

    async def _read_first(self, offset: int, view: memoryview) -> None:
        failure: BlockError | None = None
        for node in self._copies:
            try:
                await io.read_into(node, offset, view)
                return
            except BlockError as error:
                failure = error
                self._report("read", node, offset, len(view), error)
        assert failure is not None
        raise failure

    async def _read_all(self, offset: int, length: int) -> list[bytearray | BlockError]:
        """What each child answers, in their order."""
        buffers = [bytearray(length) for _ in self._copies]
        ended = await _gather(
            io.read_into(node, offset, memoryview(buffer))
            for node, buffer in zip(self._copies, buffers, strict=True)
        )
        return [error or buffer for buffer, error in zip(buffers, ended, strict=True)]

    async def _vote(self, offset: int, view: memoryview) -> None:
        copies, length = self._copies, len(view)
        answers = await self._read_all(offset, length)
        votes: list[tuple[bytearray, list[Node]]] = []
        for node, answer in zip(copies, answers, strict=True):
            if isinstance(answer, BlockError):
                self._report("read", node, offset, length, answer)
                continue
            for version, voters in votes:
                if version == answer:
                    voters.append(node)
                    break
            else:
                votes.append((answer, [node]))
        self._check_count("read", offset, length, answers)
        winner, voters = max(votes, key=lambda vote: len(vote[1]))
        if len(voters) < self._options.vote_threshold:
            raise self._failure("read", offset, length, "the children disagree")
        outvoted = [node for version, nodes in votes if version is not winner for node in nodes]
        for node in outvoted:
            self._report("read", node, offset, length, None)
        view[:] = winner
        if self._options.rewrite_corrupted and not self.node.flags.read_only:
            # What cannot be rewritten is outvoted again the next time.
            await _gather(io.write(node, offset, winner) for node in outvoted)

    # Writing.

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Write all."""
        async with self._claims.claim(offset, offset + len(data)):
            await self._all("write", offset, len(data), lambda node: io.write(node, offset, data))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero all."""
        async with self._claims.claim(offset, offset + length):
            await self._all(
                "write",
                offset,
                length,
                lambda node: io.write_zeroes(node, offset, length, unmap=unmap),
            )

    async def discard(self, offset: int, length: int) -> None:
        """As zeros: what discarded space reads as would differ."""
        await self.zero(offset, length, unmap=True)

    async def flush(self) -> None:
        """Flush all."""
        await self._all("flush", 0, 0, io.flush)

    async def _all(
        self,
        operation: QuorumOpType,
        offset: int,
        length: int,
        act: Callable[[Node], Coroutine[Any, Any, None]],
    ) -> None:
        copies = self._copies
        ended = await _gather(act(node) for node in copies)
        for node, error in zip(copies, ended, strict=True):
            if error is not None:
                self._report(operation, node, offset, length, error)
        self._check_count(operation, offset, length, ended)

    # What is said.

    def _check_count(
        self, operation: QuorumOpType, offset: int, length: int, ended: list[Any]
    ) -> None:
        """Raise StorageError unless enough children did not fail."""
        failures = [each for each in ended if isinstance(each, BlockError)]
        if len(ended) - len(failures) < self._options.vote_threshold:
            raise self._failure(operation, offset, length, str(failures[0]), failures[0].errno)

    def _failure(
        self, operation: str, offset: int, length: int, why: str, number: int | None = None
    ) -> StorageError:
        start, count = _sectors(offset, length)
        self.node.graph.notify(
            QuorumFailure(reference=self.node.name, sector_num=start, sectors_count=count)
        )
        return StorageError(
            f"quorum '{self.node.name}': no {self._options.vote_threshold} children agree on a "
            f"{operation} of {length:#x} bytes at {offset:#x}: {why}",
            number or errno.EIO,
        )

    def _report(
        self,
        operation: QuorumOpType,
        node: Node,
        offset: int,
        length: int,
        error: BlockError | None,
    ) -> None:
        start, count = _sectors(offset, length)
        self.node.graph.notify(
            QuorumReportBad(
                type=operation,
                error=UNSET if error is None else str(error),
                node_name=node.name,
                sector_num=start,
                sectors_count=count,
            )
        )


def _sectors(offset: int, length: int) -> tuple[int, int]:
    start = align_down(offset, SECTOR) // SECTOR
    return start, align_up(offset + length, SECTOR) // SECTOR - start


async def _gather(works: Any) -> list[BlockError | None]:
    """Do all side by side; how each ended. Raises what is no BlockError, after all have ended."""
    ended: list[BlockError | None] = []
    for each in await asyncio.gather(*works, return_exceptions=True):
        if each is not None and not isinstance(each, BlockError):
            raise each
        ended.append(each)
    return ended
