"""A line typed at the QMP prompt, as a message: ``blockdev-add driver=file filename=a.raw``.

1. ``name=value`` gives an argument; dots nest (``file.driver=file``). A value is a number,
   ``true``, ``false``, ``null``, an object or array in JSON or in Python's words, a text in quotes,
   or else the text as it stands.
2. Blanks separate, but not within quotes or brackets.
3. A line that begins with ``{`` is the whole message in JSON.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any, Final

from blocklayer.errors import UsageError

_PAIRS: Final = {"(": ")", "[": "]", "{": "}"}
_WORDS: Final[dict[str, Any]] = {"true": True, "false": False, "null": None}
_MAX_NUMBER_DIGITS: Final = 30


def parse_message(line: str) -> dict[str, Any]:
    """The QMP message that ``line`` means. Raises UsageError."""
    if line.lstrip().startswith("{"):
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"this is no JSON: {error}") from None
        assert isinstance(message, dict)
        return message
    name, *words = split_words(line)
    arguments = parse_arguments(words)
    return {"execute": name, **({"arguments": arguments} if arguments else {})}


def parse_action(line: str) -> dict[str, Any]:
    """One action of a transaction. Raises UsageError."""
    name, *words = split_words(line)
    return {"type": name, "data": parse_arguments(words)}


def parse_arguments(words: Iterable[str]) -> dict[str, Any]:
    """``name=value`` words as an object. Raises UsageError."""
    arguments: dict[str, Any] = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise UsageError(f"'{word}' is no argument: write name=value")
        *outer, last = path.split(".")
        place = arguments
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UsageError(f"'{path}': '{name}' has a value already, and no members")
        if last in place:
            raise UsageError(f"'{path}' is given twice")
        place[last] = parse_value(text)
    return arguments


def parse_value(text: str) -> Any:
    """The value that ``text`` means. Raises UsageError."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text[:1] in ("{", "[", '"', "'"):
        return _literal(text)
    if len(text) <= _MAX_NUMBER_DIGITS:
        for kind in (int, float):
            try:
                number = kind(text)
            except ValueError:
                continue
            # "inf" and "1_000" are texts, whatever Python makes of them.
            return number if set(text) <= set("+-.0123456789eE") else text
    return text


def split_words(line: str) -> list[str]:
    """``line`` cut at blanks outside of quotes and brackets. Raises UsageError."""
    words: list[str] = []
    closing: list[str] = []
    word, quote, escaped = "", "", False
    for character in line:
        if not quote and not closing and character.isspace():
            words += [word] if word else []
            word = ""
            continue
        word += character
        if quote:
            ended = character == quote and not escaped
            escaped = character == "\\" and not escaped
            quote = "" if ended else quote
        elif character in "\"'" and (closing or word[:-1].endswith("=")):
            # Within a plain word a quote is a character like others: it's.
            quote = character
        elif character in _PAIRS and (closing or word[:-1].endswith("=")):
            closing.append(_PAIRS[character])
        elif closing and character == closing[-1]:
            closing.pop()
    if quote or closing:
        raise UsageError(f"a closing {quote or closing[-1]} is missing")
    return words + ([word] if word else [])


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text, mode="eval")
        return ast.literal_eval(_JsonWords().visit(tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UsageError(f"'{text}' is neither JSON nor a Python literal") from None


class _JsonWords(ast.NodeTransformer):
    """``true``, ``false`` and ``null`` among Python's words."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in _WORDS:
            return ast.copy_location(ast.Constant(_WORDS[node.id]), node)
        return node
