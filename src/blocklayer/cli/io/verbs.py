"""The commands of `blk io`, declared once: from a declaration come parsing, usage and help texts.

1. Whether a flag takes a value, and what that is called, is told by ``usage`` ("-P pattern"); what
   a flag means is told by ``flags``. Letters that ``usage`` does not show are listed before it.
2. A line is split at spaces and nothing else: there is no quoting.
3. Flags and operands mix in any order, as with GNU ``getopt``. A command without flags takes words
   that start with a dash as operands.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from blocklayer.errors import UsageError

if TYPE_CHECKING:
    from blocklayer.cli.io.session import Session


class CommandError(UsageError):
    """A command that failed. ``str()`` is its result, for standard output; empty: all is said."""


class CallError(UsageError):
    """A command with wrong flags or operands: the user is shown its usage, after ``str()``."""


class Given(msgspec.Struct):
    """What the user gave a command."""

    flags: dict[str, list[str]]
    operands: list[str]

    def has(self, *letters: str) -> bool:
        """Whether any of the flags was given."""
        return any(letter in self.flags for letter in letters)

    def value(self, letter: str) -> str | None:
        """The last value of a flag."""
        return self.flags[letter][-1] if letter in self.flags else None


class Verb(msgspec.Struct, frozen=True, kw_only=True):
    """One command."""

    name: str
    run: Callable[[Session, Given], Awaitable[None]]
    summary: str
    alias: str | None = None
    usage: str = ""
    flags: Mapping[str, str] = {}
    """Letter: meaning."""
    least: int = 0
    most: int | None = 0
    """How many words may follow the name, flags included; ``most`` None: any number."""
    operands: tuple[int, int | None] | None = None
    """How many of them may be no flags, where that says more."""
    details: str = ""
    """What ``help`` says beyond the summary, before the flags."""
    needs_image: bool = True
    changes: bool = False
    """CommandError for an image that was opened read-only."""

    def usage_line(self, called: str | None = None) -> str:
        """Name (or what it was ``called``), arguments and summary, as in the list of commands."""
        shown = set(re.findall(r"-(\w)", self.usage))
        bundle = "".join(letter for letter in self.flags if letter not in shown)
        words = [
            called or self.name,
            f"[-{bundle}]" if bundle else "",
            self.usage,
            "--",
            self.summary,
        ]
        return " ".join(word for word in words if word)

    @property
    def help_text(self) -> str:
        """The paragraphs below the usage line; empty for plain commands."""
        lines = ["", *(f" {line}".rstrip() for line in self.details.splitlines())]
        lines += [f" -{letter}, -- {meaning}" for letter, meaning in self.flags.items()]
        return "\n".join([*lines, ""]) if self.details else ""

    def check_count(self, count: int, called: str) -> None:
        """Raise UsageError unless so many words may follow the name, which was ``called``."""
        if self.least <= count and (self.most is None or count <= self.most):
            return
        if self.most is None:
            expected = f"at least {self.least} arguments"
        elif self.most == self.least:
            expected = f"{self.least} arguments"
        else:
            expected = f"between {self.least} and {self.most} arguments"
        raise UsageError(f"bad argument count {count} to {called}, expected {expected}")

    def parse(self, words: list[str], called: str) -> Given:
        """``words``, which followed the name, which was ``called``. Raises CallError."""
        if not self.flags:
            return Given({}, words)
        valued = set(re.findall(r"-(\w) \w", self.usage))
        flags: dict[str, list[str]] = {}
        operands: list[str] = []
        rest = list(reversed(words))
        while rest:
            word = rest.pop()
            if word == "--":
                operands += reversed(rest)
                break
            if not word.startswith("-") or word == "-":
                operands.append(word)
                continue
            for position, letter in enumerate(word[1:], 2):
                if letter not in self.flags:
                    raise CallError(f"{called}: invalid option -- '{letter}'")
                found = flags.setdefault(letter, [])
                if letter not in valued:
                    found.append("")
                    continue
                value = word[position:]
                if not value and not rest:
                    raise CallError(f"{called}: option requires an argument -- '{letter}'")
                found.append(value or rest.pop())
                break
        least, most = self.operands or (0, None)
        if len(operands) < least or (most is not None and len(operands) > most):
            raise CallError
        return Given(flags, operands)


def by_name(verbs: Iterable[Verb]) -> dict[str, Verb]:
    """``verbs`` by their names and aliases."""
    table: dict[str, Verb] = {}
    for verb in verbs:
        table[verb.name] = verb
        if verb.alias:
            table[verb.alias] = verb
    return table
