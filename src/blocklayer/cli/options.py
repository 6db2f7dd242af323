"""Command lines, declared once: from a class's fields come parsing, help text and reference pages.

    class Info(Command):
        "Display information about an image"

        OPERANDS = (("FILENAME", "image file name"),)

        format: Annotated[str | None, Option("format of the image", "f", "FMT")] = None

        async def run(self) -> int: ...

Parsing follows GNU ``getopt_long``, since scripts written for the original tools depend on it:

1. Options and operands mix in any order; ``--`` ends the options; ``-`` alone is an operand. So is,
   for a command that takes a number last, a last word like ``-5G``.
2. A long name may be cut short while only one option fits. ``--name=value`` and ``--name value``,
   ``-fvalue`` and ``-f value`` are the same; flags may share a dash (``-qf raw``).
3. The last use of an option wins; a field of type ``list[str]`` collects every use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from blocklayer.errors import UsageError


class CommandLineError(UsageError):
    """The command line cannot be understood. ``by`` is who says so, if not the program."""

    def __init__(self, message: str, by: str | None = None) -> None:
        super().__init__(message)
        self.by = by
        self.command: str | None = None
        """The command in question, whose help may help; filled in by ``main``."""


class HelpRequest(Exception):  # noqa: N818 - it is no error
    """``-h`` or ``--help`` was met: show the help text instead of running."""


class Option(msgspec.Struct, frozen=True):
    """What the command line knows of a field; the field's own name gives ``--long-name``."""

    help: str
    letters: str = ""
    """Short forms; the first is shown in the help text."""
    value: str | None = None
    """What the help text calls the value. None: a flag, whose field is a bool."""
    choices: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Further long names."""
    implied: str | None = None
    """The value that the option stands for alone; another one is given as ``--name=value`` only."""
    group: str = "Options"
    """The headline that the help text shows it under."""


EXIT_CODES = ((0, "done"), (1, "refused or failed; standard error says why"))


class Command(msgspec.Struct, kw_only=True):
    """One command: its docstring is its summary, its annotated fields are its options."""

    OPERANDS: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Names (as in the usage line) and descriptions of what follows the options."""

    ONE_DASH: ClassVar[bool] = False
    """Whether long names are known with a single dash, too."""
    ENDS_IN_NUMBER: ClassVar[bool] = False
    """Whether a last word like ``-5G`` is an operand."""
    EXIT_CODES: ClassVar[tuple[tuple[int, str], ...]] = EXIT_CODES
    """What each exit code means, for the help text."""
    EXAMPLE: ClassVar[tuple[str, str]] = ("", "")
    """Arguments, and what they do."""

    operands: list[str] = []
    uses: list[tuple[str, Any]] = []
    """Every use of an option, field and value, in order: for commands whose options are steps."""

    object: Annotated[
        list[str],
        Option(
            "define an object that others may refer to, as secret,id=ID,file=PATH or in JSON "
            "(repeatable)",
            value="OBJDEF",
        ),
    ] = msgspec.field(default_factory=list)

    @property
    def writes(self) -> bool:
        """Whether images may be changed: Ctrl-C then waits for the next safe point."""
        return True

    async def run(self) -> int:
        """Do it; the answer is the exit code. Errors are raised, the caller shows them."""
        raise AssertionError(f"{type(self).__name__} has no run()")

    def run_alone(self) -> int | None:
        """The same without a loop, for what forks first; None: ``run`` it."""
        return None

    def left_behind(self) -> str:
        """What an interrupted run leaves, for the user: "'x.qcow2' is incomplete"."""
        return ""


AnyCommand = TypeVar("AnyCommand", bound=Command)


class Field(msgspec.Struct, frozen=True):
    """An option together with the field it fills."""

    name: str
    option: Option
    repeats: bool

    @property
    def long_names(self) -> tuple[str, ...]:
        """All its long names; the help text shows the first. (``async_`` is ``--async``.)"""
        return (self.name.rstrip("_").replace("_", "-"), *self.option.also)


_HELP = Field("help", Option("print this help and exit", "h", group="Output"), False)


def fields_of(command: type[Command]) -> list[Field]:
    """The options of ``command``, in the order declared, ``--help`` first, common ones last."""
    found: list[Field] = [_HELP]
    last: list[Field] = []
    for name, hint in get_type_hints(command, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, *notes = get_args(hint)
            fields = last if name in Command.__struct_fields__ else found
            fields += [
                Field(name, note, get_origin(kind) is list)
                for note in notes
                if isinstance(note, Option)
            ]
    return found + last


def parse(command: type[AnyCommand], arguments: Sequence[str], called: str) -> AnyCommand:
    """``arguments`` as a ``command``; ``called`` is its full name, for messages.

    Raises CommandLineError, or HelpRequest.
    """
    return command(**_Parser(command, called).parse(arguments))


class _Parser:
    """One pass over one command line."""

    def __init__(self, command: type[Command], called: str) -> None:
        self._called = called
        self._one_dash = command.ONE_DASH
        self._ends_in_number = command.ENDS_IN_NUMBER
        self._long: dict[str, Field] = {}
        self._letters: dict[str, Field] = {}
        for field in fields_of(command):
            self._long.update(dict.fromkeys(field.long_names, field))
            self._letters.update(dict.fromkeys(field.option.letters, field))
        self._values: dict[str, Any] = {}
        self._uses: list[tuple[str, Any]] = []
        self._rest: list[str] = []

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        operands: list[str] = []
        self._rest = list(reversed(arguments))
        while self._rest:
            argument = self._rest.pop()
            if argument == "--":
                operands += reversed(self._rest)
                break
            if self._one_dash and argument.startswith("-") and argument[1:] in self._long:
                self._take_long(argument[1:])
            elif argument.startswith("--"):
                self._take_long(argument[2:])
            elif len(argument) > 1 and argument[0] == "-" and not self._is_number(argument):
                self._take_letters(argument[1:])
            else:
                operands.append(argument)
        return {**self._values, "operands": operands, "uses": self._uses}

    def _is_number(self, argument: str) -> bool:
        return self._ends_in_number and not self._rest and argument[1].isdigit()

    def _take_long(self, text: str) -> None:
        name, equals, value = text.partition("=")
        field = self._find(name)
        if field.option.value is None:
            if equals:
                raise self._error(f"option '--{self._full(name)}' doesn't allow an argument")
            self._store(field, True)
        elif equals:
            self._store(field, value)
        elif field.option.implied is not None:
            self._store(field, field.option.implied)
        elif self._rest:
            self._store(field, self._rest.pop())
        else:
            raise self._error(f"option '--{self._full(name)}' requires an argument")

    def _take_letters(self, letters: str) -> None:
        for position, letter in enumerate(letters):
            field = self._letters.get(letter)
            if field is None:
                raise self._error(f"invalid option -- '{letter}'")
            if field.option.value is None:
                self._store(field, True)
                continue
            if field.option.implied is not None:
                self._store(field, field.option.implied)
                continue
            attached = letters[position + 1 :]
            if not attached and not self._rest:
                raise self._error(f"option requires an argument -- '{letter}'")
            self._store(field, attached or self._rest.pop())
            return

    def _find(self, name: str) -> Field:
        if name in self._long:
            return self._long[name]
        fitting = [full for full in self._long if full.startswith(name)]
        if not fitting:
            raise self._error(f"unrecognized option '--{name}'")
        if len({self._long[full].name for full in fitting}) > 1:
            names = " ".join(f"'--{full}'" for full in fitting)
            raise self._error(f"option '--{name}' is ambiguous; possibilities: {names}")
        return self._long[fitting[0]]

    def _full(self, name: str) -> str:
        return next(full for full in self._long if full.startswith(name))

    def _store(self, field: Field, value: Any) -> None:
        option = field.option
        if field is _HELP:
            raise HelpRequest
        if option.choices and value not in (*option.choices, option.implied):
            letter = f" (-{option.letters[0]})" if option.letters else ""
            choices = " or ".join(f"'{choice}'" for choice in option.choices)
            raise CommandLineError(
                f"--{field.long_names[0]}{letter} expects {choices} not '{value}'"
            )
        self._uses.append((field.name, value))
        if field.repeats:
            self._values.setdefault(field.name, []).append(value)
        else:
            self._values[field.name] = value

    def _error(self, message: str) -> CommandLineError:
        return CommandLineError(message, self._called)
