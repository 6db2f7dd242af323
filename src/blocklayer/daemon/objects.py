"""User objects at run time: by paths, with properties, as QEMU's object model shows them.

1. Only what users made is there: ``/objects/ID``. Devices have their places (``daemon.devices``),
   and no properties here.
2. A property that is secret can be neither read nor changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.daemon.daemon import Daemon, DeviceNotFoundError
from blocklayer.errors import UsageError
from blocklayer.graph.objects import TYPES, UserObject, load_type


class ObjectPropertyInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A property: its name and the name of its type."""

    name: str
    type: str
    description: str | UnsetType = UNSET
    default_value: Any | UnsetType = UNSET


class ObjectTypeInfo(msgspec.Struct, kw_only=True, rename="kebab"):
    """A type of objects, and the type that it is a special kind of."""

    name: str
    abstract: bool | UnsetType = UNSET
    parent: str | UnsetType = UNSET


_TYPE: Final = ObjectPropertyInfo(name="type", type="string")
_PARENTS: Final = {
    "secret": "secret_common",
    "secret_keyring": "secret_common",
    "tls-creds-x509": "tls-creds",
    "tls-creds-psk": "tls-creds",
    "tls-creds-anon": "tls-creds",
    "authz-simple": "authz",
    "authz-list": "authz",
    "authz-list-file": "authz",
    "iothread": "event-loop-base",
}


def add(daemon: Daemon, qom_type: str, identifier: str, properties: Mapping[str, Any]) -> None:
    """Make an object."""
    try:
        daemon.graph.objects.add(qom_type, identifier, properties)
    except UsageError as error:
        # Hints on further lines are for command lines.
        raise UsageError(str(error).partition("\n")[0]) from None


def remove(daemon: Daemon, identifier: str) -> None:
    """Forget an object that nobody relies on."""
    daemon.graph.objects.remove(identifier)


def properties(daemon: Daemon, path: str) -> list[ObjectPropertyInfo]:
    """What is at ``path``: an object's properties, or the objects in a container."""
    steps = _steps(path)
    if not steps:
        return [_TYPE, ObjectPropertyInfo(name="objects", type="child<container>")]
    if steps == ["objects"]:
        return [_TYPE] + [
            ObjectPropertyInfo(name=name, type=f"child<{kind}>")
            for name, kind, _ in daemon.graph.objects
        ]
    kind, _ = _find(daemon, path, steps)
    return type_properties(kind)


def type_properties(kind: str) -> list[ObjectPropertyInfo]:
    """The properties that objects of type ``kind`` have."""
    if kind not in TYPES:
        raise DeviceNotFoundError(f"Class '{kind}' not found")
    fields = msgspec.structs.fields(load_type(kind).Properties)
    return [_TYPE] + [
        ObjectPropertyInfo(name=field.encode_name, type=_type_name(field.type)) for field in fields
    ]


def read(daemon: Daemon, path: str, name: str) -> Any:
    """The value of a property."""
    steps = _steps(path)
    if name == "type" and steps in ([], ["objects"]):
        return "container"
    if steps == ["objects"] and daemon.graph.objects.find(name) is not None:
        return f"/objects/{name}"
    kind, found = _find(daemon, path, steps)
    shown = {"type": kind, **found.shown()}
    if name not in shown:
        raise _no_property(kind, name)
    return shown[name]


def change(daemon: Daemon, path: str, name: str, value: Any) -> None:
    """Give a property another value."""
    kind, found = _find(daemon, path, _steps(path))
    if name not in found.shown():
        raise _no_property(kind, name)
    found.change(name, value)


def types(implements: str | None = None) -> list[ObjectTypeInfo]:
    """All types that users can make objects of."""
    known = [ObjectTypeInfo(name=name, parent=_PARENTS.get(name, "object")) for name in TYPES]
    if implements in (None, "object", "user-creatable"):
        return known
    return [info for info in known if implements in (info.name, info.parent)]


def _no_property(kind: str, name: str) -> UsageError:
    if any(info.name == name for info in type_properties(kind)):
        return UsageError(f"Property '{kind}.{name}' is secret, or fixed once it is made")
    return UsageError(f"Property '{kind}.{name}' not found")


def _steps(path: str) -> list[str]:
    return [step for step in path.split("/") if step]


def _find(daemon: Daemon, path: str, steps: list[str]) -> tuple[str, UserObject]:
    """What is at ``path``; a path that does not begin at the root is found anywhere."""
    relative = not path.startswith("/") and len(steps) == 1
    inside = len(steps) == 2 and steps[0] == "objects"
    found = daemon.graph.objects.find(steps[-1]) if relative or inside else None
    if found is None:
        raise DeviceNotFoundError(f"Device '{path}' not found")
    return found


def _type_name(annotation: Any) -> str:
    names = {str: "string", bool: "bool", int: "int"}
    for kind, name in names.items():
        if annotation is kind or kind in getattr(annotation, "__args__", ()):
            return name
    return (
        "string"
        if get_origin(annotation) is Literal
        else str(getattr(annotation, "__name__", "any"))
    )
