"""Limits of devices: `block_set_io_throttle`, and latency histograms.

1. Devices whose groups have the same name share its limits; a device that names none has a group of
   its own, by its name. A ``throttle-group`` object of that name is the group.
2. Without any limit a device is in no group. A group that no object stands for goes with its last
   device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from blocklayer.daemon.accounting import Histogram, Kind
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import UsageError
from blocklayer.graph.throttling import ThrottleGroup, ThrottleLimits

if TYPE_CHECKING:
    from blocklayer.daemon.devices import Device
    from blocklayer.daemon.info import BlockDeviceInfo

NAMES: Final = {
    f"{unit}{short}{suffix}": f"{unit}_{long}{suffix}"
    for suffix in ("", "_max", "_max_length")
    for unit in ("bps", "iops")
    for short, long in (("", "total"), ("_rd", "read"), ("_wr", "write"))
} | {"iops_size": "iops_size"}
"""The limits by the names that devices have for them, and those of ``ThrottleLimits``."""


def set_io_throttle(
    daemon: Daemon, device: Device, limits: ThrottleLimits, group: str | None = None
) -> None:
    """Give the device's group other limits. Raises UsageError, with nothing changed."""
    if device.node is None:
        raise UsageError(f"Device '{device.name}' has no medium")
    limits.check()
    before = device.throttle_group
    if not any(getattr(limits, NAMES[name]) for name in _RATES):
        device.join(None)
    else:
        name = group or (before.identifier if before is not None else device.name or device.path)
        wanted = _find(daemon, name)
        wanted.set_limits(limits)
        if wanted is not before:
            device.join(wanted)
    forget_unused(daemon)


_RATES: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def _find(daemon: Daemon, name: str) -> ThrottleGroup:
    _, known = daemon.graph.objects.find(name) or (None, None)
    if isinstance(known, ThrottleGroup):
        return known
    if name not in daemon.throttle_groups:
        daemon.throttle_groups[name] = ThrottleGroup(name, ThrottleLimits())
    return daemon.throttle_groups[name]


def forget_unused(daemon: Daemon) -> None:
    """Forget the groups that no device is in."""
    used = {device.throttle_group for device in daemon.devices}
    for name, group in list(daemon.throttle_groups.items()):
        if group not in used:
            del daemon.throttle_groups[name]


def show_limits(group: ThrottleGroup, info: BlockDeviceInfo) -> None:
    """Enter the group and its limits; what is not set is left out, but for the plain rates."""
    info.group = group.identifier
    for name in _RATES:
        setattr(info, name, getattr(group.limits, NAMES[name]))
        burst = getattr(group.limits, f"{NAMES[name]}_max")
        if burst:
            setattr(info, f"{name}_max", burst)
            length_s = getattr(group.limits, f"{NAMES[name]}_max_length")
            setattr(info, f"{name}_max_length", length_s)
    if group.limits.iops_size:
        info.iops_size = group.limits.iops_size


def set_latency_histograms(
    device: Device, common: Sequence[int] | None, by_kind: Mapping[Kind, Sequence[int] | None]
) -> None:
    """Begin histograms for the kinds that have boundaries, of their own or in ``common``; without
    any, forget all histograms. Raises UsageError, with nothing changed.
    """
    chosen = {kind: common if own is None else own for kind, own in by_kind.items()}
    made = {kind: Histogram(given) for kind, given in chosen.items() if given is not None}
    if made:
        device.accounting.histograms.update(made)
    else:
        device.accounting.histograms.clear()
