"""Options: one declared struct a driver, from which every way of naming options is read.

The same options arrive as a dict from Python or JSON, as ``json:{…}`` in place of a file name, or
as dotted keys (``file.filename=a.raw``). All three end here.

1. Declared names are kebab-case; an unknown name is an error, never ignored.
2. Text values (dotted keys carry nothing else) are read by the declared type: on/off, sizes,
   numbers.
3. Children (``file``, ``backing``, …) stay as they are: a node's name, a nested dict, or null.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blocklayer.errors import UsageError
from blocklayer.units import parse_size

Reference = Annotated[str | dict[str, Any], Meta(title="BlockdevRef")]
"""A child: the name of an existing node, or the options of a new one."""

Size = Annotated[int, Meta(ge=0, extra={"size": True})]
"""Bytes; as text with a suffix (``64k``)."""


class CacheOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """``cache.*``: whether the host's page cache is used, and whether flushes are obeyed."""

    direct: bool | UnsetType = UNSET
    no_flush: bool | UnsetType = UNSET


class NodeOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """The members every node takes; drivers derive from this. UNSET: inherit from the parent."""

    driver: str = ""
    node_name: str | None = None
    read_only: bool | UnsetType = UNSET
    auto_read_only: bool | UnsetType = UNSET
    force_share: bool | UnsetType = UNSET
    discard: Literal["ignore", "unmap"] | UnsetType = UNSET
    detect_zeroes: Literal["off", "on", "unmap"] | UnsetType = UNSET
    cache: CacheOptions = msgspec.field(default_factory=CacheOptions)
    active: bool | UnsetType = UNSET
    """Off: another process has the image still; nothing is locked or written."""


class CreateOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What creation of an image takes, by the names of ``-o``; drivers derive from this.

    Each field is described (``Meta(description=…)``): that text is its line in ``-o help``.
    """

    BEFORE_SIZE: ClassVar[frozenset[str]] = frozenset()
    """Options that come before the size where all are named in a line."""

    size: Annotated[Size, Meta(description="Virtual disk size")] = 0

    @property
    def needs_size(self) -> bool:
        """Whether there is no image without a size."""
        return True

    def secrets(self) -> list[str]:
        """Ids of the secrets that creation needs."""
        return []

    def validate(self) -> None:
        """Raise UsageError if the values do not fit together; called before anything is touched."""


class AmendOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What can be changed of an existing image, by the names of ``-o``; UNSET: leave it.

    Drivers derive from this, and describe their fields as those of ``CreateOptions``.
    """


Options = TypeVar("Options", bound=msgspec.Struct)

_TRUE = frozenset(("on", "yes", "true", "y"))
_FALSE = frozenset(("off", "no", "false", "n"))


def decode(cls: type[Options], values: Mapping[str, Any], what: str = "Parameter") -> Options:
    """``values`` as a ``cls``; raises UsageError naming the member that does not fit."""
    for name in values:
        if name not in cls.__struct_encode_fields__:
            raise UsageError(f"{what} '{name}' is unexpected")
    try:
        return msgspec.convert(values, cls)
    except msgspec.ValidationError:
        # Text in place of a number or a switch, or a mistake. Only now are the types looked at:
        # evaluating the annotations of a class takes longer than opening an image.
        known = _fields(cls)
    ready = {name: _from_text(known[name].type, value, name) for name, value in values.items()}
    try:
        return msgspec.convert(ready, cls)
    except msgspec.ValidationError as error:
        raise UsageError(_explain(error, ready, known, what)) from None


@functools.cache
def _fields(cls: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(cls)}


def _explain(
    error: msgspec.ValidationError, values: Mapping[str, Any], known: Mapping[str, Any], what: str
) -> str:
    text = str(error)
    message, _, path = text.partition(" - at `$.")
    path = path.rstrip("`")
    # A name may have dots itself: it is the last part that the message gives.
    name = path if path in known else path.split(".")[0].split("[")[0]
    if "missing required field" in text:
        return f"{what} '{text.split('`')[1]}' is missing"
    if name in known and isinstance(values.get(name), str) and "enum value" in message:
        return f"{what} '{name.rpartition('.')[2]}' does not accept value '{values[name]}'"
    return f"Invalid value for '{name}': {message}" if name else f"Invalid options: {message}"


def _from_text(kind: Any, value: Any, name: str) -> Any:
    """Read a text value by its declared type; everything else is left to validation.

    Members named 0, 1, … are a list's, where a list is declared: dotted keys have no other way.
    """
    if isinstance(value, Mapping) and typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        if all(str(number) in value for number in range(len(value))):
            return [
                _from_text(item_kind, value[str(number)], f"{name}.{number}")
                for number in range(len(value))
            ]
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        inner = {name: field.type for name, field in _fields(kind).items()}
        return {
            key: _from_text(inner[key], item, f"{name}.{key}") if key in inner else item
            for key, item in value.items()
        }
    if not isinstance(value, str):
        return value
    kinds, is_size = _plain_types(kind)
    if str in kinds:
        return value
    if bool in kinds and value in _TRUE | _FALSE:
        return value in _TRUE
    if bool in kinds and int not in kinds:
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
    if int in kinds:
        if is_size:
            return parse_size(value, what=f"value for parameter '{name}'")
        try:
            return int(value, 0)
        except ValueError:
            raise UsageError(f"Parameter '{name}' expects a number") from None
    return value


def _plain_types(kind: Any) -> tuple[set[Any], bool]:
    """The plain types in an annotation, and whether it is marked as a size."""
    if typing.get_origin(kind) is Annotated:
        base, *notes = typing.get_args(kind)
        kinds, is_size = _plain_types(base)
        marked = any(isinstance(note, Meta) and (note.extra or {}).get("size") for note in notes)
        return kinds, is_size or marked
    if typing.get_origin(kind) in (Union, types.UnionType):
        kinds, is_size = set(), False
        for part in typing.get_args(kind):
            inner, marked = _plain_types(part)
            kinds |= inner
            is_size |= marked
        return kinds, is_size
    return {kind}, False


class Described(msgspec.Struct, frozen=True):
    """One option as help shows it; ``type`` is "str", "size", "num" or "bool (on/off)"."""

    name: str
    type: str
    text: str


def describe(cls: type[msgspec.Struct]) -> list[Described]:
    """All options of ``cls``, in the order declared."""
    found = []
    for field in msgspec.structs.fields(cls):
        kinds, is_size = _plain_types(field.type)
        kind = "str"
        if bool in kinds:
            kind = "bool (on/off)"
        elif int in kinds:
            kind = "size" if is_size else "num"
        notes = typing.get_args(field.type)[1:]
        texts = [note.description for note in notes if isinstance(note, Meta) and note.description]
        found.append(Described(field.encode_name, kind, texts[0] if texts else ""))
    return found


def parse_pairs(text: str, *, implied: str | None = None) -> dict[str, str]:
    """``"driver=raw,file.filename=a,,b"`` as a flat dict; a doubled comma stands for one.

    A first part without ``=`` is the value of ``implied``; a later one means ``=on``.
    """
    pairs: dict[str, str] = {}
    for position, part in enumerate(_split_commas(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if position == 0 and implied:
                key, value = implied, part
            elif not key:
                raise UsageError(f"Expected '=' after parameter '{part}'")
            else:
                value = "on"
        pairs[key] = value
    return pairs


def _split_commas(text: str) -> Iterable[str]:
    part = ""
    pieces = text.split(",")
    index = 0
    while index < len(pieces):
        part += pieces[index]
        # ",," splits into an empty piece in the middle: the comma belongs to the value.
        if index + 2 < len(pieces) and pieces[index + 1] == "":
            part += ","
            index += 2
            continue
        yield part
        part = ""
        index += 1


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"file.driver": "null-co"}`` as ``{"file": {"driver": "null-co"}}``, at every level."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        if isinstance(value, Mapping):
            value = unflatten(value)
        place = nested
        for name in path:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"Option '{name}' is given both a value and members ('{key}')")
            place = inner
        if isinstance(place.get(last), dict) and isinstance(value, Mapping):
            place[last].update(value)
        elif last in place:
            raise UsageError(f"Option '{key}' is given twice")
        else:
            place[last] = value
    return nested


def parse_json_name(name: str) -> dict[str, Any]:
    """The options in a ``json:{…}`` pseudo file name; its keys may be dotted."""
    try:
        value = json.loads(name.removeprefix("json:"))
        if not isinstance(value, dict):
            raise UsageError("Invalid JSON object given: a json: name must hold an object")
        return unflatten(value)
    except ValueError as error:
        raise UsageError(f"Could not parse the JSON options: {error}") from None
    except RecursionError:
        raise UsageError("Could not parse the JSON options: they nest too deeply") from None
