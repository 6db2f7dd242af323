"""``query-qmp-schema``: what the declarations say, as the SchemaInfo entries of QEMU.

1. Commands and events come first, in the order declared, then types in the order first met. Names
   of types are masked to numbers, arrays are ``[number]``: no client shall depend on them.
2. Equal types have one entry; an empty object is one type, and stands for "nothing" both as
   arguments and as result.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blocklayer.graph.events import Event
from blocklayer.qmp.registry import Command
from blocklayer.qmp.shapes import (
    Alternate,
    Array,
    Enumeration,
    Member,
    Object,
    Scalar,
    Shape,
    shape_of,
)


def schema(commands: Iterable[Command], events: Iterable[type[Event]]) -> list[dict[str, Any]]:
    """All SchemaInfo entries for ``commands`` and ``events``."""
    return _Schema().build(commands, events)


class _Schema:
    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._waiting: list[tuple[str, Shape]] = []

    def build(
        self, commands: Iterable[Command], events: Iterable[type[Event]]
    ) -> list[dict[str, Any]]:
        entries = [self._command(command) for command in commands]
        entries += [
            {
                "name": event.NAME,
                "meta-type": "event",
                "arg-type": self._name(shape_of(event)),
            }
            for event in events
        ]
        done = 0
        while done < len(self._waiting):
            name, shape = self._waiting[done]
            entries.append({"name": name, **self._type(shape)})
            done += 1
        return entries

    def _command(self, command: Command) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._name(command.arguments_shape),
            "ret-type": self._name(command.return_shape),
        }
        if command.allow_oob:
            entry["allow-oob"] = True
        if command.features:
            entry["features"] = list(command.features)
        return entry

    def _name(self, shape: Shape) -> str:
        """The masked name of ``shape``, whose entry is made if there is none yet."""
        key = self._identity(shape)
        if key not in self._names:
            if isinstance(shape, Scalar):
                name = shape.name
            elif isinstance(shape, Array):
                name = f"[{self._name(shape.element)}]"
            else:
                name = str(sum(1 for known in self._names.values() if known.isdigit()))
            self._names[key] = name
            self._waiting.append((name, shape))
        return self._names[key]

    def _identity(self, shape: Shape) -> Any:
        if isinstance(shape, Scalar):
            return shape.name
        if isinstance(shape, Enumeration):
            return shape.values
        if isinstance(shape, Array):
            return ("array", self._name(shape.element))
        if isinstance(shape, Object) and not shape.members:
            return "empty"
        return shape

    def _type(self, shape: Shape) -> dict[str, Any]:
        if isinstance(shape, Scalar):
            return {"meta-type": "builtin", "json-type": shape.json_type}
        if isinstance(shape, Enumeration):
            return {
                "meta-type": "enum",
                "members": [{"name": value} for value in shape.values],
                "values": list(shape.values),
            }
        if isinstance(shape, Array):
            return {"meta-type": "array", "element-type": self._name(shape.element)}
        if isinstance(shape, Alternate):
            choices = [{"type": self._name(choice)} for choice in shape.choices]
            return {"meta-type": "alternate", "members": choices}
        assert isinstance(shape, Object)
        entry: dict[str, Any] = {
            "meta-type": "object",
            "members": [self._member(member) for member in shape.members],
        }
        if shape.tag is not None:
            entry["tag"] = shape.tag
            entry["variants"] = [
                {"case": case, "type": self._name(variant)}
                for case, variant in shape.variants.items()
            ]
        return entry

    def _member(self, member: Member) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": member.name, "type": self._name(member.shape)}
        if member.optional:
            entry["default"] = None
        if member.features:
            entry["features"] = list(member.features)
        return entry
