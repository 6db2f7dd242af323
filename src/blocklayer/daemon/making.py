"""Jobs on images rather than on disks in use: create, amend, and internal snapshots.

1. These jobs take effect by themselves, and stay listed until they are dismissed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.job_control import new_id
from blocklayer.errors import UsageError
from blocklayer.graph.driver import Driver, FormatDriver, ProtocolDriver
from blocklayer.graph.node import Node
from blocklayer.graph.options import Reference
from blocklayer.graph.registry import Registry
from blocklayer.jobs.amend import Amend
from blocklayer.jobs.create import Create
from blocklayer.jobs.disk_snapshots import (
    DiskSnapshots,
    SnapshotDelete,
    SnapshotLoad,
    SnapshotSave,
)
from blocklayer.jobs.group import Group
from blocklayer.jobs.job import Job

UInt64 = Annotated[int, Meta(ge=0, le=(1 << 64) - 1)]

_OTHER_NAMES: Final[dict[str, dict[str, tuple[str, Any]]]] = {
    "qcow2": {"compat": ("version", Literal["v2", "v3"])},
}
"""By driver: what ``-o`` calls an option, and what it is called, and can be, here."""


def create_options(registry: Registry, driver: str) -> type[msgspec.Struct]:
    """The declaration of what ``blockdev-create`` takes for ``driver``, ``driver`` aside.

    Drivers that make no images take nothing.
    """
    return _declare(registry.load(driver))


def _declare(driver: type[Driver]) -> type[msgspec.Struct]:
    declared = driver.CreateOptions
    fields: dict[str, Any] = {}
    if declared is not None:
        where = _storage_name(driver)
        fields[where] = (where, Reference if where == "file" else str)
        for field in msgspec.structs.fields(declared):
            name, kind = _name_here(driver, field.encode_name, field.type)
            group, dot, _ = name.partition(".")
            if dot:
                # Its members are looked at when the job decodes them.
                name, kind = group, dict[str, Any]
            optional = (
                (kind, None) if field.default is None else (kind | msgspec.UnsetType, msgspec.UNSET)
            )
            fields[name] = (name, kind) if name == "size" else (name, *optional)
    return msgspec.defstruct(
        f"BlockdevCreateOptions{driver.NAME.title()}",
        [(name.replace("-", "_"), *rest) for name, *rest in fields.values()],
        rename="kebab",
        kw_only=True,
    )


def _name_here(driver: type[Driver], name: str, kind: Any) -> tuple[str, Any]:
    """What QMP calls the option that ``-o`` calls ``name``, and what it can be."""
    name, kind = _OTHER_NAMES.get(driver.NAME, {}).get(name, (name, kind))
    notes = [note for note in get_args(kind)[1:] if isinstance(note, Meta)]
    if any((note.extra or {}).get("size") for note in notes):
        kind = UInt64
    return name.replace("_", "-"), kind


def _storage_name(driver: type[Driver]) -> str:
    """The option that says where the image goes: a name for a protocol, else a node."""
    if issubclass(driver, ProtocolDriver):
        return driver.filename_option or "filename"
    return "file"


async def blockdev_create(daemon: Daemon, job_id: str, options: Mapping[str, Any]) -> Job:
    """Begin to make an image, or a file. ``options`` name the driver, and are named as in QMP."""
    name = str(options.get("driver"))
    if name not in daemon.graph.registry.table:
        raise UsageError(f"Parameter 'driver' does not accept value '{name}'")
    driver = daemon.graph.registry.load(name)
    if driver.CreateOptions is None:
        raise UsageError("Driver does not support blockdev-create")
    storage, values = _sorted(driver, options)
    job = Create(
        daemon.graph, driver, storage, values, identifier=new_id(daemon, job_id), auto_dismiss=False
    )
    return _begin(daemon, job)


def _sorted(driver: type[Driver], options: Mapping[str, Any]) -> tuple[Reference, dict[str, Any]]:
    """Where to store the image, and the options of the image itself as ``-o`` names them."""
    where = _storage_name(driver)
    if where not in options:
        raise UsageError(f"Parameter '{where}' is missing")
    assert driver.CreateOptions is not None
    names = driver.CreateOptions.__struct_encode_fields__
    known = {_name_here(driver, name, None)[0]: name for name in names}
    rest = {name: value for name, value in options.items() if name not in ("driver", where)}
    values = {known.get(name, name): value for name, value in _flat(rest)}
    return options[where], values


def _flat(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``options`` with the members of objects named after them, with a dot."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            for member, inner in _flat(value):
                yield f"{name}.{member}", inner
        else:
            yield name, value


async def blockdev_amend(
    daemon: Daemon, job_id: str, node_name: str, options: Mapping[str, Any]
) -> Job:
    """Begin to change what an image is. ``options`` name its driver."""
    node = daemon.graph.nodes.get(node_name)
    if node is None:
        raise UsageError(f"Cannot find device='' nor node-name='{node_name}'")
    if options.get("driver") != node.driver.NAME:
        raise UsageError("x-blockdev-amend doesn't support changing the block driver")
    declared = node.driver.amend_options() if isinstance(node.driver, FormatDriver) else None
    if declared is None:
        raise UsageError("Driver does not support x-blockdev-amend")
    known = {name.replace("_", "-"): name for name in declared.__struct_encode_fields__}
    rest = {name: value for name, value in options.items() if name != "driver"}
    values = {known.get(name, name): value for name, value in _flat(rest)}
    identifier = new_id(daemon, job_id)
    return _begin(daemon, Amend(node, values, identifier=identifier, auto_dismiss=False))


def check_vmstate(name: str, devices: Sequence[str]) -> None:
    """Raise UsageError unless the disk that is to hold a machine's state is one of ``devices``."""
    if name not in devices:
        raise UsageError(f"vmstate block device '{name}' does not exist")


def snapshot_save(daemon: Daemon, job_id: str, tag: str, devices: Sequence[str]) -> Job:
    """Begin to take a snapshot ``tag`` of all ``devices``, at one moment."""
    return _snapshots(daemon, SnapshotSave, job_id, tag, devices)


def snapshot_load(daemon: Daemon, job_id: str, tag: str, devices: Sequence[str]) -> Job:
    """Begin to let all ``devices`` go back to a snapshot."""
    return _snapshots(daemon, SnapshotLoad, job_id, tag, devices)


def snapshot_delete(daemon: Daemon, job_id: str, tag: str, devices: Sequence[str]) -> Job:
    """Begin to delete a snapshot from the ``devices`` that have it."""
    return _snapshots(daemon, SnapshotDelete, job_id, tag, devices)


def _snapshots(
    daemon: Daemon, kind: type[DiskSnapshots], job_id: str, tag: str, devices: Sequence[str]
) -> Job:
    if not devices:
        raise UsageError("No block devices given: name at least one in 'devices'")
    nodes: list[Node] = []
    for name in devices:
        nodes.append(daemon.find(name))
        if nodes[-1].busy:
            raise UsageError(f"Node '{name}' is busy: {nodes[-1].busy}")
    identifier = new_id(daemon, job_id)
    return _begin(daemon, kind(nodes, tag, identifier=identifier, auto_dismiss=False))


def _begin(daemon: Daemon, job: Job) -> Job:
    group = Group(daemon.jobs)
    group.add(job)
    group.start()
    return job
