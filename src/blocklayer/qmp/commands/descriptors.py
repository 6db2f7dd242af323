"""File descriptors that clients pass in with their commands."""

from __future__ import annotations

import os

from msgspec import UNSET, UnsetType

from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments, Result


class DescriptorName(Arguments):
    """The name of a descriptor."""

    fdname: str


class AddFd(Arguments):
    """Which set (a new one if none is named), and a note to find the descriptor by."""

    fdset_id: int | UnsetType = UNSET
    opaque: str | UnsetType = UNSET


class RemoveFd(Arguments):
    """Which set, and which descriptor of it (all if none is named)."""

    fdset_id: int
    fd: int | UnsetType = UNSET


class AddfdInfo(Result):
    """Where the descriptor is now."""

    fdset_id: int
    fd: int


class FdsetFdInfo(Result):
    """One descriptor of a set."""

    fd: int
    opaque: str | UnsetType = UNSET


class FdsetInfo(Result):
    """One set."""

    fdset_id: int
    fds: list[FdsetFdInfo]


@COMMANDS.command("getfd")
async def getfd(monitor: Monitor, arguments: DescriptorName) -> None:
    """Name the descriptor that came with this command; it stays until the client leaves."""
    name = arguments.fdname
    descriptor = monitor.take_descriptor()
    if name[:1].isdigit():
        os.close(descriptor)
        raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
    previous = monitor.named_descriptors.get(name)
    monitor.named_descriptors[name] = descriptor
    if previous is not None:
        os.close(previous)


@COMMANDS.command("closefd")
async def closefd(monitor: Monitor, arguments: DescriptorName) -> None:
    """Close a named descriptor."""
    descriptor = monitor.named_descriptors.pop(arguments.fdname, None)
    if descriptor is None:
        raise CommandError(f"File descriptor named '{arguments.fdname}' not found")
    os.close(descriptor)


@COMMANDS.command("add-fd")
async def add_fd(monitor: Monitor, arguments: AddFd) -> AddfdInfo:
    """Put the descriptor that came with this command into a set."""
    if arguments.fdset_id is not UNSET and arguments.fdset_id < 0:
        raise CommandError("Parameter 'fdset-id' expects a non-negative value")
    descriptor = monitor.take_descriptor()
    number = monitor.server.descriptor_sets.add(
        descriptor,
        None if arguments.fdset_id is UNSET else arguments.fdset_id,
        None if arguments.opaque is UNSET else arguments.opaque,
    )
    return AddfdInfo(fdset_id=number, fd=descriptor)


@COMMANDS.command("remove-fd")
async def remove_fd(monitor: Monitor, arguments: RemoveFd) -> None:
    """Close a descriptor of a set, or the whole set."""
    fd = None if arguments.fd is UNSET else arguments.fd
    monitor.server.descriptor_sets.remove(arguments.fdset_id, fd)


@COMMANDS.command("query-fdsets")
async def query_fdsets(monitor: Monitor) -> list[FdsetInfo]:
    """All sets."""
    return [
        FdsetInfo(
            fdset_id=number,
            fds=[
                FdsetFdInfo(fd=entry.fd, opaque=UNSET if entry.opaque is None else entry.opaque)
                for entry in held
            ],
        )
        for number, held in monitor.server.descriptor_sets.sets.items()
    ]
