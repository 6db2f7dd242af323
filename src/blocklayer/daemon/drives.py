"""``-drive``: a node, a drive by a name, and perhaps a device, all in one list of options.

1. Options that are not the drive's own are the node's, as ``blockdev-add`` has them; ``file`` and
   ``format`` stand for an image by its name.
2. The drive has the node to itself: it goes when the drive goes. If anything fails, nothing stays.
3. What has no ``readonly`` is opened for writing if it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.api.disk import CACHE_MODES
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.devices import Device, DeviceOptions
from blocklayer.errors import UsageError
from blocklayer.graph.filename import image_options
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image, open_options
from blocklayer.graph.options import decode
from blocklayer.graph.temporary import temporary_storage

Interface = Literal["ide", "scsi", "sd", "mtd", "floppy", "pflash", "virtio", "xen", "none"]
_PER_BUS: Final = {"ide": 2, "scsi": 7, "floppy": 2}
"""Devices that fit on one bus, where there are several buses."""


class DriveOptions(msgspec.Struct, kw_only=True, rename="kebab"):
    """The options that are the drive's own."""

    id: str = ""
    file: str | UnsetType = UNSET
    format: str | UnsetType = UNSET
    interface: Interface = msgspec.field(default="ide", name="if")
    bus: int | UnsetType = UNSET
    unit: int | UnsetType = UNSET
    index: int | UnsetType = UNSET
    media: Literal["disk", "cdrom"] = "disk"
    snapshot: bool = False
    cache: str = "writeback"
    aio: Literal["threads", "native", "io_uring"] | UnsetType = UNSET
    readonly: bool | UnsetType = UNSET
    read_only: bool | UnsetType = UNSET
    discard: Literal["ignore", "off", "unmap", "on"] = "ignore"
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    copy_on_read: bool = False
    werror: Literal["report", "ignore", "enospc", "stop", "auto"] = "auto"
    rerror: Literal["report", "ignore", "stop", "auto"] = "auto"
    serial: str | UnsetType = UNSET

    def check(self) -> None:
        """Raise UsageError for values that do not go together."""
        if self.cache not in CACHE_MODES:
            raise UsageError(f"invalid cache option: '{self.cache}'")
        if self.index is not UNSET and (self.bus is not UNSET or self.unit is not UNSET):
            raise UsageError("index cannot be used with bus and unit")
        if self.copy_on_read and self.is_read_only:
            raise UsageError("Can't use copy-on-read on read-only device")

    @property
    def is_read_only(self) -> bool:
        """Whether the drive refuses writes."""
        return self.media == "cdrom" or self.readonly is True or self.read_only is True


_OWN: Final = frozenset(DriveOptions.__struct_encode_fields__) | {"if"}


async def add(
    daemon: Daemon, given: Mapping[str, Any], *, snapshot: bool = False, plug: bool = True
) -> Device:
    """Make a drive of ``given`` (nested, values as text), and plug it in unless ``if=none``.

    ``snapshot``: what is written to it is thrown away in the end, even if its options do not say
    so. Without ``plug`` no device is made around it.
    """
    own = {name: value for name, value in given.items() if name in _OWN}
    node_options = {name: value for name, value in given.items() if name not in _OWN}
    if isinstance(own.get("file"), Mapping):
        # ``file.filename=…``: the node's own options, and no name.
        node_options["file"] = own.pop("file")
    if isinstance(own.get("cache"), Mapping):
        node_options["cache"] = own.pop("cache")
    options = decode(DriveOptions, own, "Block option")
    options.check()
    options.snapshot |= snapshot and options.media == "disk"
    device = Device(daemon, _device_options(options, plug=plug), drive=_name(daemon, options))
    if any(each.drive == device.drive for each in daemon.devices):
        raise UsageError(f"Device with id '{device.drive}' already exists")
    if options.file is UNSET and not node_options:
        daemon.devices.append(device)
        return device
    node = await _open(daemon, options, node_options)
    try:
        device.insert(node)
    except BaseException:
        await daemon.graph.release(node)
        raise
    daemon.devices.append(device)
    return device


def _name(daemon: Daemon, options: DriveOptions) -> str:
    if options.id:
        return options.id
    kind = "cd" if options.media == "cdrom" else "hd"
    interface = options.interface
    index = options.index
    if index is UNSET:
        bus = 0 if options.bus is UNSET else options.bus
        index = bus * _PER_BUS.get(interface, 0) + (0 if options.unit is UNSET else options.unit)
        if options.unit is UNSET:
            taken = {each.drive for each in daemon.devices}
            while _numbered(interface, kind, index) in taken:
                index += 1
    return _numbered(interface, kind, index)


def _numbered(interface: str, kind: str, index: int) -> str:
    if interface in _PER_BUS and interface != "floppy":
        bus, unit = divmod(index, _PER_BUS[interface])
        return f"{interface}{bus}-{kind}{unit}"
    return f"{interface}{index}"


def _device_options(options: DriveOptions, *, plug: bool) -> DeviceOptions:
    cd = options.media == "cdrom"
    drivers = {
        "ide": "ide-cd" if cd else "ide-hd",
        "scsi": "scsi-cd" if cd else "scsi-hd",
        "virtio": "virtio-blk-pci",
        "floppy": "floppy",
        "none": "",
    }
    driver = drivers.get(options.interface, "sd-card") if plug else ""
    write_through, _, _ = CACHE_MODES[options.cache]
    return DeviceOptions(
        driver=driver,
        rerror=options.rerror,
        werror=options.werror,
        serial=options.serial,
        write_cache="off" if write_through else "auto",
    )


async def _open(daemon: Daemon, options: DriveOptions, node_options: dict[str, Any]) -> Node:
    graph = daemon.graph
    _, direct, no_flush = CACHE_MODES[options.cache]
    flags = Flags(
        read_only=options.is_read_only or options.snapshot,
        auto_read_only=options.readonly is UNSET and options.read_only is UNSET,
        direct=direct,
        no_flush=no_flush,
        discard_unmap=options.discard in ("unmap", "on"),
        detect_zeroes=options.detect_zeroes,
    )
    wanted = node_options
    if options.file is not UNSET:
        format = None if options.format is UNSET else options.format
        wanted = {**image_options(options.file, graph.registry, format), **node_options}
    elif options.format is not UNSET:
        wanted = {"driver": options.format, **node_options}
    if options.aio is not UNSET and isinstance(wanted.get("file"), Mapping):
        wanted["file"] = {"aio": options.aio, **wanted["file"]}
    node = await open_image(graph, wanted, flags=flags)
    try:
        if options.snapshot:
            node = await _overlay(daemon, node)
        if options.copy_on_read:
            node = await open_options(graph, {"driver": "copy-on-read", "file": node.name}, flags)
    except BaseException:
        await graph.release(node)
        raise
    return node


async def _overlay(daemon: Daemon, base: Node) -> Node:
    graph = daemon.graph
    storage = await temporary_storage(graph, base.size)
    try:
        return await open_options(
            graph,
            {"driver": "qcow2", "file": storage.name, "backing": base.name},
            Flags(read_only=False, no_flush=True, discard_unmap=True),
        )
    except BaseException:
        await graph.release(storage)
        raise


async def remove(daemon: Daemon, name: str) -> None:
    """Take a drive's medium away, even while it is used, and the drive if no device has it."""
    device = next((each for each in daemon.devices if each.drive == name), None)
    if device is None:
        raise UsageError(f"Device '{name}' not found")
    if not device.options.driver:
        daemon.devices.remove(device)
        device.join(None)
    device.drive = ""
    await device.remove()
