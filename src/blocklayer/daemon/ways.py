"""Ways into a device: who serves a device's medium (an export, the monitor) does so for the device.

1. A request waits for the device's limits before it enters the graph: it keeps nobody from changing
   the graph meanwhile, and one that is inside never waits.
2. Requests count from when they came, the wait for a limit included.
3. An error is judged by the device's policy. Where that is to ignore errors, only writes and their
   kin go on as if nothing had happened: a read that failed has no data to go on with.
4. When a way ends, what waits goes on at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.errors import BlockError, StorageError, UnsupportedError
from blocklayer.graph.root import RequestKind, Root
from blocklayer.graph.throttling import Member, ThrottleGroup

if TYPE_CHECKING:
    from blocklayer.daemon.devices import Device


class Way:
    """The front end of one root."""

    def __init__(self, device: Device, root: Root) -> None:
        self._device = device
        self._root = root
        self._member: Member | None = None
        device.ways.append(self)
        self.join(device.throttle_group)

    def join(self, group: ThrottleGroup | None) -> None:
        """Keep to the limits of ``group`` from now on; what waited for another's goes on."""
        if self._member is not None:
            if self._member.group is group:
                return
            self._member.begin_drain()
            self._member.leave()
        self._member = Member(group) if group is not None else None

    @property
    def limited(self) -> bool:
        """Whether requests may have to wait."""
        return self._member is not None

    async def passing(self, kind: RequestKind, length: int) -> None:
        """Wait for a request's turn; flushes never wait."""
        if self._member is not None and kind != "flush":
            await self._member.passing("read" if kind == "rd" else "write", length)

    def done(
        self, kind: RequestKind, offset: int, length: int, began_ns: int, error: object
    ) -> bool:
        """Count a request that has ended; whether its error is to be ignored."""
        accounting = self._device.accounting
        if error is None:
            accounting.done(kind, offset, length, began_ns)
        elif isinstance(error, StorageError):
            accounting.failure(kind, began_ns)
            reading = kind == "rd"
            action = self._device.judge("read" if reading else "write", error)
            return action == "ignore" and not reading
        elif isinstance(error, BlockError) and not isinstance(error, UnsupportedError):
            accounting.refusal(kind)
        return False

    def end(self) -> None:
        """The root serves the device no longer."""
        self._root.front_end = None
        self.join(None)
        self._device.ways.remove(self)
