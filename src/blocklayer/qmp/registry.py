"""The table of commands: each is declared once, by a decorated coroutine.

    @COMMANDS.command("getfd")
    async def getfd(monitor: Monitor, arguments: GetFd) -> None:
        "Give the descriptor that came with this command a name."

From the annotations come the checks of the arguments, the schema and the encoding of the result.

1. A handler's first parameter is the monitor that the command came from; a second one, if there is
   one, has the type of the arguments. The annotations are looked at when first needed.
2. A result is None (``{}``), a plain value, a struct, or a list of them; members that are UNSET are
   left out.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import msgspec

from blocklayer.qmp.shapes import Object, Shape, shape_of
from blocklayer.qmp.visiting import visit


class Nothing(msgspec.Struct):
    """No arguments; no result."""


class Arguments(msgspec.Struct, rename="kebab", kw_only=True):
    """Base of the arguments of commands. What is not declared is refused before it comes here."""


class Result(msgspec.Struct, rename="kebab", kw_only=True):
    """Base of what commands return; members that are UNSET are left out."""


Handler = Callable[..., Awaitable[Any]]
AnyHandler = TypeVar("AnyHandler", bound=Handler)


class Command:
    """One declared command."""

    def __init__(
        self, name: str, handler: Handler, *, allow_oob: bool, features: tuple[str, ...]
    ) -> None:
        self.name = name
        self.handler = handler
        self.allow_oob = allow_oob
        self.features = features

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0]

    @functools.cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.handler, include_extras=True)

    @functools.cached_property
    def _arguments(self) -> Any:
        rest = [hint for name, hint in self._hints.items() if name != "return"][1:]
        return rest[0] if rest else Nothing

    @functools.cached_property
    def arguments_shape(self) -> Object:
        """The shape of the arguments."""
        shape = shape_of(self._arguments)
        assert isinstance(shape, Object), self.name
        return shape

    @functools.cached_property
    def return_shape(self) -> Shape:
        """The shape of the result."""
        result = self._hints["return"]
        return shape_of(Nothing if result is type(None) else result)

    def decode(self, given: dict[str, Any]) -> Any:
        """``given`` checked and decoded. Raises CommandError."""
        return visit(self.arguments_shape, given, "")

    async def run(self, monitor: Any, arguments: Any) -> Any:
        """Carry the command out; the result in plain JSON values."""
        takes_none = self._arguments is Nothing
        result = await (self.handler(monitor) if takes_none else self.handler(monitor, arguments))
        return {} if result is None else msgspec.to_builtins(result)


class CommandTable:
    """Commands by name, in the order declared."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def command(
        self, name: str, *, allow_oob: bool = False, features: tuple[str, ...] = ()
    ) -> Callable[[AnyHandler], AnyHandler]:
        """Declare the decorated coroutine as command ``name``."""

        def declare(handler: AnyHandler) -> AnyHandler:
            assert name not in self._commands, name
            self._commands[name] = Command(name, handler, allow_oob=allow_oob, features=features)
            return handler

        return declare

    def get(self, name: str) -> Command | None:
        """The command ``name``, if there is one."""
        return self._commands.get(name)

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())
