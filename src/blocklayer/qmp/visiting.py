"""Checking arguments: a decoded JSON value against a shape, before anything has any effect.

1. Members are looked at in the order declared, then what nobody declared is refused: the first
   mistake in that order is the one reported, as QEMU would.
2. Texts are QEMU's, since tools match on them. A member is named by its whole path
   (``options[0].file.filename``), a value that is not accepted by the last name alone.
"""

from __future__ import annotations

from typing import Any

from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.shapes import (
    ANY,
    BOOLEAN,
    MAX_INT,
    MAX_UINT,
    MIN_INT,
    NULL,
    NUMBER,
    STRING,
    Alternate,
    Array,
    Enumeration,
    Member,
    Object,
    Scalar,
    Shape,
)

_JSON_TYPES = {
    "string": "string",
    "boolean": "boolean",
    "number": "number",
    "null": "null",
}
_UNSIGNED = {0xFFFF: "uint16_t", 0xFFFFFFFF: "uint32_t", MAX_UINT: "uint64"}


def visit(shape: Shape, value: Any, path: str) -> Any:
    """``value`` as declared by ``shape``; ``path`` names it ("" is the arguments themselves).

    Raises CommandError.
    """
    if isinstance(shape, Scalar):
        return _scalar(shape, value, path)
    if isinstance(shape, Object):
        if not isinstance(value, dict):
            raise _wrong_type(path, "object")
        return _object(shape, value, path)
    if isinstance(shape, Enumeration):
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in shape.values:
            raise CommandError(f"Parameter '{_leaf(path)}' does not accept value '{value}'")
        return value
    if isinstance(shape, Array):
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        return [visit(shape.element, item, f"{path}[{n}]") for n, item in enumerate(value)]
    assert isinstance(shape, Alternate)
    for choice in shape.choices:
        if _fits(choice, value):
            return visit(choice, value, path)
    raise _wrong_type(_leaf(path), shape.name)


def _scalar(shape: Scalar, value: Any, path: str) -> Any:
    if shape.json_type == "int":
        return _integer(shape, value, path)
    if not _fits(shape, value):
        raise _wrong_type(path, _JSON_TYPES[shape.json_type])
    return float(value) if shape is NUMBER else value


def _integer(shape: Scalar, value: Any, path: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    width = _UNSIGNED.get(shape.greatest) if shape.least == 0 else None
    if width is not None:
        if not whole or not MIN_INT <= value <= MAX_UINT:
            raise CommandError(f"Parameter '{path}' expects uint64")
        if not 0 <= value <= shape.greatest:
            raise CommandError(f"Parameter '{_leaf(path)}' expects {width}")
    elif not whole or not MIN_INT <= value <= MAX_INT:
        raise _wrong_type(path, "integer")
    elif not shape.least <= value <= shape.greatest:
        raise CommandError(
            f"Parameter '{path}' expects a number between {shape.least} and {shape.greatest}"
        )
    return int(value)


def _fits(shape: Shape, value: Any) -> bool:
    """Whether the JSON type of ``value`` is one that ``shape`` stands for."""
    if shape is ANY:
        return True
    if shape is NULL:
        return value is None
    if shape is BOOLEAN:
        return isinstance(value, bool)
    if shape is STRING or isinstance(shape, Enumeration):
        return isinstance(value, str)
    if isinstance(shape, Object):
        return isinstance(value, dict)
    if isinstance(shape, Array):
        return isinstance(value, list)
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float if shape is NUMBER else int)


def _object(shape: Object, given: dict[str, Any], path: str) -> Any:
    prefix = f"{path}." if path else ""
    found: dict[str, Any] = {}
    by_field = shape.build is not None
    members = list(_members(shape.members, given, prefix, found, by_field))
    if shape.tag is not None:
        further = shape.variants[given[shape.tag]]
        members += _members(further.members, given, prefix, found, by_field)
    for name in given:
        if name not in members:
            raise CommandError(f"Parameter '{prefix}{name}' is unexpected")
    return shape.build(found) if shape.build is not None else found


def _members(
    members: tuple[Member, ...],
    given: dict[str, Any],
    prefix: str,
    found: dict[str, Any],
    by_field: bool,
) -> list[str]:
    """Put the values of ``members`` into ``found``; their names."""
    for member in members:
        where = f"{prefix}{member.name}"
        if member.name in given:
            key = member.field if by_field else member.name
            found[key] = visit(member.shape, given[member.name], where)
        elif not member.optional:
            raise CommandError(f"Parameter '{where}' is missing")
    return [member.name for member in members]


def _wrong_type(path: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{path}', expected: {expected}")


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
