"""`throttle-group` objects: limits on requests and bytes, shared by all nodes that name the group.

Each limit is a leaky bucket: what passes fills it, time empties it at the limit's rate, and a
request waits until there is room. A burst limit lets more pass for a while: the bucket may then be
filled up to what the burst rate gives in the burst's length; a second one keeps to that rate.

1. Members wait in turn: the first of each, one member after the other, so that one with many
   requests does not keep the others out. Requests of one member pass in their order.
2. A member that is drained waits for nothing; what it does counts all the same.
3. No limit is ever a reason to fail.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.errors import UsageError
from blocklayer.graph.objects import UserObject

if TYPE_CHECKING:
    from blocklayer.graph.objects import Objects

Direction = Literal["read", "write"]

_MOST: Final = 1_000_000_000_000_000
_MOST_LENGTH_S: Final = (1 << 32) - 1
_SHORTEST_BURST: Final = 0.1
"""Without a burst limit as much as goes in this many seconds may pass at once."""
_LEAST_WAIT_S: Final = 1e-6
"""Less is an error of rounding, not worth a timer."""


class ThrottleLimits(
    msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Requests (``iops``) and bytes (``bps``) per second, bursts of them, and how long those may
    last, in seconds. 0: no limit. A request counts once for each ``iops-size`` bytes.
    """

    iops_total: int = 0
    iops_total_max: int = 0
    iops_total_max_length: int = 1
    iops_read: int = 0
    iops_read_max: int = 0
    iops_read_max_length: int = 1
    iops_write: int = 0
    iops_write_max: int = 0
    iops_write_max_length: int = 1
    bps_total: int = 0
    bps_total_max: int = 0
    bps_total_max_length: int = 1
    bps_read: int = 0
    bps_read_max: int = 0
    bps_read_max_length: int = 1
    bps_write: int = 0
    bps_write_max: int = 0
    bps_write_max_length: int = 1
    iops_size: int = 0

    def check(self) -> None:
        """Raise UsageError unless the limits make sense together."""
        for unit in ("bps", "iops"):
            for suffix in ("", "_max"):
                total, read, write = (
                    getattr(self, f"{unit}_{what}{suffix}") for what in ("total", "read", "write")
                )
                if total and (read or write):
                    raise UsageError(
                        "bps/iops/max total values and read/write values cannot be used at the "
                        "same time"
                    )
        if self.iops_size and not (self.iops_total or self.iops_read or self.iops_write):
            raise UsageError("iops size requires an iops value to be set")
        for unit in ("bps", "iops"):
            for what in ("total", "read", "write"):
                self._check_one(f"{unit}_{what}")

    def _check_one(self, name: str) -> None:
        rate, burst = getattr(self, name), getattr(self, f"{name}_max")
        length_s = getattr(self, f"{name}_max_length")
        if not (0 <= rate <= _MOST and 0 <= burst <= _MOST):
            raise UsageError(f"bps/iops/max values must be within [0, {_MOST}]")
        if not 0 <= length_s <= _MOST_LENGTH_S:
            raise UsageError(
                f"{name.replace('_', '-')}-max-length value must be in the range "
                f"[0, {_MOST_LENGTH_S}]"
            )
        if not length_s:
            raise UsageError("the burst length cannot be 0")
        if length_s > 1 and not burst:
            raise UsageError("burst length set without burst rate")
        if burst and not rate:
            raise UsageError("bps_max/iops_max require corresponding bps/iops values")
        if burst and burst < rate:
            raise UsageError("bps_max/iops_max cannot be lower than bps/iops")
        if burst * length_s > _MOST:
            raise UsageError("burst length too high for this burst rate")


class Bucket:
    """One limit. Levels are in requests or bytes, times in seconds of any one clock."""

    def __init__(self, rate: float, burst: float, length_s: int) -> None:
        self.rate = rate
        self.burst = burst
        self.capacity = burst * length_s if burst else rate * _SHORTEST_BURST
        self._level = 0.0
        self._burst_level = 0.0
        self._at_s = 0.0

    def wait_s(self, now_s: float) -> float:
        """How long until the next may pass."""
        self._leak(now_s)
        wait_s = (self._level - self.capacity) / self.rate
        if self.burst:
            over = self._burst_level - self.burst * _SHORTEST_BURST
            wait_s = max(wait_s, over / self.burst)
        return wait_s if wait_s > _LEAST_WAIT_S else 0.0

    def fill(self, amount: float, now_s: float) -> None:
        """Something has passed."""
        self._leak(now_s)
        self._level += amount
        self._burst_level += amount

    def _leak(self, now_s: float) -> None:
        passed_s = max(now_s - self._at_s, 0.0)
        self._at_s = max(now_s, self._at_s)
        self._level = max(self._level - passed_s * self.rate, 0.0)
        self._burst_level = max(self._burst_level - passed_s * self.burst, 0.0)


class Buckets:
    """All limits of a group."""

    def __init__(self, limits: ThrottleLimits) -> None:
        self._iops_size = limits.iops_size
        self._requests: dict[Direction, list[Bucket]] = {"read": [], "write": []}
        self._bytes: dict[Direction, list[Bucket]] = {"read": [], "write": []}
        directions: dict[str, tuple[Direction, ...]] = {
            "total": ("read", "write"), "read": ("read",), "write": ("write",),
        }  # fmt: skip
        for unit, places in (("iops", self._requests), ("bps", self._bytes)):
            for what, concerned in directions.items():
                name = f"{unit}_{what}"
                rate = getattr(limits, name)
                if rate:
                    bucket = Bucket(
                        rate, getattr(limits, f"{name}_max"), getattr(limits, f"{name}_max_length")
                    )
                    for direction in concerned:
                        places[direction].append(bucket)

    def wait_s(self, direction: Direction, now_s: float) -> float:
        """How long until a request may pass."""
        concerned = self._requests[direction] + self._bytes[direction]
        return max((bucket.wait_s(now_s) for bucket in concerned), default=0.0)

    def fill(self, direction: Direction, length: int, now_s: float) -> None:
        """A request has passed."""
        requests = 1.0
        if self._iops_size and length > self._iops_size:
            requests = length / self._iops_size
        for bucket in self._requests[direction]:
            bucket.fill(requests, now_s)
        for bucket in self._bytes[direction]:
            bucket.fill(length, now_s)


class Member:
    """One node's, or device's, part in a group: its requests that wait."""

    def __init__(self, group: ThrottleGroup, drained: int = 0) -> None:
        self.group = group
        self.drained = drained
        self.waiting: dict[Direction, deque[_Waiting]] = {"read": deque(), "write": deque()}
        group.members.append(self)

    async def passing(self, direction: Direction, length: int) -> None:
        """Wait for the turn of a request of ``length`` bytes."""
        await self.group.passing(self, direction, length)

    def begin_drain(self) -> None:
        """Let everything pass; nests with ``end_drain``."""
        self.drained += 1
        for direction in self.waiting:
            self.group.let_all_pass(self, direction)

    def end_drain(self) -> None:
        """Undo one ``begin_drain``."""
        self.drained -= 1

    def leave(self) -> None:
        """Nothing will come any more."""
        self.group.members.remove(self)


class _Waiting:
    __slots__ = ("_future", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def go(self) -> None:
        """It is its turn."""
        if not self._future.done():
            self._future.set_result(None)

    async def turn(self) -> None:
        """Wait for it."""
        await self._future


class ThrottleGroupProperties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """``limits`` may be changed at any time."""

    limits: ThrottleLimits | UnsetType = UNSET


class ThrottleGroup(UserObject):
    """A group, by its id."""

    Properties = ThrottleGroupProperties

    def __init__(self, identifier: str, limits: ThrottleLimits) -> None:
        self.identifier = identifier
        self.members: list[Member] = []
        self.limits = limits
        self._buckets = Buckets(limits)
        self._turn: dict[Direction, int] = {"read": 0, "write": 0}
        self._timers: dict[Direction, asyncio.TimerHandle | None] = {"read": None, "write": None}

    @classmethod
    def make(
        cls, objects: Objects, identifier: str, properties: ThrottleGroupProperties
    ) -> ThrottleGroup:
        """A group. Raises UsageError."""
        limits = ThrottleLimits() if properties.limits is UNSET else properties.limits
        limits.check()
        return cls(identifier, limits)

    @property
    def in_use(self) -> bool:
        """While nodes or devices are members."""
        return bool(self.members)

    def shown(self) -> dict[str, Any]:
        """All limits, also those that are not set."""
        return {"limits": {
            name: getattr(self.limits, field)
            for name, field in zip(
                ThrottleLimits.__struct_encode_fields__, ThrottleLimits.__struct_fields__,
                strict=True,
            )
        }}  # fmt: skip

    def change(self, name: str, value: Any) -> None:
        """Other limits, from the next request on. Raises UsageError."""
        from blocklayer.graph.options import decode

        if not isinstance(value, dict):
            raise UsageError("Invalid parameter type for 'limits', expected: object")
        limits = decode(ThrottleLimits, value, "Parameter")
        self.set_limits(limits)

    def set_limits(self, limits: ThrottleLimits) -> None:
        """Other limits, from the next request on. Raises UsageError."""
        limits.check()
        self.limits = limits
        self._buckets = Buckets(limits)
        for direction in self._timers:
            self._let_pass(direction)

    async def passing(self, member: Member, direction: Direction, length: int) -> None:
        """Wait until a request may pass."""
        now_s = asyncio.get_running_loop().time()
        free = not any(other.waiting[direction] for other in self.members)
        if member.drained or (free and not self._buckets.wait_s(direction, now_s)):
            self._buckets.fill(direction, length, now_s)
            return
        waiting = _Waiting(length)
        queue = member.waiting[direction]
        queue.append(waiting)
        self._set_timer(direction)
        try:
            await waiting.turn()
        except asyncio.CancelledError:
            if waiting in queue:
                queue.remove(waiting)
            raise

    def let_all_pass(self, member: Member, direction: Direction) -> None:
        """Whatever the limits are, ``member`` waits no more."""
        queue = member.waiting[direction]
        while queue:
            waiting = queue.popleft()
            self._buckets.fill(direction, waiting.length, asyncio.get_running_loop().time())
            waiting.go()

    def _set_timer(self, direction: Direction) -> None:
        if self._timers[direction] is None and any(m.waiting[direction] for m in self.members):
            loop = asyncio.get_running_loop()
            wait_s = self._buckets.wait_s(direction, loop.time())
            self._timers[direction] = loop.call_later(wait_s, self._let_pass, direction)

    def _let_pass(self, direction: Direction) -> None:
        """Those whose turn it is go on, as far as the limits allow."""
        timer, self._timers[direction] = self._timers[direction], None
        if timer is not None:
            timer.cancel()
        if not any(member.waiting[direction] for member in self.members):
            return
        now_s = asyncio.get_running_loop().time()
        while not self._buckets.wait_s(direction, now_s):
            waiting = self._next(direction)
            if waiting is None:
                return
            self._buckets.fill(direction, waiting.length, now_s)
            waiting.go()
        self._set_timer(direction)

    def _next(self, direction: Direction) -> _Waiting | None:
        """The first of the member whose turn it is."""
        count = len(self.members)
        for step in range(count):
            index = (self._turn[direction] + step) % count
            queue = self.members[index].waiting[direction]
            if queue:
                self._turn[direction] = index + 1
                return queue.popleft()
        return None
