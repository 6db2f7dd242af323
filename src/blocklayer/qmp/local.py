"""Commands without a client: the program's own command line, and the human monitor, give them.

1. What is given as text (``key=value``) is read by the command's declaration, then checked as if a
   client had sent it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blocklayer.errors import UsageError
from blocklayer.qmp.errors import CommandError, CommandNotFoundError
from blocklayer.qmp.shapes import BOOLEAN, Alternate, Array, Object, Scalar, Shape
from blocklayer.units import parse_size

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

_SWITCHES = {"on": True, "yes": True, "true": True, "y": True}
_SWITCHES |= {"off": False, "no": False, "false": False, "n": False}


class LocalMonitor:
    """What commands get in place of a client's monitor."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.named_descriptors: dict[str, int] = {}
        """Nobody has named any."""

    def take_descriptor(self) -> int:
        """Nothing comes with these commands. Raises CommandError."""
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")


async def execute(server: Server, name: str, arguments: Mapping[str, Any]) -> Any:
    """Carry out the command ``name``; its result in plain JSON values.

    Raises CommandError and what the command raises.
    """
    command = server.commands.get(name)
    if command is None:
        raise CommandNotFoundError(f"The command {name} has not been found")
    return await command.run(LocalMonitor(server), command.decode(dict(arguments)))


async def execute_text(server: Server, name: str, arguments: Mapping[str, Any]) -> Any:
    """The same, with arguments whose values may be text (nested, not dotted)."""
    command = server.commands.get(name)
    if command is None:
        raise CommandNotFoundError(f"The command {name} has not been found")
    return await execute(server, name, from_text(command.arguments_shape, dict(arguments), ""))


def from_text(shape: Shape, value: Any, path: str) -> Any:
    """``value`` with its texts read as ``shape`` wants them. Raises UsageError."""
    if isinstance(shape, Object) and isinstance(value, Mapping):
        members = {member.name: member.shape for member in shape.members}
        variant = shape.variants.get(value.get(shape.tag, "")) if shape.tag else None
        if variant is not None:
            members |= {member.name: member.shape for member in variant.members}
        return {
            name: from_text(members[name], item, f"{path}{name}") if name in members else item
            for name, item in value.items()
        }
    if isinstance(shape, Array):
        return _array(shape, value, path)
    if isinstance(shape, Alternate):
        fitting = [c for c in shape.choices if isinstance(c, Object) == isinstance(value, Mapping)]
        return from_text(fitting[0], value, path) if len(fitting) == 1 else value
    if not isinstance(value, str):
        return value
    if shape is BOOLEAN:
        if value not in _SWITCHES:
            raise UsageError(f"Parameter '{path}' expects 'on' or 'off'")
        return _SWITCHES[value]
    if isinstance(shape, Scalar) and shape.json_type == "int":
        try:
            return int(value, 0)
        except ValueError:
            return parse_size(value, what=f"value for parameter '{path}'")
    return value


def _array(shape: Array, value: Any, path: str) -> Any:
    """Lists are given as members ``0``, ``1``, …; one text stands for a list of one."""
    if isinstance(value, Mapping) and all(name.isdigit() for name in value):
        value = [value[name] for name in sorted(value, key=int)]
    elif isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    return [from_text(shape.element, item, f"{path}.{n}") for n, item in enumerate(value)]
