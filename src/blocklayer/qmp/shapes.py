"""Shapes: what a declared type means in QMP. Validation and introspection both read them.

``shape_of(annotation)`` knows: ``str``, ``bool``, ``int`` (with ``Meta`` bounds), ``float``,
``Literal``, ``list[T]``, structs, unions of structs that share a tag, unions of other kinds
(alternates), ``Any``; and ``Annotated[…, Variants(…)]`` for unions whose members are found late.

1. A member with a default is optional. ``T | None = None`` and ``T | UnsetType = UNSET`` are ways
   to say so; JSON's null is accepted only where None is in the type and not the default.
2. Equal annotations have one shape. A struct's members are looked at when first needed, so that
   types may contain themselves, and declaring hundreds of commands costs nothing.
3. Names are the declared ones; ``schema`` masks them.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Union

import msgspec
from msgspec import Meta, UnsetType

MIN_INT: Final = -(1 << 63)
MAX_INT: Final = (1 << 63) - 1
MAX_UINT: Final = (1 << 64) - 1


class Features(msgspec.Struct, frozen=True):
    """What clients are told of a member beside its type: ``deprecated``, ``unstable``, …"""

    names: tuple[str, ...]


DEPRECATED: Final = Features(("deprecated",))
UNSTABLE: Final = Features(("unstable",))


class Shape:
    """What all shapes are: something with a name."""

    def __init__(self, name: str) -> None:
        self.name = name


class Scalar(Shape):
    """A plain value; ``name`` is the builtin type, ``json_type`` its kind in introspection."""

    def __init__(
        self, name: str, json_type: str, least: int = MIN_INT, greatest: int = MAX_INT
    ) -> None:
        super().__init__(name)
        self.json_type = json_type
        self.least = least
        self.greatest = greatest


STRING: Final = Scalar("str", "string")
BOOLEAN: Final = Scalar("bool", "boolean")
NUMBER: Final = Scalar("number", "number")
NULL: Final = Scalar("null", "null")
ANY: Final = Scalar("any", "value")
INTEGER: Final = Scalar("int", "int")


class Enumeration(Shape):
    """One of several strings."""

    def __init__(self, values: tuple[str, ...]) -> None:
        super().__init__("|".join(values))
        self.values = values


class Array(Shape):
    """Any number of values of one shape."""

    def __init__(self, element: Shape) -> None:
        super().__init__(f"[{element.name}]")
        self.element = element


class Member(msgspec.Struct, frozen=True):
    """One member of an object."""

    name: str
    field: str
    """The struct's field."""
    annotation: Any
    optional: bool
    features: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """The shape of its values."""
        return shape_of(self.annotation)


Build = Callable[[dict[str, Any]], Any]


class Object(Shape):
    """Named members; with a tag, more of them by the tag's value."""

    def __init__(
        self,
        name: str,
        members: Callable[[], tuple[Member, ...]],
        build: Build | None,
        tag: str | None = None,
        variants: Callable[[], dict[str, Object]] = dict,
    ) -> None:
        super().__init__(name)
        self._members = members
        self._variants = variants
        self.tag = tag
        self.build = build
        """Makes the value of fields; None leaves a dict by the members' names."""

    @functools.cached_property
    def members(self) -> tuple[Member, ...]:
        """The members that every value has; the tag is the first."""
        tags: tuple[Member, ...] = ()
        if self.tag is not None:
            kind: Any = Literal.__getitem__(tuple(self.variants))
            tags = (Member(self.tag, self.tag, kind, optional=False),)
        return tags + self._members()

    @functools.cached_property
    def variants(self) -> dict[str, Object]:
        """By the tag's value: an object of the further members only."""
        return self._variants()


class Alternate(Shape):
    """A value whose JSON type says which of ``choices`` it is."""

    def __init__(self, name: str, choices: tuple[Shape, ...]) -> None:
        super().__init__(name)
        self.choices = choices


class Variants(msgspec.Struct, frozen=True, eq=False):
    """In ``Annotated``: a union by ``tag`` whose structs are found when first needed.

    Values stay dicts, whose members are known to fit. ``common`` holds the members that all
    structs have. Members named in ``required`` must be given whatever default a struct has.
    """

    name: str
    tag: str
    common: type[msgspec.Struct]
    structs: Callable[[], Mapping[str, type[msgspec.Struct]]]
    required: frozenset[str] = frozenset()

    @functools.cache  # noqa: B019 - instances are module constants
    def shape(self) -> Object:
        """The shape of the union."""
        return Object(self.name, self._shared, None, self.tag, self._rest)

    def _shared(self) -> tuple[Member, ...]:
        return tuple(m for m in members_of(self.common) if m.name != self.tag)

    def _rest(self) -> dict[str, Object]:
        shared = {member.name for member in members_of(self.common)} | {self.tag}
        return {
            name: _rest_of(struct, shared, self.required)
            for name, struct in sorted(self.structs().items())
        }


def _rest_of(
    struct: type[msgspec.Struct], shared: set[str], required: frozenset[str] = frozenset()
) -> Object:
    def members() -> tuple[Member, ...]:
        return tuple(
            msgspec.structs.replace(member, optional=False) if member.name in required else member
            for member in members_of(struct)
            if member.name not in shared
        )

    return Object(struct.__name__, members, None)


def members_of(struct: type[msgspec.Struct]) -> tuple[Member, ...]:
    """The declared fields of ``struct`` as members."""
    return tuple(
        Member(
            name=field.encode_name,
            field=field.name,
            annotation=_without_default(field.type, field.default),
            optional=not field.required,
            features=tuple(name for note in _notes(field.type, Features) for name in note.names),
        )
        for field in msgspec.structs.fields(struct)
    )


_DEFINED: Final[dict[str | None, Callable[[], Shape]]] = {}


def define(title: str) -> Callable[[Callable[[], Shape]], Callable[[], Shape]]:
    """The decorated function makes the shape of annotations with ``Meta(title=title)``."""

    def remember(make: Callable[[], Shape]) -> Callable[[], Shape]:
        _DEFINED[title] = make
        return make

    return remember


@functools.cache
def shape_of(annotation: Any) -> Shape:
    """The shape that values of ``annotation`` have. Asserts that QMP can say it."""
    plain = {str: STRING, bool: BOOLEAN, float: NUMBER, Any: ANY, int: INTEGER}
    if annotation in plain:
        return plain[annotation]
    if annotation is None or annotation is types.NoneType:
        return NULL
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _annotated(annotation)
    if origin is Literal:
        return Enumeration(typing.get_args(annotation))
    if origin in (list, tuple):
        return Array(shape_of(typing.get_args(annotation)[0]))
    if origin is dict:
        return ANY
    if origin in (Union, types.UnionType):
        return _union(annotation, None)
    assert issubclass(annotation, msgspec.Struct), annotation
    return Object(
        annotation.__name__, lambda: members_of(annotation), lambda fields: annotation(**fields)
    )


def _annotated(annotation: Any) -> Shape:
    base, *notes = typing.get_args(annotation)
    for note in notes:
        if isinstance(note, Variants):
            return note.shape()
    title = next((n.title for n in notes if isinstance(n, Meta) and n.title), None)
    if title in _DEFINED:
        return _DEFINED[title]()
    if typing.get_origin(base) in (Union, types.UnionType):
        return _union(base, title)
    bounds = [note for note in notes if isinstance(note, Meta)]
    if base is int and bounds:
        least = max((int(n.ge) for n in bounds if n.ge is not None), default=MIN_INT)
        greatest = min((int(n.le) for n in bounds if n.le is not None), default=MAX_INT)
        return Scalar("int", "int", least, greatest)
    return shape_of(base)


def _union(annotation: Any, title: str | None) -> Shape:
    parts = [part for part in typing.get_args(annotation) if part is not UnsetType]
    structs = [p for p in parts if isinstance(p, type) and issubclass(p, msgspec.Struct)]
    if len(structs) > 1:
        assert len(structs) == len(parts), f"{annotation}: a tagged union has structs only"
        return _tagged(title or "".join(s.__name__ for s in structs), structs)
    shapes = tuple(shape_of(part) for part in parts)
    if len(shapes) == 1:
        return shapes[0]
    named = [shape.name for shape in shapes if shape is not NULL]
    or_null = "OrNull" if NULL in shapes else ""
    shapes = tuple(
        choice
        for shape in shapes
        for choice in (shape.choices if isinstance(shape, Alternate) else (shape,))
    )
    return Alternate(title or (named[0] if len(named) == 1 else "Or".join(named)) + or_null, shapes)


def _tagged(name: str, structs: list[Any]) -> Object:
    tag = structs[0].__struct_config__.tag_field
    assert tag, f"{name} has no tag"
    assert all(struct.__struct_config__.tag_field == tag for struct in structs), name
    by_tag = {str(struct.__struct_config__.tag): struct for struct in structs}

    def shared() -> tuple[Member, ...]:
        every = [members_of(struct) for struct in structs]
        return tuple(m for m in every[0] if all(m in members for members in every[1:]))

    def rest() -> dict[str, Object]:
        common = {member.name for member in shared()}
        return {value: _rest_of(struct, common) for value, struct in by_tag.items()}

    def build(fields: dict[str, Any]) -> Any:
        return by_tag[fields.pop(tag)](**fields)

    return Object(name, shared, build, tag, rest)


def _without_default(annotation: Any, default: Any) -> Any:
    """``annotation`` without the None or UNSET that only says "not given"."""
    if typing.get_origin(annotation) is Annotated:
        base, *notes = typing.get_args(annotation)
        return Annotated[(_without_default(base, default), *notes)]
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    gone = {UnsetType} | ({types.NoneType} if default is None else set())
    parts = [part for part in typing.get_args(annotation) if part not in gone]
    return Union[tuple(parts)]  # noqa: UP007 - of parts that are known only now


def _notes(annotation: Any, kind: type[Any]) -> list[Any]:
    """What of ``kind`` is noted anywhere in ``annotation``."""
    if typing.get_origin(annotation) is Annotated:
        base, *notes = typing.get_args(annotation)
        return [note for note in notes if isinstance(note, kind)] + _notes(base, kind)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [note for part in typing.get_args(annotation) for note in _notes(part, kind)]
    return []
