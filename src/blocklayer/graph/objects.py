"""User objects: what a user defines by an id, for nodes, jobs and exports to refer to (secrets).

1. An object exists whole or not at all: making it checks everything first.
2. Ids are unique; an object that another one was made from may go, since nothing is kept of it.
3. What an object was made from never appears in an error or in an object's ``repr``.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import msgspec

from blocklayer.errors import UsageError
from blocklayer.graph.options import decode, parse_pairs, unflatten

if TYPE_CHECKING:
    from blocklayer.graph.secret import Secret

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9.\-_]*\Z")

TYPES: Final = {
    "secret": "blocklayer.graph.secret:Secret",
    "throttle-group": "blocklayer.graph.throttling:ThrottleGroup",
    "tls-creds-x509": "blocklayer.graph.tls_credentials:TlsCredentials",
    "authz-simple": "blocklayer.graph.authorization:SimpleAuthorization",
    "authz-list": "blocklayer.graph.authorization:ListAuthorization",
}
"""Type names as ``--object`` and ``object-add`` have them, and where their classes are."""


AnyObject = TypeVar("AnyObject", bound="UserObject")


class UserObject:
    """Base of every type of object."""

    Properties: ClassVar[type[msgspec.Struct]]

    @classmethod
    def make(cls, objects: Objects, identifier: str, properties: Any) -> UserObject:
        """A new object; ``properties`` is a decoded ``Properties``. Raises UsageError."""
        raise AssertionError(f"{cls.__name__} cannot be made")

    @property
    def in_use(self) -> bool:
        """Whether somebody relies on it, so that it must stay."""
        return False

    def shown(self) -> dict[str, Any]:
        """Its properties as they are now, but for what is secret."""
        return {}

    def change(self, name: str, value: Any) -> None:
        """Give a property of ``shown`` another value. Raises UsageError."""
        raise UsageError(f"Property '{name}' cannot be changed")


def load_type(qom_type: str) -> type[UserObject]:
    """The class of a type in ``TYPES``."""
    module, _, name = TYPES[qom_type].partition(":")
    kind: type[UserObject] = getattr(importlib.import_module(module), name)
    return kind


class Objects:
    """All user objects of one graph (or of one command), by id."""

    def __init__(self) -> None:
        self._known: dict[str, UserObject] = {}
        self._types: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, str, UserObject]]:
        """(id, type, object) of each."""
        return ((name, self._types[name], made) for name, made in self._known.items())

    def find(self, identifier: str) -> tuple[str, UserObject] | None:
        """The type and object of that id."""
        found = self._known.get(identifier)
        return (self._types[identifier], found) if found is not None else None

    def add(self, qom_type: str, identifier: str, properties: Mapping[str, Any]) -> None:
        """Make an object. Raises UsageError and changes nothing if that cannot be."""
        if qom_type not in TYPES:
            raise UsageError(f"Parameter 'qom-type' does not accept value '{qom_type}'")
        if not _ID.match(identifier):
            raise UsageError(
                "Parameter 'id' expects an identifier\n"
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            )
        kind = load_type(qom_type)
        decoded = decode(kind.Properties, properties)
        made = kind.make(self, identifier, decoded)
        if identifier in self._known:
            raise UsageError(
                f"attempt to add duplicate property '{identifier}' to object (type 'container')"
            )
        self._known[identifier], self._types[identifier] = made, qom_type

    def add_secret(self, identifier: str, data: bytes) -> None:
        """Make a secret of ``data``, in place of one of that id."""
        from blocklayer.graph.secret import Secret

        self._known[identifier], self._types[identifier] = Secret(identifier, data), "secret"

    def define(self, text: str) -> None:
        """Make the object that the argument of ``--object`` describes."""
        if text.startswith("{"):
            try:
                members = json.loads(text)
            except (ValueError, RecursionError):
                # Not quoted: it may hold a secret.
                raise UsageError("Could not parse the JSON of an object") from None
        else:
            members = unflatten(parse_pairs(text, implied="qom-type"))
        for name in ("qom-type", "id"):
            if not isinstance(members.get(name), str):
                raise UsageError(f"Parameter '{name}' is missing")
        self.add(members.pop("qom-type"), members.pop("id"), members)

    def remove(self, identifier: str) -> None:
        """Forget an object. Raises UsageError if there is none of that id, or it is in use."""
        found = self._known.get(identifier)
        if found is None:
            raise UsageError(f"object '{identifier}' not found")
        if found.in_use:
            raise UsageError(f"object '{identifier}' is in use, can not be deleted")
        del self._known[identifier], self._types[identifier]

    def get(self, identifier: str, kind: type[AnyObject]) -> AnyObject:
        """The object of that id, which is of ``kind``. Raises UsageError."""
        found = self._known.get(identifier)
        if found is None:
            raise UsageError(f"No object with id '{identifier}'")
        if not isinstance(found, kind):
            raise UsageError(f"Object '{identifier}' is not of the type that is needed here")
        return found

    def secret(self, identifier: str) -> Secret:
        """The secret of that id. Raises UsageError if there is none."""
        from blocklayer.graph.secret import Secret

        found = self._known.get(identifier)
        if not isinstance(found, Secret):
            raise UsageError(f"No secret with id '{identifier}'")
        return found
