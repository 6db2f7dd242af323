"""What may come next at the QMP prompt, by the server's own schema.

1. The first word is completed to commands, later ones to arguments: ``name=`` for plain members,
   ``name.`` for objects, of which the members follow; after ``=`` to the values of an enumeration.
2. Members that are in the line already are not offered again. Those of a union follow from the
   tag's value, once it is in the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Entry = dict[str, Any]


class Completer:
    """Knows a server's schema (``query-qmp-schema``), or only its commands' names."""

    def __init__(self, schema: Iterable[Entry]) -> None:
        self._entries = {entry["name"]: entry for entry in schema}

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Completer:
        """For a server without a schema."""
        return cls({"name": name, "meta-type": "command"} for name in names)

    def candidates(self, line: str) -> list[str]:
        """What the last word of ``line`` may become, in alphabetical order."""
        words = line.split(" ")
        *given, last = words
        given = [word for word in given if word]
        if not given:
            return sorted(
                name
                for name, entry in self._entries.items()
                if entry["meta-type"] == "command" and name.startswith(last)
            )
        command = self._entries.get(given[0], {})
        values = dict(word.partition("=")[::2] for word in given[1:])
        return sorted(
            word
            for word in self._words(command.get("arg-type"), "", values, last)
            if word.startswith(last)
        )

    def _words(
        self, name: str | None, prefix: str, values: dict[str, str], last: str
    ) -> Iterator[str]:
        """Words for the members of object ``name``, whose own names begin with ``prefix``."""
        for member in self._members(name, prefix, values):
            path = prefix + member["name"]
            if path in values:
                continue
            kind = self._entries.get(member["type"], {})
            object_name = self._object_in(kind)
            if object_name is not None and last.startswith(f"{path}."):
                yield from self._words(object_name, f"{path}.", values, last)
            elif last.startswith(f"{path}="):
                choices = kind.get("values", ())
                yield from (f"{path}={value}" for value in choices)
                if kind.get("json-type") == "boolean":
                    yield from (f"{path}=true", f"{path}=false")
            else:
                yield f"{path}." if object_name is not None else f"{path}="

    def _members(self, name: str | None, prefix: str, values: dict[str, str]) -> list[Entry]:
        entry = self._entries.get(name or "", {})
        members = list(entry.get("members", ()))
        chosen = values.get(f"{prefix}{entry.get('tag')}")
        for variant in entry.get("variants", ()):
            if variant["case"] == chosen:
                members += self._entries[variant["type"]].get("members", ())
        return members

    def _object_in(self, entry: Entry) -> str | None:
        """The object that ``entry`` is, or may be."""
        if entry.get("meta-type") == "object":
            return str(entry["name"])
        if entry.get("meta-type") == "alternate":
            for choice in entry["members"]:
                found = self._object_in(self._entries.get(choice["type"], {}))
                if found is not None:
                    return found
        return None
