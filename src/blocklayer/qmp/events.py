"""Events: declared like commands, handed to every monitor that has negotiated.

1. An event's time is when it was emitted, also when it is delivered later.
2. A rate-limited event goes out at once if none of its kind went out in the last ``INTERVAL_S``;
   else it waits, and only the last one that waits goes out when that time is over. ``KEY`` names
   the members whose values tell kinds apart; ``limited`` can exempt one event.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from blocklayer.graph.events import Event


class Timer(Protocol):
    """What ``call_later`` returns."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What of an event loop the limits need."""

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer: ...


Listener = Callable[[dict[str, Any]], None]


class EventHub:
    """Where events come in and monitors listen. ``clock`` is the event loop."""

    def __init__(self, clock: Clock, now: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._now = now
        self._listeners: list[Listener] = []
        self._held: dict[tuple[Any, ...], dict[str, Any] | None] = {}
        """Kinds whose time is running, with the one that waits."""
        self._timers: dict[tuple[Any, ...], Timer] = {}

    def listen(self, listener: Listener) -> None:
        """From now on, call ``listener`` with every message."""
        self._listeners.append(listener)

    def unlisten(self, listener: Listener) -> None:
        """No longer call ``listener``."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def emit(self, event: Event) -> None:
        """Hand ``event`` to all who listen, now or when its limit allows."""
        message = self._message(event)
        if not event.INTERVAL_S or not event.limited():
            self._deliver(message)
            return
        kind = (event.NAME, *(getattr(event, name) for name in event.KEY))
        if kind in self._held:
            self._held[kind] = message
            return
        self._deliver(message)
        self._hold(kind, event.INTERVAL_S)

    def close(self) -> None:
        """Deliver what waits, and stop the clocks."""
        for timer in self._timers.values():
            timer.cancel()
        waiting = [message for message in self._held.values() if message is not None]
        self._timers, self._held = {}, {}
        for message in waiting:
            self._deliver(message)

    def _hold(self, kind: tuple[Any, ...], interval_s: float) -> None:
        self._held[kind] = None
        self._timers[kind] = self._clock.call_later(interval_s, self._release, kind, interval_s)

    def _release(self, kind: tuple[Any, ...], interval_s: float) -> None:
        message = self._held.pop(kind)
        del self._timers[kind]
        if message is not None:
            self._deliver(message)
            self._hold(kind, interval_s)

    def _message(self, event: Event) -> dict[str, Any]:
        seconds, fraction = divmod(self._now(), 1)
        timestamp = {"seconds": int(seconds), "microseconds": int(fraction * 1_000_000)}
        message = {"timestamp": timestamp, "event": event.NAME}
        data = msgspec.to_builtins(event)
        return {**message, "data": data} if event.__struct_fields__ else message

    def _deliver(self, message: dict[str, Any]) -> None:
        for listener in list(self._listeners):
            listener(message)
