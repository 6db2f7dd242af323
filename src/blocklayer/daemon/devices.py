"""Devices: front ends with a medium, as a guest would have them; told apart from nodes.

1. A device has an id and a medium (a hold on a node), or none: its drive is empty. The hold follows
   the graph: an overlay, a filter or a pivot is under the device at once.
2. ``-drive`` makes a drive by a name of its own, with no device around it until one takes it.
3. There is no guest: a device takes requests from who serves it (an export of its node, the human
   monitor), so it lets others write as well unless ``share-rw=off`` says no. For the same reason it
   goes as soon as it is told to, and trays open when they are told to.
4. Requests that fail are judged by ``rerror`` and ``werror``; a device that stops on errors stops
   the machine, which then is paused until ``cont``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon.accounting import Accounting
from blocklayer.daemon.daemon import Daemon, DeviceNotFoundError
from blocklayer.daemon.ways import Way
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.events import (
    BlockErrorAction,
    BlockIoError,
    DeviceDeleted,
    DeviceTrayMoved,
    IoOperationType,
    Resume,
    Stop,
)
from blocklayer.graph.node import Node
from blocklayer.graph.options import Size, decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.graph.throttling import Member, ThrottleGroup

ErrorPolicy = Literal["auto", "report", "ignore", "enospc", "stop"]

DISKS: Final = frozenset(
    (
        "virtio-blk",
        "virtio-blk-pci",
        "virtio-blk-pci-non-transitional",
        "virtio-blk-device",
        "virtio-blk-ccw",
        "scsi-hd",
        "scsi-block",
        "ide-hd",
        "nvme",
        "nvme-ns",
        "usb-storage",
        "sd-card",
    )
)
"""Drivers of devices whose medium stays in them."""
CDS: Final = frozenset(("scsi-cd", "ide-cd"))
REMOVABLE: Final = CDS | {"floppy"}
CONTROLLERS: Final = frozenset(
    ("virtio-scsi", "virtio-scsi-pci", "ahci", "ich9-ahci", "lsi53c895a", "qemu-xhci", "isa-fdc")
)
"""Drivers that hold other devices: there is nothing to them here but their ids."""


class DeviceOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The properties that devices here have. Where a device sits on a bus means nothing."""

    driver: str
    id: str = ""
    drive: str | UnsetType = UNSET
    serial: str | UnsetType = UNSET
    rerror: ErrorPolicy = "auto"
    werror: ErrorPolicy = "auto"
    share_rw: bool = True
    write_cache: Literal["auto", "on", "off"] = "auto"
    removable: bool | UnsetType = UNSET
    logical_block_size: Size | UnsetType = msgspec.field(default=UNSET, name="logical_block_size")
    physical_block_size: Size | UnsetType = msgspec.field(default=UNSET, name="physical_block_size")
    discard_granularity: Size | UnsetType = msgspec.field(default=UNSET, name="discard_granularity")
    bootindex: int | UnsetType = UNSET
    account_invalid: Literal["auto", "on", "off"] = "auto"
    account_failed: Literal["auto", "on", "off"] = "auto"
    wwn: str | UnsetType = UNSET
    vendor: str | UnsetType = UNSET
    product: str | UnsetType = UNSET
    num_queues: int | UnsetType = UNSET
    iothread: str | UnsetType = UNSET
    bus: str | UnsetType = UNSET
    addr: str | UnsetType = UNSET
    unit: int | UnsetType = UNSET
    channel: int | UnsetType = UNSET
    scsi_id: int | UnsetType = UNSET
    lun: int | UnsetType = UNSET
    device_id: str | UnsetType = msgspec.field(default=UNSET, name="device_id")


class Device:
    """One front end."""

    def __init__(self, daemon: Daemon, options: DeviceOptions, *, drive: str = "") -> None:
        self.daemon = daemon
        self.options = options
        self.drive = drive
        """The name that ``-drive`` gave; "" if the medium was given as a node."""
        self.medium: Root | None = None
        self.tray_open = False
        self.io_status: Literal["ok", "failed", "nospace"] = "ok"
        self.accounting = Accounting(
            failed=options.account_failed != "off", invalid=options.account_invalid != "off"
        )
        self._seat: Member | None = None
        """Keeps its throttle group in use even while no requests can come."""
        self.ways: list[Way] = []
        """Those by which requests come in."""

    @property
    def id(self) -> str:
        """The device's own id; "" if it has none, or is a drive that no device has taken."""
        return self.options.id

    @property
    def name(self) -> str:
        """What to call it: the drive's name, else the device's id."""
        return self.drive or self.id

    @property
    def path(self) -> str:
        """Where it is in the object tree; "" for a drive that no device has taken."""
        if not self.options.driver:
            return ""
        path = f"/machine/peripheral/{self.id}" if self.id else "/machine/peripheral-anon"
        return f"{path}/virtio-backend" if self.options.driver.startswith("virtio-blk") else path

    @property
    def removable(self) -> bool:
        """Whether its medium can be taken out."""
        return self.options.driver in REMOVABLE or self.options.removable is True

    @property
    def has_tray(self) -> bool:
        """Whether there is a tray that opens; floppies are pulled out."""
        return self.options.driver in REMOVABLE

    @property
    def node(self) -> Node | None:
        """The node that is its medium."""
        return self.medium.node if self.medium is not None else None

    @property
    def throttle_group(self) -> ThrottleGroup | None:
        """Whose limits its requests keep to; ``daemon.limits`` sets it."""
        return self._seat.group if self._seat is not None else None

    @property
    def policies(self) -> tuple[str, str]:
        """What read and write errors lead to."""
        read = "report" if self.options.rerror == "auto" else self.options.rerror
        write = "enospc" if self.options.werror == "auto" else self.options.werror
        return read, write

    def insert(self, node: Node) -> None:
        """Take ``node`` as the medium. Raises LockedError if its users do not fit."""
        taken = int(Permission.CONSISTENT_READ)
        if not node.read_only and self.options.driver not in CDS:
            taken |= Permission.WRITE
        shared = int(Permission.ALL)
        if not self.options.share_rw:
            shared &= ~Permission.WRITE
        self.medium = Root(
            node,
            f"device '{self.name}'",
            taken,
            shared,
            write_through=self.options.write_cache == "off",
        )
        for export in self.daemon.exports.values():
            self.meet(export.root)

    def meet(self, root: Root) -> None:
        """Requests that come by ``root`` are the device's, if they are for its medium."""
        if root.front_end is None and root.node is self.node:
            root.front_end = Way(self, root)

    def join(self, group: ThrottleGroup | None) -> None:
        """From now on its requests keep to the limits of ``group``; None: to none."""
        if self._seat is not None:
            self._seat.leave()
        self._seat = Member(group) if group is not None else None
        for way in self.ways:
            way.join(group)

    async def remove(self) -> None:
        """Give the medium back."""
        for way in list(self.ways):
            way.end()
        medium, self.medium = self.medium, None
        if medium is not None:
            await medium.close()

    def move_tray(self, *, to_open: bool) -> None:
        """Open or close the tray."""
        if self.has_tray and self.tray_open != to_open:
            self.tray_open = to_open
            self.daemon.graph.notify(
                DeviceTrayMoved(device=self.drive, id=self.id, tray_open=to_open)
            )

    def judge(self, operation: IoOperationType, error: BlockError) -> BlockErrorAction:
        """A request has failed: what becomes of it, after everybody was told."""
        policy = self.policies[operation == "write"]
        full = error.errno == errno.ENOSPC
        action: BlockErrorAction = "report"
        if policy == "ignore":
            action = "ignore"
        elif policy == "stop" or (policy == "enospc" and full):
            action = "stop"
        if action == "stop" and self.io_status == "ok":
            self.io_status = "nospace" if full else "failed"
        node = self.node
        self.daemon.graph.notify(
            BlockIoError(
                qom_path=self.path,
                device=self.drive,
                node_name=node.name if node is not None else UNSET,
                operation=operation,
                action=action,
                nospace=full,
                reason=str(error),
            )
        )
        if action == "stop":
            stop(self.daemon, "io-error")
        return action


def meet(daemon: Daemon, root: Root) -> None:
    """``root`` is a new user: its requests are those of the device whose medium it uses, if any."""
    for device in daemon.devices:
        device.meet(root)


def find(daemon: Daemon, *, device: str | None = None, id: str | None = None) -> Device:
    """The device of that id or path, or the drive of that name. Raises DeviceNotFoundError."""
    if device is None and id is None:
        raise UsageError("Need exactly one of 'device' and 'id'")
    if device is not None and id is not None:
        raise UsageError("Need exactly one of 'device' and 'id'")
    for each in daemon.devices:
        if (device is not None and device in (each.drive, each.id)) or (
            id is not None and id in (each.id, each.path, f"/machine/peripheral/{each.id}")
        ):
            return each
    raise DeviceNotFoundError(f"Device '{device if device is not None else id}' not found")


async def add(daemon: Daemon, given: Mapping[str, Any]) -> Device | None:
    """Plug a device in: ``driver``, ``id``, ``drive`` (a node's or a drive's name), and others."""
    options = decode(DeviceOptions, given, "Property")
    if options.driver in CONTROLLERS:
        return None
    if options.driver not in DISKS | REMOVABLE:
        raise UsageError(f"'{options.driver}' is not a valid device model name")
    if options.id and any(each.id == options.id for each in daemon.devices):
        raise UsageError(f"Duplicate device ID '{options.id}'")
    if options.drive is UNSET:
        if options.driver not in REMOVABLE:
            raise UsageError("drive property not set")
        device = Device(daemon, options)
        daemon.devices.append(device)
        return device
    drive = next((each for each in daemon.devices if each.drive == options.drive), None)
    if drive is not None:
        return await _take_drive(drive, options)
    node = daemon.graph.nodes.get(options.drive)
    if node is None:
        raise UsageError(f"Property '{options.driver}.drive' can't find value '{options.drive}'")
    device = Device(daemon, options)
    device.insert(node)
    daemon.devices.append(device)
    return device


async def _take_drive(drive: Device, options: DeviceOptions) -> Device:
    """Put a device around a drive."""
    if drive.options.driver:
        raise UsageError(f"Drive '{drive.drive}' is already in use by another block device")
    before, node = drive.options, drive.node
    if options.rerror == "auto":
        options.rerror = before.rerror
    if options.werror == "auto":
        options.werror = before.werror
    if options.write_cache == "auto":
        options.write_cache = before.write_cache
    # What the device takes and shares is its own: the drive's hold is made anew.
    if node is not None:
        assert drive.medium is not None
        old = drive.medium
        drive.options = options
        try:
            drive.insert(node)
        except BaseException:
            drive.options, drive.medium = before, old
            raise
        await old.close()
    drive.options = options
    drive.accounting.failed = options.account_failed != "off"
    drive.accounting.invalid = options.account_invalid != "off"
    return drive


async def delete(daemon: Daemon, id: str) -> None:
    """Unplug a device; a drive that it took goes with it."""
    device = find(daemon, id=id)
    daemon.devices.remove(device)
    device.join(None)
    path = f"/machine/peripheral/{device.id}"
    try:
        await device.remove()
    finally:
        daemon.graph.notify(DeviceDeleted(device=device.id, path=path))


async def close_all(daemon: Daemon) -> None:
    """Give all media back. Raises the first error met."""
    failure: BlockError | None = None
    while daemon.devices:
        try:
            await daemon.devices.pop().remove()
        except BlockError as error:
            failure = failure or error
    if failure is not None:
        raise failure


def stop(daemon: Daemon, status: str = "paused") -> None:
    """The machine stands still: there is none, but whoever watches is told."""
    if daemon.status == "running":
        daemon.status = status
        daemon.graph.notify(Stop())


def resume(daemon: Daemon) -> None:
    """The machine goes on; devices that had stopped try again."""
    for device in daemon.devices:
        device.io_status = "ok"
    if daemon.status != "running":
        daemon.status = "running"
        daemon.graph.notify(Resume())
