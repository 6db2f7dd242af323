"""Images on crashing disks, with a note of what a guest may find at every moment.

A `Bench` does requests and notes, by the position in the disk's log, which contents may be found
from there on (`Versions`). `survive` then cuts the power everywhere and looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from blocklayer.errors import BlockError
from blocklayer.graph.checking import CheckResult
from blocklayer.graph.create import create_image
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.crashing import CrashingDisk, State, registry
from blocklayer.testing.model import Chain, Versions
from blocklayer.testing.strategies import Request

REGISTRY = registry()
KEY = {"encrypt": {"key-secret": "one"}}
"""What opens an encrypted image."""


def new_graph() -> Graph:
    """A graph that knows the secret."""
    graph = Graph(REGISTRY)
    graph.objects.add_secret("one", b"a passphrase")
    return graph


async def take(
    disk: CrashingDisk, *, writable: bool = True, format: str = "qcow2", **options: Any
) -> Root:
    """Open the image on `disk` on a graph of its own, and take hold of it."""
    file = {"driver": "crashing", "filename": disk.name}
    # What a pair of disks (`pairs`) has for its second.
    options = {**getattr(disk, "options", {}), **options}
    flags = Flags(read_only=not writable, discard_unmap=True)
    graph = new_graph()
    node = await open_image(graph, {"driver": format, "file": file, **options}, flags=flags)
    taken = int(Permission.CONSISTENT_READ)
    if writable:
        taken |= Permission.WRITE | Permission.RESIZE
    try:
        return Root(node, "a test", taken)
    except BaseException:
        await graph.release(node)
        raise


def driver_of(root: Root) -> FormatDriver:
    assert isinstance(root.node.driver, FormatDriver)
    return root.node.driver


async def check(root: Root, *repair: str) -> CheckResult:
    """What the driver's check finds."""
    driver = root.node.driver
    assert isinstance(driver, FormatDriver)
    return await driver.check(frozenset(repair))


async def new_image(
    size: int, *, base: CrashingDisk | None = None, base_format: str = "raw", **options: Any
) -> CrashingDisk:
    """A new image on a new disk, on stable storage."""
    disk = CrashingDisk()
    values = {"cluster_size": 512, **options}
    backing = None if base is None else base.name
    await create_image(
        new_graph(),
        disk.name,
        "qcow2",
        values,
        size=size,
        backing=backing,
        backing_format=None if base is None else base_format,
    )
    disk.settle()
    return disk


def raw_disk(content: bytes) -> CrashingDisk:
    """A disk that holds `content`."""
    disk = CrashingDisk()
    disk.pages.write(0, content)
    disk.settle()
    return disk


class Bench:
    """An open image, and what a guest may find of it after a power failure, and when."""

    def __init__(self, disk: CrashingDisk, root: Root, content: bytes, options: Any) -> None:
        self.disk = disk
        self.root = root
        self.options = options
        self.unit = 512
        """What the disk stores whole; 1 where several writes to one sector are lost singly."""
        self.model = Chain(len(content))
        self.model.write(0, content)
        self.versions = Versions(content)
        self.marks = [(disk.position, self.versions.copy())]

    @classmethod
    async def open(cls, disk: CrashingDisk, **options: Any) -> Bench:
        """Open what is on `disk`; all of it is on stable storage."""
        root = await take(disk, **options)
        return cls(disk, root, await read_all(root), options)

    def mark(self) -> None:
        """From here on, these contents may be found."""
        self.marks.append((self.disk.position, self.versions.copy()))

    def begin(self, content: bytes) -> None:
        """A request begins that will leave `content`."""
        self.versions.begin(content)
        self.mark()

    async def do(self, kind: str, offset: int, length: int, fill: int = 0) -> None:
        """Send a request."""
        request = Request(kind, offset, length, fill)
        if kind == "discard":
            zeroed = bytearray(self.model.visible())
            zeroed[offset : offset + length] = bytes(length)
            self.begin(bytes(zeroed))
        request.apply(self.model)
        self.begin(self.model.visible())
        await apply(self.root, request)
        if kind == "discard":
            self.model.settle(await read_all(self.root))
            self.begin(self.model.visible())

    async def write(self, offset: int, length: int, fill: int) -> None:
        """Write."""
        await self.do("write", offset, length, fill)

    async def resize(self, size: int) -> None:
        """Change the size."""
        self.model.resize(size)
        self.begin(self.model.visible())
        await self.root.truncate(size, shrink=True)

    async def flush(self) -> None:
        """Flush: what was done before must be found from now on."""
        await self.root.flush()
        self.versions.flushed()
        self.mark()

    async def reopen(self) -> None:
        """Close and open again."""
        await self.root.close()
        self.root = await take(self.disk, **self.options)
        self.model.settle(await read_all(self.root))

    def allowed(self, position: int) -> Versions:
        """What may be found after so many requests."""
        return next(v for at, v in reversed(self.marks) if at <= position)

    def explain(self, position: int, content: bytes) -> str | None:
        """Why `content` must not be found after so many requests, or None."""
        return self.allowed(position).explain(content, self.unit)


def moments(disk: CrashingDisk) -> Iterator[State]:
    """Every state that the disk may be in after every prefix of its log."""
    for position in range(disk.position + 1):
        yield from disk.states(position)


def spread(states: Iterable[State], most: int) -> list[State]:
    """All states, or `most` of them from beginning to end."""
    every = list(states)
    step = max(1, -(-len(every) // most))
    return list(islice(every, 0, None, step))


async def survive(bench: Bench, states: Iterable[State], *, depth: int = 10) -> int:
    """Open and judge each state; the answer is how many different ones there were.

    Every `depth`th is repaired and written to as well.
    """
    seen: set[tuple[bytes, int]] = set()
    for state in states:
        content = b"".join(
            index.to_bytes(8, "big") + page for index, page in sorted(state.pages.pages.items())
        )
        key = (content, id(bench.allowed(state.position)))
        if key in seen:
            continue
        seen.add(key)
        try:
            await _judge(bench, state, thorough=len(seen) % depth == 0)
        except BlockError as error:
            raise AssertionError(f"{state}: {error}") from error
    return len(seen)


async def _judge(bench: Bench, state: State, *, thorough: bool) -> None:
    disk = state.disk()
    root = await take(disk, **bench.options)
    try:
        content = await read_all(root)
        await judge_raw(root, content)
        problem = bench.explain(state.position, content)
        assert problem is None, f"{state}: {problem}"
        found = await check(root)
        assert not found.corruptions, f"{state}: {found.messages}"
        assert not found.check_errors, f"{state}: {found.messages}"
    finally:
        await root.close()
    if thorough:
        await _go_on(disk, bench.options, content, state)


async def judge_raw(root: Root, content: bytes) -> None:
    """The data file of an image that calls it raw is the disk, byte for byte."""
    image = getattr(root.node.driver, "image", None)
    if image is not None and image.data_file_raw:
        assert bytes(await image.data.read(0, len(content))) == content, "the raw file differs"


async def _go_on(disk: CrashingDisk, options: Any, content: bytes, state: State) -> None:
    """The image is as good as new: leaks can be mended, and it takes writes."""
    root = await take(disk, **options)
    await check(root, "leaks", "errors")
    # References past the end of the file are not looked for, here as in QEMU: they may stay.
    found = await check(root)
    assert not found.leaks, f"{state}: after repair: {found.messages}"
    assert await read_all(root) == content, f"{state}: repair changed the content"
    new = b"\xa5" * min(3000, len(content))
    await root.write(0, new)
    await root.close()
    root = await take(disk, **options)
    found = await check(root)
    assert not found.corruptions, f"{state}: after repair and a write: {found.messages}"
    assert await read_all(root) == new + content[len(new) :], f"{state}: after repair and a write"
    await root.close()
