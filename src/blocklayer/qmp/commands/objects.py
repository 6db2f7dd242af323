"""User objects, and the paths they are found by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon import objects
from blocklayer.graph.objects import TYPES, load_type
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments
from blocklayer.qmp.shapes import Variants


class _Common(msgspec.Struct, rename="kebab"):
    """What every object has."""

    qom_type: str
    id: str


def _types() -> Mapping[str, type[msgspec.Struct]]:
    return {name: load_type(name).Properties for name in TYPES}


_OPTIONS: Final = Variants(name="ObjectOptions", tag="qom-type", common=_Common, structs=_types)
ObjectOptions = Annotated[dict[str, Any], _OPTIONS]


class ObjectId(Arguments):
    """Which object."""

    id: str


class QomPath(Arguments):
    """Where in the tree."""

    path: str


class QomGet(Arguments):
    """Which property of what."""

    path: str
    property: str


class QomSet(Arguments):
    """Which property of what, and its new value."""

    path: str
    property: str
    value: Any


class QomListTypes(Arguments):
    """Only types that are a special kind of ``implements``; abstract ones are not listed."""

    implements: str | UnsetType = UNSET
    abstract: bool = False


class TypeName(Arguments):
    """Which type."""

    typename: str


@COMMANDS.command("object-add")
async def object_add(monitor: Monitor, arguments: ObjectOptions) -> None:
    """Make an object that nodes and servers can refer to."""
    options = dict(arguments)
    kind, identifier = options.pop("qom-type"), options.pop("id")
    objects.add(monitor.server.daemon, kind, identifier, options)


@COMMANDS.command("object-del")
async def object_del(monitor: Monitor, arguments: ObjectId) -> None:
    """Forget an object."""
    objects.remove(monitor.server.daemon, arguments.id)


@COMMANDS.command("qom-list")
async def qom_list(monitor: Monitor, arguments: QomPath) -> list[objects.ObjectPropertyInfo]:
    """What is at a path."""
    return objects.properties(monitor.server.daemon, arguments.path)


@COMMANDS.command("qom-get")
async def qom_get(monitor: Monitor, arguments: QomGet) -> Any:
    """The value of a property."""
    return objects.read(monitor.server.daemon, arguments.path, arguments.property)


@COMMANDS.command("qom-set")
async def qom_set(monitor: Monitor, arguments: QomSet) -> None:
    """Change a property."""
    objects.change(monitor.server.daemon, arguments.path, arguments.property, arguments.value)


@COMMANDS.command("qom-list-types")
async def qom_list_types(monitor: Monitor, arguments: QomListTypes) -> list[objects.ObjectTypeInfo]:
    """The types of objects that can be made."""
    return objects.types(None if arguments.implements is UNSET else arguments.implements)


@COMMANDS.command("qom-list-properties")
async def qom_list_properties(
    monitor: Monitor, arguments: TypeName
) -> list[objects.ObjectPropertyInfo]:
    """The properties that objects of a type have."""
    return objects.type_properties(arguments.typename)
