"""Extents: the one answer to "where do these guest bytes live, and for how long a run".

1. An extent starts exactly at the offset that was asked for and has ``length`` > 0.
2. ``DATA``: the bytes are ``child``'s, from ``host_offset`` on, unchanged; ``child is None`` means
   that the node itself stores them (a protocol driver).
3. ``ZERO`` reads as zeros without asking anybody. With a ``host_offset`` the space is reserved.
4. ``UNALLOCATED``: this layer has nothing; the backing child shows through, zeros past its end.
   With a ``host_offset`` the space is reserved.
5. ``OPAQUE``: the driver must transform the bytes (compressed, encrypted) or wants to see each
   request; it is asked each time.
6. ``writable`` promises that a write of the whole run may go to ``host_offset`` at once, without
   telling the driver. It holds until the node's ``generation`` changes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.driver import Buffer
    from blocklayer.graph.node import Node


class Kind(enum.Enum):
    """How a run of guest bytes is stored."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"
    OPAQUE = "opaque"


class Extent(msgspec.Struct, frozen=True, gc=False):
    """A run of guest bytes, stored in one way by one node. Offsets and lengths in bytes."""

    offset: int
    length: int
    kind: Kind
    host_offset: int | None = None
    child: Child | None = None
    writable: bool = False
    compressed: bool = False
    recurse: bool = False
    """The child may know that it reads as zeros (preallocated space): ask it for block status."""


class Allocation(msgspec.Struct, gc=False):
    """Space that a driver set aside for a write, not yet visible to readers.

    The space starts at ``host_offset`` in ``child`` and holds ``head + length + tail`` bytes: the
    write's own ``length`` bytes from guest ``offset`` on, and before and after them bytes that the
    writer must copy from what the guest reads there now. The mapping changes only in
    ``FormatDriver.commit``.
    """

    offset: int
    length: int
    child: Child
    host_offset: int
    head: int = 0
    tail: int = 0
    reads_zero: bool = False
    """The space is known to read as zeros (it lies past the child's end): zeros need no write."""
    token: object = None
    """The driver's own note."""
    seal: Callable[[Buffer], Buffer] | None = None
    """Makes of the ``head + length + tail`` bytes what the space must hold (encrypted, say); it may
    run in any thread. With it, the space is written as a whole.
    """


class Run(msgspec.Struct, frozen=True, gc=False):
    """An extent followed down to where its bytes end: what a read of ``node`` would find.

    ``layer`` is the node of the backing chain that holds the run, ``depth`` its distance from the
    node that was asked (0: the node itself). For DATA, ``storage`` is the protocol node with the
    bytes and ``host_offset`` their place in it; for OPAQUE, ``storage`` is the node to ask and
    ``host_offset`` the guest offset within it. ``present`` is False where no layer has anything.
    """

    offset: int
    length: int
    kind: Kind
    layer: Node
    depth: int
    storage: Node | None = None
    host_offset: int | None = None
    compressed: bool = False
    present: bool = True
    hole: bool = False
    """Mapped as data, but its storage says that it reads as zeros (preallocated space)."""

    @property
    def end(self) -> int:
        """The first offset after the run."""
        return self.offset + self.length
