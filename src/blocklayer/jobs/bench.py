"""bench: many requests of one size at once, for the time they take.

1. At most ``depth`` requests are in flight, each with a buffer of its own; the next begins as soon
   as one has ended.
2. Where flushes are wanted, one follows every ``flush_interval`` requests: after they have ended
   or, without ``drain``, beside those that come after.
3. The first error ends the run; it is raised when nothing is in flight any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import msgspec

from blocklayer.graph.root import Root

_REPORTED = 256
"""Progress is told once in so many requests: telling it takes as long as sending one."""


class Load(msgspec.Struct, kw_only=True):
    """What to send. Sizes in bytes."""

    count: int
    depth: int
    size: int
    offset: int = 0
    step: int
    """From one request's offset to the next; the disk's end leads back to its start."""
    pattern: int | None = None
    """The byte to write. None: read."""
    flush_interval: int = 0
    drain: bool = True

    def offsets(self, disk_size: int) -> Iterator[int]:
        """Where each request begins."""
        offset = self.offset
        for _ in range(self.count):
            yield offset
            offset = (offset + self.step) % max(disk_size, 1)


async def bench(
    root: Root, load: Load, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Send ``load`` to ``root``'s node; ``progress`` gets how many requests have ended.

    Raises what its requests raise.
    """
    offsets = load.offsets(root.node.size)
    if not load.flush_interval or not load.drain:
        await _in_flight(root, load, enumerate(offsets, 1), progress)
        return
    for start in range(0, load.count, load.flush_interval):
        some = [next(offsets) for _ in range(min(load.flush_interval, load.count - start))]
        await _in_flight(root, load, enumerate(some, 1), lambda done: None)
        progress(start + len(some))
        if len(some) == load.flush_interval:
            await root.flush()


async def _in_flight(
    root: Root, load: Load, requests: Iterator[tuple[int, int]], progress: Callable[[int], None]
) -> None:
    """Send numbered ``requests``, ``depth`` at a time."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(load.depth, load.count)):
                group.create_task(_send(root, load, requests, progress))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _send(
    root: Root, load: Load, requests: Iterator[tuple[int, int]], progress: Callable[[int], None]
) -> None:
    """Send one request after the other, until there are no more."""
    writing = load.pattern is not None
    buffer = memoryview(bytearray([load.pattern or 0]) * load.size)
    beside = load.flush_interval if not load.drain else 0
    for number, offset in requests:
        if writing:
            await root.write(offset, buffer)
        else:
            await root.read_into(offset, buffer)
        if beside and number % beside == 0:
            await root.flush()
        if number % _REPORTED == 0:
            progress(number)
        # A request that did not have to wait must not keep the others from beginning.
        await asyncio.sleep(0)
