"""Limits on events, with a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blocklayer.graph.events import BlockIoError, JobStatusChange
from blocklayer.qmp.events import EventHub


class Call:
    def __init__(self, at: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.at = at
        self.run = lambda: callback(*args)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.25
        self.calls: list[Call] = []

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Call:
        self.calls.append(Call(self.now + delay, callback, args))
        return self.calls[-1]

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [call for call in self.calls if call.at <= self.now and not call.cancelled]
        self.calls = [call for call in self.calls if call not in due]
        for call in due:
            call.run()


def failure(device: str, reason: str, action: Any = "report") -> BlockIoError:
    return BlockIoError(
        qom_path=f"/{device}", device=device, operation="read", action=action, reason=reason
    )


def hub_with_log() -> tuple[Clock, EventHub, list[dict[str, Any]]]:
    clock = Clock()
    hub = EventHub(clock, now=lambda: clock.now)
    log: list[dict[str, Any]] = []
    hub.listen(log.append)
    return clock, hub, log


def reasons(log: list[dict[str, Any]]) -> list[str]:
    return [f"{message['data']['device']} {message['data']['reason']}" for message in log]


def test_an_event_on_the_wire() -> None:
    _, hub, log = hub_with_log()
    hub.emit(JobStatusChange(id="j", status="created"))
    assert log == [
        {
            "timestamp": {"seconds": 1000, "microseconds": 250000},
            "event": "JOB_STATUS_CHANGE",
            "data": {"id": "j", "status": "created"},
        }
    ]


def test_the_first_goes_out_and_the_last_follows() -> None:
    clock, hub, log = hub_with_log()
    for n in range(5):
        hub.emit(failure("a", f"{n}"))
        clock.advance(0.1)
    assert reasons(log) == ["a 0"]
    clock.advance(0.5)
    assert reasons(log) == ["a 0", "a 4"]
    # It bears the time when it happened, not when it was told.
    assert log[1]["timestamp"] == {"seconds": 1000, "microseconds": 650000}
    hub.emit(failure("a", "5"))
    clock.advance(0.9)
    assert reasons(log) == ["a 0", "a 4"]
    clock.advance(0.1)
    assert reasons(log) == ["a 0", "a 4", "a 5"]
    clock.advance(1)
    assert clock.calls == []
    hub.emit(failure("a", "6"))
    assert reasons(log)[-1] == "a 6"


def test_each_device_has_its_own_limit_and_a_stop_has_none() -> None:
    _, hub, log = hub_with_log()
    hub.emit(failure("a", "1"))
    hub.emit(failure("b", "1"))
    hub.emit(failure("a", "2"))
    hub.emit(failure("a", "3", action="stop"))
    assert reasons(log) == ["a 1", "b 1", "a 3"]


def test_closing_tells_what_still_waits() -> None:
    clock, hub, log = hub_with_log()
    hub.emit(failure("a", "1"))
    hub.emit(failure("a", "2"))
    hub.close()
    assert reasons(log) == ["a 1", "a 2"]
    clock.advance(5)
    assert len(log) == 2


def test_who_stopped_listening_hears_nothing() -> None:
    _, hub, log = hub_with_log()
    hub.unlisten(log.append)
    hub.emit(JobStatusChange(id="j", status="null"))
    assert log == []
