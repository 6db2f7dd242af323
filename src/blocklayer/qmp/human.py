"""The human monitor's commands: a table, filled by decorated coroutines.

    @HUMAN_COMMANDS.command("block_resize", "DEVICE SIZE:size", "change the size of a disk")
    async def block_resize(server: Server, arguments: dict[str, Any]) -> str: ...

1. The second text declares the arguments, and is what help shows: ``[-n]`` is a flag, ``NAME`` is
   required, ``[NAME]`` is optional, ``NAME...`` takes the rest of the line. ``:size`` and ``:int``
   say what a value is; without it, it is text. Handlers find them in lower case, without dashes:
   flags as bool, what was not given as None.
2. Words are separated by spaces; double quotes keep spaces, and a backslash the character after it.
3. Lines end in CR LF, as a terminal wants them. Errors are lines that start with ``Error:``.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from blocklayer.errors import BlockError, UsageError
from blocklayer.qmp.version import QEMU_VERSION, package
from blocklayer.units import parse_size

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

Handler = Callable[["Server", dict[str, Any]], Awaitable[str]]

_PARAMETER = re.compile(r"(\[)?(-)?([A-Za-z][A-Za-z_-]*)(\.\.\.)?(?::(size|int))?\]?")
_ESCAPES: Final = {"n": "\n", "r": "\r"}


class Parameter(msgspec.Struct, frozen=True):
    """One declared argument."""

    name: str
    kind: str
    """"flag", "text", "rest", "size" or "int"."""
    optional: bool


class HumanCommand(msgspec.Struct, frozen=True):
    """One declared command; the words of its name are separated by a space."""

    name: str
    usage: str
    summary: str
    parameters: tuple[Parameter, ...]
    handler: Handler


class HumanCommandTable:
    """Human monitor commands by name."""

    def __init__(self) -> None:
        self.commands: dict[str, HumanCommand] = {}

    def command(
        self, name: str, usage: str, summary: str, *, also: tuple[str, ...] = ()
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated coroutine as command ``name``; ``also`` are further names."""

        def declare(handler: Handler) -> Handler:
            for each in (name, *also):
                assert each not in self.commands, each
                self.commands[each] = HumanCommand(
                    each, usage, summary, _parameters(usage), handler
                )
            return handler

        return declare

    async def execute(self, server: Server, line: str) -> str:
        """What the command in ``line`` prints. Errors are text too."""
        try:
            text = await self._execute(server, line)
        except BlockError as error:
            text = f"Error: {error}\n"
        return text.replace("\r\n", "\n").replace("\n", "\r\n")

    async def _execute(self, server: Server, line: str) -> str:
        rest = line.strip()
        word, _, behind = rest.partition(" ")
        second, _, further = behind.lstrip().partition(" ")
        for name, tail in ((f"{word} {second}", further), (word, behind)):
            command = self.commands.get(name)
            if command is not None:
                return await command.handler(server, _arguments(command, tail))
        if not rest:
            return ""
        return f"unknown command: '{rest}'\n"

    def help(self, start: str = "") -> str:
        """The lines of help for all commands, or those that begin with the words ``start``."""
        return "".join(
            f"{' '.join(filter(None, (command.name, command.usage)))} -- {command.summary}\n"
            for name, command in sorted(self.commands.items())
            if not start or f"{name} ".startswith(f"{start} ")
        )


def _parameters(usage: str) -> tuple[Parameter, ...]:
    found = []
    for word in usage.split():
        match = _PARAMETER.fullmatch(word)
        assert match is not None, word
        bracket, dash, name, rest, kind = match.groups()
        found.append(
            Parameter(
                name.lower(),
                "flag" if dash else "rest" if rest else kind or "text",
                bracket is not None,
            )
        )
    return tuple(found)


def _arguments(command: HumanCommand, text: str) -> dict[str, Any]:
    """The values in ``text``. Raises UsageError."""
    values: dict[str, Any] = {
        parameter.name: False if parameter.kind == "flag" else None
        for parameter in command.parameters
    }
    flags = {f"-{p.name}": p.name for p in command.parameters if p.kind == "flag"}
    text = text.strip()
    for parameter in command.parameters:
        while text.split(" ", 1)[0] in flags:
            flag, _, text = text.partition(" ")
            values[flags[flag]], text = True, text.lstrip()
        if parameter.kind == "flag":
            continue
        if not text:
            if parameter.optional:
                break
            raise UsageError(f"'{command.name}' needs {parameter.name}; try 'help {command.name}'")
        if parameter.kind == "rest":
            values[parameter.name], text = text, ""
            continue
        word, text = _word(text)
        values[parameter.name] = _value(parameter, word)
    if text:
        raise UsageError(f"'{command.name}' has no place for '{text}'; try 'help {command.name}'")
    return values


def _value(parameter: Parameter, word: str) -> Any:
    if parameter.kind == "size":
        # A number without a suffix means mebibytes here, unlike everywhere else.
        return parse_size(word, default_suffix="M", what=parameter.name)
    if parameter.kind == "int":
        try:
            return int(word, 0)
        except ValueError:
            raise UsageError(f"'{word}' is no number") from None
    return word


def _word(text: str) -> tuple[str, str]:
    """(first word, what follows); the word's quotes are gone."""
    if not text.startswith('"'):
        word, _, rest = text.partition(" ")
        return word, rest.lstrip()
    found, at = [], 1
    while at < len(text) and text[at] != '"':
        if text[at] == "\\" and at + 1 < len(text):
            at += 1
            found.append(_ESCAPES.get(text[at], text[at]))
        else:
            found.append(text[at])
        at += 1
    if at >= len(text):
        raise UsageError(f"The quotes are not closed: {text}")
    return "".join(found), text[at + 1 :].lstrip()


HUMAN_COMMANDS: Final = HumanCommandTable()


@HUMAN_COMMANDS.command("help", "[COMMAND...]", "show this list, or one command", also=("?",))
async def help(server: Server, arguments: dict[str, Any]) -> str:
    """All commands, or one."""
    return server.human_commands.help(arguments["command"] or "")


@HUMAN_COMMANDS.command("info", "[SUBCOMMAND...]", "show the state of something")
async def info(server: Server, arguments: dict[str, Any]) -> str:
    """What there is to show; the subcommands themselves are commands of two words."""
    if arguments["subcommand"]:
        return f"unknown command: 'info {arguments['subcommand']}'\n"
    return server.human_commands.help("info")


@HUMAN_COMMANDS.command("info version", "", "show the version")
async def info_version(server: Server, arguments: dict[str, Any]) -> str:
    """Which QEMU is followed, and what this program is."""
    return f"{'.'.join(map(str, QEMU_VERSION))} ({package()})\n"


@HUMAN_COMMANDS.command("info name", "", "show the name that the daemon was given")
async def info_name(server: Server, arguments: dict[str, Any]) -> str:
    """The name, if there is one."""
    return f"{server.name}\n" if server.name is not None else ""


@HUMAN_COMMANDS.command("quit", "", "end the daemon", also=("q",))
async def quit(server: Server, arguments: dict[str, Any]) -> str:
    """Ask for the end."""
    server.quit()
    return ""
