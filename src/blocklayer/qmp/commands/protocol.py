"""The protocol itself: negotiation, introspection, the end."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.errors import CommandError, CommandNotFoundError
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments, Result
from blocklayer.qmp.schema import schema
from blocklayer.qmp.version import QEMU_VERSION, package


class Capabilities(Arguments):
    """``enable``: what of the greeting's capabilities the client wants."""

    enable: list[Literal["oob"]] | UnsetType = UNSET


class VersionTriple(Result):
    """A release."""

    major: int
    minor: int
    micro: int


class VersionInfo(Result):
    """The QEMU whose behaviour is followed, and the name of this program."""

    qemu: VersionTriple
    package: str


class CommandInfo(Result):
    """One command's name."""

    name: str


class NameInfo(Result):
    """The name the daemon was given, if it was."""

    name: str | UnsetType = UNSET


class SchemaInfo(Result):
    """One entry; which further members it has depends on ``meta-type``."""

    name: str
    meta_type: Literal["builtin", "enum", "array", "object", "alternate", "command", "event"]


@COMMANDS.command("qmp_capabilities")
async def qmp_capabilities(monitor: Monitor, arguments: Capabilities) -> None:
    """End the negotiation: from here on, commands and events."""
    if monitor.negotiated:
        raise CommandNotFoundError("Capabilities negotiation is already complete, command ignored")
    monitor.negotiate(oob=arguments.enable is not UNSET and "oob" in arguments.enable)


@COMMANDS.command("query-version")
async def query_version(monitor: Monitor) -> VersionInfo:
    """Which QEMU is followed, and what this program is."""
    major, minor, micro = QEMU_VERSION
    return VersionInfo(qemu=VersionTriple(major=major, minor=minor, micro=micro), package=package())


@COMMANDS.command("query-commands")
async def query_commands(monitor: Monitor) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name=command.name) for command in monitor.server.commands]


@COMMANDS.command("query-qmp-schema")
async def query_qmp_schema(monitor: Monitor) -> list[SchemaInfo]:
    """All commands, events and types, as clients may rely on them."""
    entries: list[Any] = schema(monitor.server.commands, monitor.server.event_types)
    return entries


@COMMANDS.command("query-name")
async def query_name(monitor: Monitor) -> NameInfo:
    """The name this daemon was given."""
    return NameInfo(name=UNSET if monitor.server.name is None else monitor.server.name)


@COMMANDS.command("quit")
async def quit(monitor: Monitor) -> None:
    """End the daemon: jobs are cancelled, caches are flushed, files are closed."""
    if monitor.server.stopping.is_set():
        raise CommandError("The daemon is ending already")
    monitor.server.quit()
