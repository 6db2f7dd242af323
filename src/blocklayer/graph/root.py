"""Roots: users from outside the graph, through whom all requests come in.

A root is what a device, an export, a job or a library user holds. It is an edge without a parent
node, and can be pointed at another node while it stays in use (snapshot, pivot).

1. A request is counted from entry to end: in the graph's epochs, and in ``in_flight`` for draining.
2. While drained, new requests wait at the door; those inside end undisturbed. So whoever is inside
   one root must not wait at another's door: ``requests`` enters several at once.
3. With ``write_through`` a write has reached stable storage when it returns.
4. A root that serves for a device has its front end: that sees each request before the door, where
   it may let it wait for a limit, and when it has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from blocklayer.errors import LockedError
from blocklayer.graph import io, vm_state
from blocklayer.graph.child import Child, Role
from blocklayer.graph.driver import Buffer
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission

if TYPE_CHECKING:
    from types import TracebackType

    from blocklayer.graph.graph import Graph


RequestKind = Literal["rd", "wr", "unmap", "flush"]


class FrontEnd(Protocol):
    """What a device puts before a root that requests to it come through."""

    @property
    def limited(self) -> bool:
        """Whether requests may have to wait."""

    async def passing(self, kind: RequestKind, length: int) -> None:
        """Wait until a request of ``length`` bytes may come in."""

    def done(
        self, kind: RequestKind, offset: int, length: int, began_ns: int, error: object
    ) -> bool:
        """A request that came at ``began_ns`` (``time.monotonic_ns``) has ended, with an exception
        or None; whether its caller need not hear of the error.
        """

    def end(self) -> None:
        """It no longer serves the device: what waits goes on."""


class Root(Child):
    """An outside user's hold on ``node``, with the permissions it was made with."""

    __slots__ = (
        "_idle", "_open", "_quiesced", "front_end", "graph", "in_flight", "label", "write_through",
    )  # fmt: skip

    def __init__(
        self,
        node: Node,
        label: str,
        taken: int,
        shared: int = Permission.ALL,
        *,
        write_through: bool = False,
        follows: bool = True,
    ) -> None:
        super().__init__("root", None, node, Role.FILTERED)
        self.graph: Graph = node.graph
        self.label = label
        self.taken, self.shared = taken, shared
        self.write_through = write_through
        self.follows = follows
        self.front_end: FrontEnd | None = None
        self.in_flight = 0
        self._quiesced = 0
        self._open: asyncio.Event | None = None
        self._idle: asyncio.Event | None = None
        self.graph.add_edge(self)
        self.graph.roots.append(self)
        for drain in self.graph.drains:
            drain.meet(self)

    @property
    def user(self) -> str:
        """Who uses the node, for messages."""
        return self.label

    @property
    def quiesced(self) -> bool:
        """Whether new requests wait at the door."""
        return self._quiesced > 0

    async def close(self) -> None:
        """Give the node back; the last user's close writes back and closes it."""
        if self.front_end is not None:
            self.front_end.end()
        self.graph.roots.remove(self)
        await self.graph.detach(self)

    def request(
        self, kind: RequestKind | None = None, offset: int = 0, length: int = 0
    ) -> _Request:
        """One request's stay inside: ``async with root.request(): …``. Without a ``kind`` the front
        end does not see it.
        """
        return _Request(self, kind, offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""
        async with _Request(self, "rd", offset, length):
            return await io.read(self.node, offset, length)

    async def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        async with _Request(self, "rd", offset, len(view)):
            io.check_range(self.node, offset, len(view))
            await io.read_into(self.node, offset, view)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Store ``data``; with ``fua`` it is on stable storage when this returns."""
        async with _Request(self, "wr", offset, len(data)):
            self._check_write()
            await io.write(self.node, offset, data)
            await self._settle(fua)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        unmap: bool = False,
        fallback: bool = True,
        fua: bool = False,
    ) -> None:
        """Make the range read as zeros; see ``io.write_zeroes``."""
        async with _Request(self, "wr", offset, length):
            self._check_write()
            await io.write_zeroes(self.node, offset, length, unmap=unmap, fallback=fallback)
            await self._settle(fua)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Store whole clusters compressed; see ``io.write_compressed``."""
        async with _Request(self, "wr", offset, len(data)):
            self._check_write()
            await io.write_compressed(self.node, offset, data)
            await self._settle(False)

    async def discard(self, offset: int, length: int) -> None:
        """The range's contents are of no more use."""
        async with _Request(self, "unmap", offset, length):
            self._check_write()
            await io.discard(self.node, offset, length)

    async def flush(self) -> None:
        """All that was acknowledged before is on stable storage when this returns."""
        async with _Request(self, "flush"):
            await io.flush(self.node)

    async def truncate(
        self, size: int, *, preallocation: str = "off", shrink: bool = False
    ) -> None:
        """Change the size; see ``io.truncate``."""
        async with _Request(self):
            if not self.taken & Permission.RESIZE:
                raise LockedError(f"{self.label} was not opened with the permission to resize")
            await io.truncate(self.node, size, preallocation=preallocation, shrink=shrink)

    async def read_vm_state(self, position: int, view: memoryview) -> None:
        """Fill ``view`` from the VM state; see ``vm_state.read``."""
        async with _Request(self):
            await vm_state.read(self.node, position, view)

    async def write_vm_state(self, position: int, data: Buffer) -> None:
        """Store ``data`` in the VM state; see ``vm_state.write``."""
        async with _Request(self):
            self._check_write()
            await vm_state.write(self.node, position, data)
            await self._settle(False)

    def _check_write(self) -> None:
        self.node.check_writable()
        if not self.taken & Permission.WRITE:
            raise LockedError(f"{self.label} was not opened with the permission to write")

    async def _settle(self, fua: bool) -> None:
        if fua or self.write_through:
            await io.flush(self.node)

    async def enter(self) -> int:
        """A request comes in; waits while the root is drained."""
        while await self.opened():
            pass
        self.in_flight += 1
        return self.graph.epochs.enter()

    def leave(self, epoch: int) -> None:
        """The request that ``enter`` answered ``epoch`` to has ended."""
        self.graph.epochs.leave(epoch)
        self.in_flight -= 1
        if self._idle is not None and not self.in_flight:
            self._idle.set()

    async def opened(self) -> bool:
        """Wait while the root is drained; whether that was the case."""
        if not self._quiesced:
            return False
        assert self._open is not None
        await self._open.wait()
        return True

    def quiesce(self) -> None:
        """Let no new request in. Nests with ``resume``."""
        self._quiesced += 1
        if self._open is None or self._open.is_set():
            self._open = asyncio.Event()

    async def idle(self) -> None:
        """Wait for the requests inside; ``quiesce`` comes first."""
        if self.in_flight:
            if self._idle is None or self._idle.is_set():
                self._idle = asyncio.Event()
            await self._idle.wait()

    def resume(self) -> None:
        """Undo one ``quiesce``."""
        self._quiesced -= 1
        if not self._quiesced and self._open is not None:
            self._open.set()


class _Request:
    __slots__ = ("_began_ns", "_epoch", "_front_end", "_kind", "_length", "_offset", "_root")

    def __init__(
        self, root: Root, kind: RequestKind | None = None, offset: int = 0, length: int = 0
    ) -> None:
        self._root = root
        self._epoch = 0
        self._kind, self._offset, self._length = kind, offset, length
        # The same one hears of the end, even if it is another's root by then.
        self._front_end = root.front_end if kind is not None else None

    async def __aenter__(self) -> None:
        if self._front_end is not None and self._kind is not None:
            self._began_ns = time.monotonic_ns()
            await self._front_end.passing(self._kind, self._length)
        self._epoch = await self._root.enter()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self._root.leave(self._epoch)
        if self._front_end is None or self._kind is None:
            return None
        return self._front_end.done(self._kind, self._offset, self._length, self._began_ns, error)


@asynccontextmanager
async def requests(*roots: Root) -> AsyncIterator[None]:
    """One request inside all of ``roots``: waits for all doors, then enters without waiting."""
    while any([await root.opened() for root in roots]):
        pass
    async with AsyncExitStack() as inside:
        for root in roots:
            await inside.enter_async_context(root.request())
        yield


@asynccontextmanager
async def drained(graph: Graph, *nodes: Node) -> AsyncIterator[None]:
    """No request is in flight through ``nodes`` (all, if none is given), and none comes in.

    Graph changes happen inside. Requests that come meanwhile wait and go on afterwards.
    """
    drain = Drain(graph, nodes)
    graph.drains.append(drain)
    above = _above(nodes or tuple(graph.nodes.values()))
    # In one order always: what a seed did, it does again.
    drivers = [node.driver for node in graph.nodes.values() if node in above]
    for driver in drivers:
        driver.begin_drain()
    try:
        # All doors first: what is still inside ends side by side.
        drain.stop()
        for root in list(drain.stopped):
            await root.idle()
        for driver in drivers:
            await driver.come_to_rest()
        yield
    finally:
        graph.drains.remove(drain)
        for driver in drivers:
            driver.end_drain()
        for root in drain.stopped:
            root.resume()


@contextmanager
def admitted(*roots: Root) -> Iterator[None]:
    """Inside one drained section, the requests of ``roots``, made there, come in all the same."""
    for root in roots:
        root.resume()
    try:
        yield
    finally:
        for root in roots:
            root.quiesce()


class Drain:
    """One drained section: which roots it keeps closed. Roots made meanwhile are among them."""

    def __init__(self, graph: Graph, nodes: tuple[Node, ...]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.stopped: list[Root] = []

    def stop(self) -> None:
        """Close the doors of all that are affected."""
        above = _above(self.nodes) if self.nodes else None
        for root in self.graph.roots:
            if above is None or root.node in above:
                self._close(root)

    def meet(self, root: Root) -> None:
        """``root`` is new."""
        if not self.nodes or root.node in _above(self.nodes):
            self._close(root)

    def _close(self, root: Root) -> None:
        root.quiesce()
        self.stopped.append(root)


async def passed_through(node: Node, apart_from: Node) -> None:
    """Wait until those who read ``node`` at this moment, not by way of ``apart_from``, are done."""
    concerned = _above((node,)) - _above((apart_from,))
    for root in list(node.graph.roots):
        if root.in_flight and root.node in concerned and root.taken & Permission.CONSISTENT_READ:
            root.quiesce()
            try:
                await root.idle()
            finally:
                root.resume()


def _above(nodes: tuple[Node, ...]) -> set[Node]:
    """``nodes`` and all that use them."""
    above: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in above:
            above.add(node)
            pending += [edge.parent for edge in node.parents if edge.parent is not None]
    return above
