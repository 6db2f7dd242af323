"""The crashing disk: storage in memory that remembers, fails on demand, and can lose power.

A test makes a ``CrashingDisk``, opens images on it by its name, and then asks what the disk could
hold had the power failed:

    disk = CrashingDisk()
    graph = Graph(registry())
    await create_image(graph, disk.name, "qcow2", {"size": 1 << 20})
    disk.settle()                                   # so far all is on stable storage
    ...                                             # open disk.name, write, flush, close
    for position in range(disk.position + 1):       # after every prefix of the log
        for state in disk.states(position):
            after = state.disk()                    # another CrashingDisk: open it, check it

    disk.fail(3, errno.ENOSPC)                      # the third request from now on fails
    ...                                             # run something; disk.failures: did it hit?

A disk outlives the nodes that use it: closing and opening again finds what was written.

1. Every write, zero, discard, truncate and flush is in ``log``, in the order in which it began.
2. A flush makes durable what had ended before the flush began, once the flush itself has ended.
3. Whatever is not durable may be lost, whole or in part: each 512-byte sector is old or new.
4. A request made to fail has no effect, or (``partial``) that of its first bytes only.
"""

from __future__ import annotations

import asyncio
import errno as _errno
import os
import random
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Final

import msgspec

from blocklayer.drivers import DRIVERS
from blocklayer.drivers.memory import Pages
from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.driver import Buffer, ProtocolDriver
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.options import CreateOptions, NodeOptions
from blocklayer.graph.registry import Entry, Registry
from blocklayer.units import SECTOR, align_up

KINDS: Final = frozenset(("read", "write", "zero", "discard", "truncate", "flush"))
"""The kinds of requests, as the log and ``fail`` name them."""

LONGEST_REQUEST_S: Final = 0.01

_TEARS = 4
"""Places at which ``states`` tears one write; a short write is torn at every sector."""


class Event(msgspec.Struct):
    """One request of the log. ``length`` is the new size for a truncate."""

    kind: str
    offset: int = 0
    length: int = 0
    data: bytes = b""
    ended: int | None = None
    """The log's length when the request ended; None while it is in flight."""

    def apply(self, pages: Pages, sectors: range | None = None) -> None:
        """Do to ``pages`` what was asked; of a torn request only ``sectors``, counted in it."""
        if self.kind == "truncate":
            pages.truncate(self.length)
        elif self.kind != "flush":
            start, end = self.offset, self.offset + self.length
            if sectors is not None:
                base = start - start % SECTOR
                start = max(start, base + sectors.start * SECTOR)
                end = min(end, base + sectors.stop * SECTOR)
            if start < end and self.kind == "write":
                pages.write(start, self.data[start - self.offset : end - self.offset])
            elif start < end:
                size = pages.size
                pages.zero(start, end - start)
                if self.kind == "discard":
                    pages.size = size

    @property
    def sectors(self) -> int:
        """How many sectors the request meets; torn requests are cut between them."""
        if self.kind not in ("write", "zero", "discard") or not self.length:
            return 0
        return -(-(self.offset + self.length) // SECTOR) - self.offset // SECTOR

    def __str__(self) -> str:
        return f"{self.kind} {self.length:#x} at {self.offset:#x}"


class State:
    """One possible content of the disk after a power failure; ``str()`` tells what was lost."""

    def __init__(self, pages: Pages, position: int, lost: str) -> None:
        self.pages = pages
        self.position = position
        self.lost = lost

    def disk(self) -> CrashingDisk:
        """A disk that holds it, durably, with an empty log."""
        return CrashingDisk(_copy(self.pages))

    def __str__(self) -> str:
        return f"after {self.position} requests: {self.lost}"


class _Fault(msgspec.Struct):
    remaining: int
    errno: int
    kinds: frozenset[str]
    repeat: bool
    partial: int


class CrashingDisk:
    """Contents, log and faults of one disk; nodes reach it by ``name``."""

    def __init__(self, pages: Pages | None = None, *, concurrent: bool = False) -> None:
        self.pages = pages or Pages()
        self.name = f"crashing:{next(_numbers)}"
        self.concurrent = concurrent
        """Requests let others run before they take effect: order is then up to the loop."""
        self.chance: random.Random | None = None
        """Decides how long each request takes, if it is concurrent (``testing.simulation``)."""
        self.log: list[Event] = []
        self.requests = 0
        """Requests seen so far, of all kinds and including those that failed."""
        self.failures = 0
        """Requests that were made to fail."""
        self.poisons = True
        """A failed flush ends writes, as with a file (R4); else it may be tried again."""
        self._base = _copy(self.pages)
        self._fault: _Fault | None = None
        _disks[self.name] = self

    @property
    def position(self) -> int:
        """The length of the log, to be given to ``states`` later."""
        return len(self.log)

    def settle(self) -> None:
        """Take the contents as durable, and begin an empty log."""
        self._base = _copy(self.pages)
        self.log = []

    def snapshot(self) -> CrashingDisk:
        """A disk with the same contents and an empty log."""
        return CrashingDisk(_copy(self.pages), concurrent=self.concurrent)

    def fail(
        self,
        nth: int,
        errno: int = _errno.EIO,
        *,
        kinds: Iterable[str] = KINDS,
        repeat: bool = False,
        partial: int = 0,
    ) -> None:
        """Make the ``nth`` request of ``kinds`` from now on fail (1: the next), or all from it on.

        Of a failing write the first ``partial`` bytes are stored. ``nth`` 0 ends all failing.
        """
        wanted = frozenset(kinds)
        assert wanted <= KINDS, f"unknown kinds: {wanted - KINDS}"
        self.failures = 0
        self._fault = _Fault(nth, errno, wanted, repeat, partial) if nth else None

    def due(self, kind: str) -> _Fault | None:
        """Count a request; the fault to answer it with, if one is due."""
        self.requests += 1
        fault = self._fault
        if fault is None or kind not in fault.kinds:
            return None
        fault.remaining -= 1
        if fault.remaining > 0:
            return None
        if not fault.repeat:
            self._fault = None
        self.failures += 1
        return fault

    async def request(self, event: Event) -> None:
        """Log ``event``, let it take effect, or fail it."""
        fault = self.due(event.kind)
        if fault is not None:
            if event.kind == "write" and fault.partial:
                event.data = event.data[: fault.partial]
                event.length = len(event.data)
                self.log.append(event)
                event.apply(self.pages)
                event.ended = len(self.log)
            raise _error(fault, event.kind, event.offset, self.name)
        self.log.append(event)
        await self._let_others_run()
        event.apply(self.pages)
        event.ended = len(self.log)

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, or fail."""
        fault = self.due("read")
        if fault is not None:
            raise _error(fault, "read", offset, self.name)
        await self._let_others_run()
        self.pages.read_into(offset, view)

    async def _let_others_run(self) -> None:
        if self.concurrent:
            await asyncio.sleep(self.chance.random() * LONGEST_REQUEST_S if self.chance else 0)

    def unsettled(self, position: int | None = None) -> list[int]:
        """Indices in ``log[:position]`` of the requests that a power failure there could undo."""
        log = self.log[:position]
        flushed = [
            index
            for index, event in enumerate(log)
            if event.kind == "flush" and event.ended is not None and event.ended <= len(log)
        ]
        durable = flushed[-1] if flushed else -1
        return [
            index
            for index, event in enumerate(log)
            if event.kind != "flush" and (event.ended is None or event.ended > durable)
        ]

    def states(self, position: int | None = None) -> Iterator[State]:
        """What the disk may hold if the power fails after ``log[:position]``, systematically.

        Nothing lost, everything lost that can be, each single request lost, each single one torn.
        """
        position = len(self.log) if position is None else position
        loose = self.unsettled(position)
        yield State(self._replay(position, {}), position, "nothing lost")
        if len(loose) > 1:
            lost: dict[int, range | None] = dict.fromkeys(loose)
            yield State(self._replay(position, lost), position, "all lost that was not flushed")
        for index in loose:
            event = self.log[index]
            pages = self._replay(position, {index: None})
            yield State(pages, position, f"lost request {index} ({event})")
            for kept in _tears(event.sectors):
                pages = self._replay(position, {index: kept})
                yield State(
                    pages, position, f"of request {index} ({event}) only sectors {kept} stored"
                )

    def random_states(self, number: int, seed: int, position: int | None = None) -> Iterator[State]:
        """``number`` states with any mixture of requests lost and torn; the same for one seed."""
        position = len(self.log) if position is None else position
        loose, chance = self.unsettled(position), random.Random(seed)
        for _ in range(number):
            lost: dict[int, range | None] = {}
            for index in loose:
                sectors, fate = self.log[index].sectors, chance.random()
                if fate < 0.4:
                    lost[index] = None
                elif fate < 0.6 and sectors > 1:
                    cut = chance.randrange(1, sectors)
                    lost[index] = chance.choice((range(cut), range(cut, sectors)))
            shown = {index: "all" if kept is None else kept for index, kept in lost.items()}
            yield State(
                self._replay(position, lost),
                position,
                f"seed {seed}, lost or kept in part: {shown}",
            )

    def _replay(self, position: int, lost: dict[int, range | None]) -> Pages:
        """Contents after ``log[:position]``; of the requests in ``lost`` only the sectors given."""
        pages = _copy(self._base)
        for index, event in enumerate(self.log[:position]):
            if index not in lost:
                event.apply(pages)
            else:
                kept = lost[index]
                if kept is not None:
                    event.apply(pages, kept)
        return pages


def _copy(pages: Pages) -> Pages:
    copy = Pages(pages.size)
    copy.pages = {index: bytearray(page) for index, page in pages.pages.items()}
    return copy


def _tears(sectors: int) -> list[range]:
    """Which sectors of a torn request to keep: some of its beginnings, and some of its ends."""
    if sectors <= _TEARS + 1:
        cuts = list(range(1, sectors))
    else:
        cuts = sorted({1, sectors // 3, sectors // 2, sectors - 1})
    return [range(cut) for cut in cuts] + [range(cut, sectors) for cut in cuts]


def _error(fault: _Fault, kind: str, offset: int, name: str) -> StorageError:
    said = os.strerror(fault.errno)
    return StorageError(f"Injected failure: {kind} at {offset:#x} of '{name}': {said}", fault.errno)


_numbers = count()
_disks: weakref.WeakValueDictionary[str, CrashingDisk] = weakref.WeakValueDictionary()


def registry() -> Registry:
    """All drivers of the package, and ``crashing``."""
    here = Entry(f"{__name__}:CrashingDriver", protocol=True, schemes=("crashing",))
    return Registry({**DRIVERS, "crashing": here})


class CrashingOptions(NodeOptions):
    """``filename`` is the name of a ``CrashingDisk``."""

    filename: str = ""


class CrashingDriver(ProtocolDriver):
    """A node on a ``CrashingDisk``."""

    NAME = "crashing"
    Options = CrashingOptions
    CreateOptions = CreateOptions

    @staticmethod
    def _find(name: str) -> CrashingDisk:
        disk = _disks.get(name)
        if disk is None:
            raise UsageError(f"There is no CrashingDisk '{name}'")
        return disk

    async def open(self) -> None:
        """Find the disk."""
        options = self.node.options
        assert isinstance(options, CrashingOptions)
        self.disk = self._find(options.filename)

    @property
    def size(self) -> int:
        """The disk's, in whole sectors."""
        return align_up(self.disk.pages.size, SECTOR)

    @property
    def filename(self) -> str:
        """The disk's name."""
        return self.disk.name

    def identity(self) -> object:
        """The disk."""
        return self.disk

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``."""
        await self.disk.read(offset, view)

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store ``buffers``."""
        self.node.check_writable()
        data = b"".join(buffers)
        await self.disk.request(Event("write", offset, len(data), data))

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zero at once."""
        self.node.check_writable()
        await self.disk.request(Event("zero", offset, length))

    async def discard(self, offset: int, length: int) -> None:
        """What was discarded reads as zeros."""
        self.node.check_writable()
        await self.disk.request(Event("discard", offset, length))

    async def flush(self) -> None:
        """Make what has ended durable."""
        if self.node.poisoned is not None:
            self.node.check_writable()
        try:
            await self.disk.request(Event("flush"))
        except StorageError as error:
            if self.disk.poisons:
                self.node.poison(str(error))
            raise

    async def map(self, offset: int, length: int) -> Extent:
        """Holes and data, as in ``memory``."""
        held, length = self.disk.pages.run(offset, length)
        return Extent(offset, length, Kind.DATA if held else Kind.ZERO, offset, writable=True)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the size; ``preallocation`` has nothing to reserve."""
        self.node.check_writable()
        if size < self.disk.pages.size and not shrink:
            raise UsageError(f"Shrinking '{self.disk.name}' to {size} bytes would lose data")
        await self.disk.request(Event("truncate", 0, size))

    @classmethod
    async def create(cls, graph: Graph, filename: str, options: Any) -> None:
        """Empty the disk."""
        disk = cls._find(filename)
        await disk.request(Event("truncate", 0, 0))
        await disk.request(Event("truncate", 0, options.size))
