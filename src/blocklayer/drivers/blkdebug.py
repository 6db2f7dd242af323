"""`blkdebug`: a filter that makes requests fail, so that it can be seen what then happens.

A rule of ``inject-error`` is armed from the start (event ``none``) or by its event, and fails the
requests that it matches; ``set-state`` lets events change a number, which is asked for when an
event is to arm a rule.

1. A request that is made to fail has no effect on the child.
2. Only the events declared here exist: those that requests to the filter itself are.
"""

from __future__ import annotations

import errno as errnos
import os
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blocklayer.errors import StorageError
from blocklayer.graph.child import Role
from blocklayer.graph.driver import Buffer
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Node
from blocklayer.graph.options import NodeOptions, Reference
from blocklayer.units import SECTOR

Event = Literal[
    "none", "read_aio", "write_aio", "pwritev", "pwritev_zero", "pwritev_done", "flush_to_os",
    "flush_to_disk",
]  # fmt: skip
Operation = Literal["read", "write", "write-zeroes", "discard", "flush"]
State = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]

_BEFORE: Final[dict[Operation, tuple[Event, ...]]] = {
    "read": ("read_aio",),
    "write": ("pwritev", "write_aio"),
    "write-zeroes": ("pwritev", "pwritev_zero"),
    "discard": (),
    "flush": ("flush_to_os", "flush_to_disk"),
}
_AFTER: Final[dict[Operation, tuple[Event, ...]]] = {
    "write": ("pwritev_done",),
    "write-zeroes": ("pwritev_done",),
}


class InjectError(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """Which requests fail, and how; ``state`` 0 and no ``sector`` mean any."""

    event: Event
    state: State = 0
    iotype: Operation | UnsetType = UNSET
    errno: Annotated[int, Meta(ge=1, le=4095)] = errnos.EIO
    sector: Annotated[int, Meta(ge=0)] | UnsetType = UNSET
    once: bool = False
    immediately: bool = False
    """Before the request would have had to wait: it never does here."""


class SetState(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """At ``event``, in ``state`` (0: any), go to ``new_state``."""

    event: Event
    state: State = 0
    new_state: State = msgspec.field(name="new_state")


class BlkdebugOptions(NodeOptions, kw_only=True):
    """``image``: the node whose requests are to fail."""

    image: Reference
    inject_error: list[InjectError] = msgspec.field(default_factory=list)
    set_state: list[SetState] = msgspec.field(default_factory=list)


class BlkdebugDriver(FilterDriver):
    """The filter."""

    NAME = "blkdebug"
    Options = BlkdebugOptions
    sees_reads = True
    sees_writes = True

    async def open(self) -> None:
        """Open the child, and arm the rules that wait for no event."""
        options = self.node.options
        assert isinstance(options, BlkdebugOptions)
        await self.node.open_child("image", options.image, Role.FILTERED)
        self._options = options
        self._state = 1
        self._armed: list[InjectError] = [
            rule for rule in options.inject_error if rule.event == "none"
        ]

    @property
    def child(self) -> Node:
        """The node that is shown."""
        return self.node.children["image"].node

    async def map(self, offset: int, length: int) -> Extent:
        """All requests come here."""
        return Extent(offset, length, Kind.OPAQUE, writable=True)

    def _happens(self, event: Event) -> None:
        """Arm the rules of ``event``, and take its steps; both by the state that was."""
        state = self._state
        for rule in self._options.inject_error:
            if rule.event == event and rule.state in (0, state) and rule not in self._armed:
                self._armed.append(rule)
        for step in self._options.set_state:
            if step.event == event and step.state in (0, state):
                self._state = step.new_state

    def _begin(self, operation: Operation, offset: int = 0, length: int = 0) -> None:
        for event in _BEFORE[operation]:
            self._happens(event)
        for rule in self._armed:
            if _matches(rule, operation, offset, length):
                if rule.once:
                    self._armed.remove(rule)
                raise StorageError(
                    f"blkdebug: {operation} of {length:#x} bytes at {offset:#x} of "
                    f"'{self.child.name}' was made to fail: {os.strerror(rule.errno)}",
                    rule.errno,
                )

    def _end(self, operation: Operation) -> None:
        for event in _AFTER[operation]:
            self._happens(event)

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Pass on, or fail."""
        self._begin("read", offset, len(view))
        await super().read_opaque(offset, view)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Pass on, or fail."""
        self._begin("write", offset, len(data))
        await super().write_opaque(offset, data)
        self._end("write")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """Pass on, or fail."""
        self._begin("write-zeroes", offset, length)
        await super().write_zeroes(offset, length, unmap=unmap, fallback=fallback)
        self._end("write-zeroes")

    async def discard(self, offset: int, length: int) -> None:
        """Pass on, or fail."""
        self._begin("discard", offset, length)
        await super().discard(offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Pass on, or fail."""
        self._begin("write", offset, len(data))
        await super().write_compressed(offset, data)
        self._end("write")

    async def flush(self) -> None:
        """Pass on, or fail."""
        self._begin("flush")
        await super().flush()


def _matches(rule: InjectError, operation: Operation, offset: int, length: int) -> bool:
    if rule.iotype is not UNSET and rule.iotype != operation:
        return False
    if rule.sector is UNSET:
        return True
    # A flush has no place: only a rule without one is for it.
    return offset < (rule.sector + 1) * SECTOR and offset + length > rule.sector * SECTOR
