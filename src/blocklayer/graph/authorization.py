"""Who may come in, as user objects: QEMU's ``authz-simple`` and ``authz-list``.

1. A name is allowed or it is not; nothing else is known of its owner. Names of TLS clients are
   their certificates' subjects, as ``tls_credentials.distinguished_name`` writes them.
2. The first rule that matches decides; if none does, the object's own policy.
"""

from __future__ import annotations

import fnmatch
from typing import Any, Literal

import msgspec

from blocklayer.graph.objects import Objects, UserObject

Policy = Literal["deny", "allow"]


class Authorization(UserObject):
    """Base of the objects that say who may come in."""

    def allows(self, name: str) -> bool:
        """Whether the owner of ``name`` may."""
        raise AssertionError(type(self).__name__)


class SimpleProperties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """The one name that is allowed."""

    identity: str


class SimpleAuthorization(Authorization):
    """An ``authz-simple`` object."""

    Properties = SimpleProperties

    def __init__(self, properties: SimpleProperties) -> None:
        self._identity = properties.identity

    @classmethod
    def make(cls, objects: Objects, identifier: str, properties: Any) -> SimpleAuthorization:
        """See ``UserObject``."""
        return cls(properties)

    def allows(self, name: str) -> bool:
        """Whether it is that name."""
        return name == self._identity

    def shown(self) -> dict[str, Any]:
        """See ``UserObject``."""
        return {"identity": self._identity}


class Rule(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """A name, or with format ``glob`` a pattern of names, and what is done with it."""

    match: str
    policy: Policy
    format: Literal["exact", "glob"] = "exact"


class ListProperties(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Rules in order, and what holds if none matches."""

    policy: Policy = "deny"
    rules: list[Rule] = msgspec.field(default_factory=list)


class ListAuthorization(Authorization):
    """An ``authz-list`` object."""

    Properties = ListProperties

    def __init__(self, properties: ListProperties) -> None:
        self._properties = properties

    @classmethod
    def make(cls, objects: Objects, identifier: str, properties: Any) -> ListAuthorization:
        """See ``UserObject``."""
        return cls(properties)

    def allows(self, name: str) -> bool:
        """What the first rule that matches says."""
        for rule in self._properties.rules:
            exact = rule.format == "exact"
            if name == rule.match if exact else fnmatch.fnmatchcase(name, rule.match):
                return rule.policy == "allow"
        return self._properties.policy == "allow"

    def shown(self) -> dict[str, Any]:
        """See ``UserObject``."""
        return {
            "policy": self._properties.policy,
            "rules": msgspec.to_builtins(self._properties.rules),
        }
