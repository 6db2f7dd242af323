"""The contracts: what a driver must answer, and what it may assume.

There are three kinds. A **protocol driver** stores bytes. A **format driver** maps guest bytes to
its children and moves none of them. A **filter driver** shows one child, changed on the way
(``graph.filter``).

1. All methods run on the graph's one event loop; between two ``await`` nothing else runs.
2. Offsets and lengths are in bytes and lie within ``size``; ``graph.io`` has checked that. Those of
   ``zero`` and ``discard`` are multiples of ``zero_alignment`` and ``discard_alignment``, except
   that a range may end at ``size``.
3. ``graph.io`` never runs two of ``allocate … commit``, ``zero``, ``discard`` and
   ``write_compressed`` at once on ranges that meet when rounded out to ``allocation_unit``.
4. A driver whose mapping changes calls ``node.mapping_changed()`` before it returns.
5. Host space that a driver frees may still be read or written by requests that began before: it is
   reused only after ``node.graph.epochs.passed(epoch)`` for the epoch noted when it was freed, and
   only after the metadata that freed it is on stable storage (R2).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec

from blocklayer.errors import UnsupportedError
from blocklayer.graph.checking import CheckResult, Rehearsal
from blocklayer.graph.child import Role
from blocklayer.graph.extent import Allocation, Extent, Kind
from blocklayer.graph.options import AmendOptions, CreateOptions, NodeOptions
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.graph.permission import Permission

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node
    from blocklayer.graph.streams import ImageStream

Buffer = bytes | bytearray | memoryview


class BackingReference(msgspec.Struct, frozen=True):
    """What an image says of its backing file: the name as stored, and the format if stored."""

    filename: str
    format: str | None = None


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """One internal snapshot, as ``info`` and ``snapshot -l`` show it; sizes in bytes."""

    icount: int | None = None
    vm_clock_nsec: int
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    id: str
    vm_state_size: int


class DriverInfo(msgspec.Struct, kw_only=True):
    """What ``info`` shows of any format; ``cluster_size`` is 0 where there are no clusters."""

    cluster_size: int = 0
    vm_state_offset: int = 0
    """Where the state of a virtual machine would start, past the end of the disk."""
    dirty: bool = False
    encrypted: bool = False
    snapshots: list[SnapshotInfo] = []


class BitmapShape(msgspec.Struct, frozen=True):
    """What the size of a persistent bitmap follows from; ``granularity`` in bytes."""

    name: str
    granularity: int


class Measurement(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """How large the file of a new image would be, in bytes."""

    bitmaps: int | None = None
    """What the source's persistent bitmaps would add; None if not both ends can have any."""
    required: int
    """With the source's data, or empty."""
    fully_allocated: int
    """Once every byte of the disk has been written."""


class Measured(msgspec.Struct, frozen=True):
    """An existing disk that a new image is measured for."""

    data: AsyncIterator[tuple[int, int]]
    """(offset, length) of what does not read as zeros, in order; neighbours may touch."""
    bitmaps: Sequence[BitmapShape] | None
    """Its persistent bitmaps; None if its format has none."""


class ThreadSafeIO(Protocol):
    """Blocking byte access that any thread may use at any time, for bulk copies."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; bytes past the end read as zeros."""

    def write(self, offset: int, data: Buffer) -> None:
        """Store all of ``data`` at ``offset``."""


class Driver:
    """What every driver answers. ``node.options`` holds the decoded ``Options`` when ``open``
    runs.
    """

    NAME: ClassVar[str]
    Options: ClassVar[type[NodeOptions]] = NodeOptions
    CreateOptions: ClassVar[type[CreateOptions] | None] = None
    supports_backing: ClassVar[bool] = False
    supports_snapshots: ClassVar[bool] = False
    """Images can hold internal snapshots: a format that says so answers to ``snapshot_…``."""

    zero_alignment: int = 1
    discard_alignment: int = 1
    request_alignment: int = 1
    """What offsets and lengths are rounded out to below here: block size of direct I/O."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """How sure the driver is, 0…100, that an image starting with ``head`` is of its format."""
        return 0

    async def open(self) -> None:
        """Open children and read what is needed to answer. On error nothing stays open."""
        raise UnsupportedError(f"Driver '{self.NAME}' cannot be opened")

    async def close(self) -> None:
        """Write back what is cached; the graph detaches the children afterwards."""

    async def retire(self) -> bool:
        """Nobody writes any more, and the node is about to be read-only: write back what ``close``
        would. False if it has to be closed and opened anew for that; True if it can go on as it is.
        """
        return False

    @property
    def size(self) -> int:
        """Bytes the node shows."""
        raise UnsupportedError(f"Driver '{self.NAME}' has no size")

    async def map(self, offset: int, length: int) -> Extent:
        """The extent that starts at ``offset``; at most ``length`` long, as long as it can tell."""
        raise UnsupportedError(f"Driver '{self.NAME}' has no mapping")

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, which lies within one OPAQUE extent, from guest ``offset``."""
        raise UnsupportedError(f"Driver '{self.NAME}' has no transformed data")

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Store ``data``, which lies within one OPAQUE and writable extent."""
        raise UnsupportedError(f"Driver '{self.NAME}' cannot write transformed data")

    async def flush(self) -> None:
        """When it returns, all that was acknowledged before is on stable storage (R3)."""

    def begin_drain(self) -> None:
        """Somebody waits for the requests in flight to end: hold none back. Nests."""

    def end_drain(self) -> None:
        """Undo one ``begin_drain``."""

    async def come_to_rest(self) -> None:
        """Wait until nothing is going on that outlived the request it was begun for; drained.

        Never fails.
        """

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeros without writing it; ``unmap`` allows freeing the space.

        Raises UnsupportedError when only writing zeros would do; the caller then does that.
        """
        raise UnsupportedError(f"Driver '{self.NAME}' cannot zero a range quickly")

    async def discard(self, offset: int, length: int) -> None:
        """The range's contents are of no more use. Raises UnsupportedError if nothing can be
        done.
        """
        raise UnsupportedError(f"Driver '{self.NAME}' does not support discard")

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change ``size``. A grown area reads as zeros. ``shrink`` allows losing the tail."""
        raise UnsupportedError(f"Image format driver '{self.NAME}' does not support resize")

    def apply_permissions(self, taken: int, shared: int) -> None:
        """All users together take ``taken`` and share ``shared`` of this node.

        Raises LockedError, having changed nothing, if that cannot be had.
        """

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """What this node takes and shares of ``child`` while its own users take and share that."""
        return taken, shared

    def actual_size(self) -> int | None:
        """Bytes of host storage in use by this node itself, if that is known."""
        return None

    def info(self) -> DriverInfo | None:
        """What every format has an answer to; None where that is not known (``null-co``)."""
        return None

    def specific_info(self) -> msgspec.Struct | None:
        """The "format specific information" of ``info``; kebab-case when encoded."""
        return None

    def check_bitmap_storable(self, name: str, granularity: int) -> None:
        """Raise UnsupportedError or UsageError unless a new bitmap could be kept in the image."""
        raise UnsupportedError(
            f"Can't store persistent bitmaps to '{self.node.filename}': Operation not supported"
        )

    async def remove_stored_bitmap(self, name: str) -> None:
        """The image is to hold the bitmap no more; it may never have."""

    @property
    def stores_bitmaps(self) -> bool:
        """Whether the image can hold persistent bitmaps."""
        return False

    def warnings(self) -> list[str]:
        """What a user should be told of the image as it was found."""
        return []

    @classmethod
    async def measure(
        cls, options: AnyCreateOptions, size: int, source: Measured | None
    ) -> Measurement:
        """How large the file of a new image of ``size`` bytes would be, filled from ``source``."""
        raise UnsupportedError(f"Block driver '{cls.NAME}' does not support size measurement")


class ProtocolDriver(Driver):
    """Stores bytes. Reads past the end of what is stored return zeros."""

    filename_option: ClassVar[str | None] = "filename"
    """The option that a plain name given for this driver stands for."""

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, Any]:
        """Options that ``name`` (``"null-co://"``, ``"disk.raw"``) stands for."""
        return {cls.filename_option: name} if cls.filename_option else {}

    @property
    def filename(self) -> str | None:
        """A plain name that opens the same thing, if there is one."""
        return None

    def identity(self) -> object | None:
        """Equal for two nodes that store to the same place; None if that cannot be told."""
        return None

    @classmethod
    def identity_of(cls, options: Mapping[str, Any]) -> object | None:
        """The ``identity`` that a node opened with ``options`` would have, if that can be told."""
        return None

    async def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``."""
        raise UnsupportedError(f"Driver '{self.NAME}' cannot read")

    async def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Store ``buffers``, one after the other. All or an error: never a short write."""
        raise UnsupportedError(f"Driver '{self.NAME}' cannot write")

    def read_now(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if that needs no waiting at all; False: use ``read``."""
        return False

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store ``data`` if that needs no waiting at all; False: nothing was done, use ``write``.

        Only for a node that takes writes: nothing is checked here.
        """
        return False

    async def map(self, offset: int, length: int) -> Extent:
        """All of it is data, here, unless a driver knows better."""
        return Extent(offset, length, Kind.DATA, offset, None, writable=True)

    def take_over(self, old: ProtocolDriver) -> None:
        """This driver, just opened, follows ``old`` on the same node: take its locks, or contents
        that live in memory. Must not wait; raises BlockError, having changed nothing.
        """

    def thread_safe_io(self) -> ThreadSafeIO | None:
        """Access for bulk copies in threads, or None if all must go through the loop."""
        return None

    @classmethod
    async def create(cls, graph: Graph, filename: str, options: CreateOptions) -> None:
        """Make new storage of ``options.size`` bytes that reads as zeros."""
        raise UnsupportedError(f"Protocol driver '{cls.NAME}' does not support image creation")


class FormatDriver(Driver):
    """Maps. Its mapping may change, its data is moved by ``graph.io`` only."""

    allocation_unit: int = 1
    """Bytes that are allocated as one: writes into one unit are serialised while it is
    allocated.
    """
    relocates: ClassVar[bool] = False
    """Whether the place of guest bytes can change (if not, writes need no serialising)."""
    holds_zeros: bool = True
    """A range can read as zeros, whatever is below it, without space of its own."""
    new_reads_zero: ClassVar[bool] = True
    """Whether a new image reads as zeros where nothing was written."""

    @classmethod
    def amend_options(cls) -> type[AmendOptions] | None:
        """The options that ``amend`` takes; None if nothing of an image can be changed."""
        return None

    def child_permissions(self, child: Child, taken: int, shared: int) -> tuple[int, int]:
        """A format needs its storage unchanged by others, and only reads its backing."""
        if child.role is Role.BACKING:
            # A parent that copes with changing data copes with a changing backing file.
            below = int(Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED)
            if shared & Permission.WRITE:
                below |= Permission.WRITE | Permission.RESIZE
            return taken & Permission.CONSISTENT_READ, below
        wanted = taken | Permission.CONSISTENT_READ
        if not self.node.flags.read_only:
            wanted |= Permission.WRITE | Permission.RESIZE
        else:
            wanted &= ~(Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE)
        lent = int(Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED)
        if self.node.flags.force_share:
            lent = int(Permission.ALL)
        return wanted, lent

    @property
    def backing_reference(self) -> BackingReference | None:
        """What the image's header says of its backing file."""
        return None

    async def storage_has_holes(self) -> bool:
        """Whether to ask the child of a ``recurse`` extent; only block status needs to know."""
        return True

    async def allocate(self, offset: int, length: int) -> Allocation:
        """Set space aside for a write at ``offset`` of up to ``length`` bytes; readers see no
        change.
        """
        raise UnsupportedError(f"Format '{self.NAME}' is read-only")

    async def commit(self, allocation: Allocation) -> None:
        """The space holds its data: let readers see it."""

    async def abort(self, allocation: Allocation) -> None:
        """The space could not be filled: give it back."""

    def pack(self, data: Buffer, level: int | None = None) -> bytes | None:
        """One unit (or the image's tail) compressed; None if that gains nothing. In any thread."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support compressed writes")

    async def write_packed(self, offset: int, parts: Sequence[bytes]) -> None:
        """Store what ``pack`` made of the units from ``offset`` on."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support compressed writes")

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Store one cluster (or the image's tail) compressed; empty ``data`` ends the stream."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support compressed writes")

    async def change_backing(self, reference: BackingReference | None) -> None:
        """Rewrite what the header says of the backing file. The graph is not changed."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support changing the backing file")

    async def amend(
        self, options: AmendOptions, progress: Callable[[int, int], None], *, force: bool = False
    ) -> None:
        """Change what ``options`` say; no request is in flight. ``progress(done, total)``.

        ``force`` allows what may make the disk's data unreadable.
        """
        raise UnsupportedError(f"Format driver '{self.NAME}' does not support option amendment")

    async def make_empty(self) -> None:
        """Drop everything this layer holds, so that the backing child shows through."""
        raise UnsupportedError(f"Format '{self.NAME}' cannot be emptied")

    async def snapshot_create(self, name: str) -> SnapshotInfo:
        """Keep what the disk holds now inside the image. Of these four, each is called drained
        (``graph.snapshots`` sees to that), and an identifier is that of a known snapshot.
        """
        raise UnsupportedError(f"Format '{self.NAME}' does not support internal snapshots")

    async def snapshot_apply(self, identifier: str) -> None:
        """Let the disk hold what it held at a snapshot; its size may change."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support internal snapshots")

    async def snapshot_delete(self, identifier: str) -> None:
        """Drop a snapshot and what only it held."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support internal snapshots")

    async def snapshot_load(self, identifier: str) -> None:
        """Until it is closed, let the read-only node show a snapshot in place of the disk."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support internal snapshots")

    async def prepare_vm_state(self, length: int) -> int:
        """Make room for VM state of ``length`` bytes; 0 asks for none. The answer is the offset
        behind the disk at which ``map`` and ``allocate`` then know it.
        """
        raise UnsupportedError(f"Format '{self.NAME}' cannot hold the state of a virtual machine")

    async def check(self, repair: frozenset[str]) -> CheckResult:
        """Compare all metadata; ``repair`` is a subset of {"leaks", "errors"}."""
        raise UnsupportedError(f"Format '{self.NAME}' does not support checks")

    async def rehearse(self, repair: frozenset[str]) -> Rehearsal:
        """What ``check`` with ``repair`` would find and write; nothing is written."""
        raise UnsupportedError(f"Format '{self.NAME}' cannot tell what a repair would do")

    @classmethod
    def stream(cls, options: AnyCreateOptions, *, compress: bool, level: int | None) -> ImageStream:
        """A new image made with ``options``, to be written in one pass (``graph.streams``)."""
        raise UnsupportedError(
            f"Format '{cls.NAME}' cannot be written as a stream: use raw, qcow2 or vmdk"
        )

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: CreateOptions) -> None:
        """Write a new, empty image to ``target``, an open writable protocol node of size 0."""
        raise UnsupportedError(f"Format driver '{cls.NAME}' does not support image creation")
