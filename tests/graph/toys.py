"""Two small drivers that the graph's own tests run on, so that they need no real format.

`ToyStorage` stores bytes in a named shelf and can hold requests back; `ToyFormat` maps clusters
listed in a JSON header to places in its storage, allocates new ones at the end, and has a backing
file. The header is written by `toy_image` only: what a test writes lives until the node closes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from msgspec import UNSET, UnsetType

from blocklayer.errors import FormatError, LockedError, StorageError
from blocklayer.graph.driver import BackingReference, Buffer, FormatDriver, ProtocolDriver
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.options import NodeOptions, Reference
from blocklayer.graph.permission import Permission
from blocklayer.graph.registry import Entry, Registry
from blocklayer.graph.root import Root

HEADER_SIZE = 4096
MAGIC = b"TOY!"

T = TypeVar("T")


class Shelf(dict[str, bytearray]):
    """All storage by name, and the names that are open now."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def reset(self) -> None:
        """Empty, for the next test."""
        self.clear()
        self.open.clear()


SHELF = Shelf()


class ToyStorageOptions(NodeOptions):
    """Options of `ToyStorage`."""

    filename: str = ""


class ToyStorage(ProtocolDriver):
    """Bytes on the shelf; `write_gate`, when set, holds writes back until it opens."""

    NAME: ClassVar[str] = "toy-storage"
    Options = ToyStorageOptions

    write_gate: asyncio.Event | None = None
    refuses_writers: ClassVar[set[str]] = set()

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Any]:
        return {"filename": name}

    async def open(self) -> None:
        options = self.node.options
        assert isinstance(options, ToyStorageOptions)
        self.name = options.filename
        if self.name not in SHELF:
            raise StorageError(f"Could not open '{self.name}': No such file or directory", 2)
        self.bytes = SHELF[self.name]
        self.permissions = (0, 15)
        self.writes: list[tuple[int, int]] = []
        SHELF.open.append(self.name)

    async def close(self) -> None:
        SHELF.open.remove(self.name)

    @property
    def size(self) -> int:
        return len(self.bytes)

    @property
    def filename(self) -> str:
        return self.name

    def identity(self) -> object:
        return self.name

    def apply_permissions(self, taken: int, shared: int) -> None:
        if self.name in self.refuses_writers and taken & Permission.WRITE:
            raise LockedError(f"Failed to get \"write\" lock on '{self.name}'")
        self.permissions = (taken, shared)

    async def read(self, offset: int, view: memoryview) -> None:
        data = self.bytes[offset : offset + len(view)]
        view[:] = bytes(data) + bytes(len(view) - len(data))

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.write_gate is not None:
            await self.write_gate.wait()
        data = b"".join(bytes(part) for part in buffers)
        if len(self.bytes) < offset + len(data):
            self.bytes.extend(bytes(offset + len(data) - len(self.bytes)))
        self.bytes[offset : offset + len(data)] = data
        self.writes.append((offset, len(data)))

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        del self.bytes[size:]
        self.bytes.extend(bytes(size - len(self.bytes)))


class ToyFormatOptions(NodeOptions):
    """Options of `ToyFormat`."""

    file: Reference | None = None
    backing: Reference | UnsetType | None = UNSET


class ToyFormat(FormatDriver):
    """Clusters of `unit` bytes, each somewhere in `file`, zero, or left to `backing`."""

    NAME: ClassVar[str] = "toy"
    Options = ToyFormatOptions
    supports_backing: ClassVar[bool] = True
    relocates: ClassVar[bool] = True

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(MAGIC) else 0

    async def open(self) -> None:
        options = self.node.options
        assert isinstance(options, ToyFormatOptions)
        storage = await self.node.open_child("file", options.file)
        head = bytearray(HEADER_SIZE)
        await storage.driver.read(0, memoryview(head))  # type: ignore[attr-defined]
        if not head.startswith(MAGIC):
            raise FormatError(f"'{storage.filename}' is not a toy image")
        header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
        self.unit: int = header["unit"]
        self.allocation_unit = self.zero_alignment = self.discard_alignment = self.unit
        self._size: int = header["size"]
        self._backing: list[str | None] | None = header["backing"]
        self.clusters: dict[int, int | None] = {int(k): v for k, v in header["clusters"].items()}
        self.allocated_at = max(storage.size, HEADER_SIZE)
        self.aborted = 0

    @property
    def size(self) -> int:
        return self._size

    @property
    def backing_reference(self) -> BackingReference | None:
        return BackingReference(*self._backing) if self._backing else None  # type: ignore[arg-type]

    async def map(self, offset: int, length: int) -> Extent:
        assert 0 <= offset < offset + length <= self.size
        index, within = divmod(offset, self.unit)
        run = min(length, self.unit - within)
        if index not in self.clusters:
            return Extent(offset, run, Kind.UNALLOCATED)
        place = self.clusters[index]
        if place is None:
            return Extent(offset, run, Kind.ZERO)
        child = self.node.children["file"]
        return Extent(offset, run, Kind.DATA, place + within, child, writable=True)

    async def allocate(self, offset: int, length: int) -> Allocation:
        index, head = divmod(offset, self.unit)
        length = min(length, self.unit - head)
        place, self.allocated_at = self.allocated_at, self.allocated_at + self.unit
        child = self.node.children["file"]
        tail = self.unit - head - length
        return Allocation(offset, length, child, place, head, tail, token=(index, place))

    async def commit(self, allocation: Allocation) -> None:
        index, place = allocation.token  # type: ignore[misc]
        self.clusters[index] = place
        self.node.mapping_changed()

    async def abort(self, allocation: Allocation) -> None:
        self.aborted += 1

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        assert offset % self.unit == 0
        for index in range(offset // self.unit, -(-(offset + length) // self.unit)):
            self.clusters[index] = None
        self.node.mapping_changed()

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        self._size = size


REGISTRY = Registry(
    {
        "toy-storage": Entry(f"{__name__}:ToyStorage", protocol=True, schemes=("shelf",)),
        "toy": Entry(f"{__name__}:ToyFormat", magics=((0, MAGIC),)),
        "raw": Entry("blocklayer.drivers.raw:RawDriver"),
    }
)


def toy_image(
    name: str,
    size: int,
    clusters: Mapping[int, bytes | None] | None = None,
    *,
    unit: int = 512,
    backing: str | None = None,
    backing_format: str | None = "toy",
) -> str:
    """Put an image on the shelf; `clusters` maps an index to its bytes, or to None for zeros."""
    name = f"shelf:{name}"
    image = bytearray(HEADER_SIZE)
    places: dict[int, int | None] = {}
    for index, data in (clusters or {}).items():
        places[index] = None if data is None else len(image)
        if data is not None:
            image += data.ljust(unit, b"\0")
    said = None if backing is None else [f"shelf:{backing}", backing_format]
    header = {"unit": unit, "size": size, "backing": said, "clusters": places}
    packed = MAGIC + json.dumps(header).encode()
    image[: len(packed)] = packed
    SHELF[name] = image
    return name


def new_graph(**arguments: Any) -> Graph:
    """A graph whose only drivers are the toys and raw."""
    return Graph(REGISTRY, **arguments)


async def open_root(
    graph: Graph,
    image: str | Mapping[str, Any],
    *,
    writable: bool = True,
    flags: Flags | None = None,
    shared: int = Permission.ALL,
    label: str = "a test",
    **arguments: Any,
) -> Root:
    """Open an image and take hold of it."""
    flags = flags or Flags(read_only=not writable, discard_unmap=True)
    node = await open_image(graph, image, flags=flags, **arguments)
    taken = int(Permission.CONSISTENT_READ)
    if writable:
        taken |= Permission.WRITE | Permission.RESIZE
    try:
        return Root(node, label, taken, shared)
    except BaseException:
        await graph.release(node)
        raise


def run(awaitable: Awaitable[T]) -> T:
    """Run a test's coroutine on a fresh loop."""

    async def main() -> T:
        return await awaitable

    return asyncio.run(main())
