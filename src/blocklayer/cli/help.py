"""Help texts, made from the same declarations that parse the command line.

1. Options stand under the headlines that they were declared with: a command's own first, then those
   that many commands share.
2. No line is longer than 80 characters, on any terminal.
"""

from __future__ import annotations

import textwrap

from blocklayer.cli.options import Command, Field, fields_of

_WIDTH = 80
_COLUMN = 28
_INTERRUPTED = (130, "interrupted by Ctrl-C or SIGTERM")
_LAST_GROUPS = ("Opening images", "Output")


def summary(command: type[Command]) -> str:
    """The first line of a command's documentation."""
    return (command.__doc__ or "").strip().partition("\n")[0].rstrip(".")


def help_text(command: type[Command], called: str) -> str:
    """What ``--help`` shows."""
    rest = (command.__doc__ or "").strip().partition("\n")[2]
    operands = " ".join(name for name, _ in command.OPERANDS)
    usage = f"Usage: {called} [OPTION...] {operands}".rstrip()
    space = " " * len("Usage: ")
    lines = [f"{summary(command)}.", "", *_filled(usage, others=space), ""]
    for name, description in command.OPERANDS:
        lines += _entry(name.strip("[]"), description)
    if rest.strip():
        lines += ["", *_filled(" ".join(rest.split()))]
    for group, fields in _groups(command).items():
        lines += ["", f"{group}:"]
        for field in fields:
            lines += _entry(_forms(field), field.option.help)
    if command.EXAMPLE[0]:
        arguments, meaning = command.EXAMPLE
        lines += ["", "Example:", f"  {called} {arguments}", *_wrapped(meaning, 6)]
    lines += ["", "Exit codes:"]
    for code, meaning in (*command.EXIT_CODES, _INTERRUPTED):
        lines += _entry(str(code), meaning, 6)
    return "\n".join(lines) + "\n"


def _groups(command: type[Command]) -> dict[str, list[Field]]:
    found: dict[str, list[Field]] = {}
    for field in fields_of(command):
        found.setdefault(field.option.group, []).append(field)
    # A dict keeps the order in which keys came; those that many commands share come last.
    order = [*(group for group in found if group not in _LAST_GROUPS), *_LAST_GROUPS]
    return {group: found[group] for group in order if group in found}


def _entry(head: str, text: str, column: int = _COLUMN) -> list[str]:
    """``head``, and what it means in a column beside it, or below if it is too long."""
    lines = _wrapped(text, column)
    head = f"  {head}"
    if len(head) >= column:
        return [head, *lines]
    return [head.ljust(column) + lines[0].lstrip(), *lines[1:]]


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return _filled(text, space, space)


def _filled(text: str, first: str = "", others: str = "") -> list[str]:
    """``text`` in lines, the first and the others with these indents."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _forms(field: Field) -> str:
    option = field.option
    forms = [f"-{option.letters[0]}"] if option.letters else []
    forms.append(f"--{field.long_names[0]}")
    if option.value is not None:
        forms[-1] += f"[={option.value}]" if option.implied is not None else f" {option.value}"
    return ", ".join(forms)
