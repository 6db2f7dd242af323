"""JSON on the wire: bytes that come in pieces, good or bad, to values; values to bytes.

1. Input may be cut anywhere. A value is given out as soon as its last byte is known to be its last.
2. The language is JSON as QEMU reads it: strings in double or single quotes, ``\\'`` in them,
   integers of 64 bits (larger ones are floats), no key twice.
3. Every mistake gives one ``BadInput``, worded as QEMU words it, and never ends the stream. What
   does not begin any token is skipped until a control character, a byte 0xFE or 0xFF, or one of
   ``[]{},:``; so a client that sends 0xFF and a newline knows that the next value starts afresh.
4. Bounds: bytes and tokens of one value, its nesting, the digits of a number. Memory is bounded by
   them, and work by the input's length: no byte is scanned twice for having come in pieces.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final

MAX_VALUE_SIZE: Final = 16 << 20
"""Bytes of one value. QEMU takes 64 MiB a token; the largest commands in use (a transaction over
hundreds of disks, a chain of 100 nodes written out) have some 100 KiB."""
MAX_TOKENS: Final = 1 << 20
MAX_NESTING: Final = 200
"""QEMU takes 1024. What is let in here must also be validated, and echoed if it is an ``id``,
within the interpreter's limit on recursion; a chain of 100 nodes written out nests 101 deep."""
MAX_WORD_SIZE: Final = 1024
"""Bytes of one number or keyword."""

_SPACE = re.compile(rb"[ \t\r\n]+")
_STRING_BODY = {
    quote: re.compile(rb"(?:[^\\\x00-\x1f\xfe\xff" + quote + rb"]|\\[^\x00-\x1f\xfe\xff])*")
    for quote in (b'"', b"'")
}
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_START = re.compile(rb"-?(?:0|[1-9][0-9]*)?(?:(?<=[0-9])\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?)?")
_WORD = re.compile(rb"[a-z]+")
_SKIPPED = re.compile(rb"[^\x00-\x1f\xfe\xff\[\]{},:]*")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,4}.?|.)", re.DOTALL)
_HEX_DIGITS = re.compile(r"[0-9a-fA-F]{4}")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"} | {c: c for c in "\"'\\/"}
_KEYWORDS: dict[str, Any] = {"true": True, "false": False, "null": None}
_NOTHING: Final = object()


class BadInput(Exception):  # noqa: N818 - a value of the stream, answered and passed over
    """A piece of input that is no JSON value; ``str()`` is what the client is told."""


def encode(value: Any, *, pretty: bool = False) -> bytes:
    """``value`` as one message: ASCII, ended by CR LF; over several lines if ``pretty``."""
    text = json.dumps(value, indent=4 if pretty else None, allow_nan=False)
    return text.encode("ascii") + b"\r\n"


class Decoder:
    """One direction of a connection: feed it bytes, take values."""

    def __init__(self) -> None:
        self._buffer = b""
        self._scanned = 0
        """How much of the string at the buffer's start is known to hold no end of it."""
        self._skipping = False
        self._value = _Value()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values, and in their places ``BadInput``, that ``data`` completes."""
        self._buffer += data
        at = 0
        try:
            while at < len(self._buffer):
                if self._skipping:
                    skipped = _SKIPPED.match(self._buffer, at)
                    assert skipped is not None
                    at = skipped.end()
                    self._skipping = at == len(self._buffer)
                    continue
                space = _SPACE.match(self._buffer, at)
                if space is not None:
                    at = space.end()
                    continue
                end, found = self._token(at)
                if end is None:
                    break
                self._value.size += end - at
                at = end
                yield from self._taken(found)
                if self._value.size > MAX_VALUE_SIZE:
                    yield self._abandon("JSON token size limit exceeded")
        finally:
            self._buffer = self._buffer[at:]
            if not self._buffer:
                self._scanned = 0
        if len(self._buffer) + self._value.size > MAX_VALUE_SIZE:
            self._buffer, self._scanned, self._skipping = b"", 0, True
            yield self._abandon("JSON token size limit exceeded")

    def _taken(self, found: Any) -> Iterator[Any]:
        """What a token completes."""
        if isinstance(found, _Stray):
            self._skipping = True
            yield self._abandon(f"JSON parse error, stray '{found}'")
            return
        self._value.take(found)
        if self._value.too_much:
            yield self._abandon(self._value.too_much)
        elif self._value.complete:
            value, self._value = self._value, _Value()
            yield BadInput(value.error) if value.error else value.result

    def _abandon(self, message: str) -> BadInput:
        self._value = _Value()
        return BadInput(message)

    def _token(self, at: int) -> tuple[int | None, Any]:
        """(end, token) of the token at ``at``; end None: more input is needed."""
        buffer = self._buffer
        first = buffer[at : at + 1]
        if first in (b'"', b"'"):
            return self._string(at, first)
        if first in b"[]{},:":
            return at + 1, _Mark(first.decode())
        if first.isdigit() or first == b"-":
            return self._number(at)
        word = _WORD.match(buffer, at, at + MAX_WORD_SIZE + 1)
        if word is None:
            return at + 1, _stray(first)
        if word.end() - at > MAX_WORD_SIZE:
            return word.end(), _stray(word[0])
        if word.end() == len(buffer):
            return None, None
        return word.end(), _Word(word[0].decode())

    def _string(self, at: int, quote: bytes) -> tuple[int | None, Any]:
        buffer = self._buffer
        body = _STRING_BODY[quote].match(buffer, at + max(1, self._scanned))
        assert body is not None
        end = body.end()
        if end == len(buffer) or (buffer[end] == 0x5C and end + 1 == len(buffer)):
            self._scanned = end - at
            return None, None
        self._scanned = 0
        if buffer[end : end + 1] == quote:
            return end + 1, _String(buffer[at + 1 : end])
        end += 2 if buffer[end] == 0x5C else 1
        return end, _stray(buffer[at:end])

    def _number(self, at: int) -> tuple[int | None, Any]:
        buffer = self._buffer
        limit = at + MAX_WORD_SIZE + 1
        number = _NUMBER.match(buffer, at, limit)
        start = _NUMBER_START.match(buffer, at, limit)
        assert start is not None
        end = max(number.end() if number else at, start.end())
        if end - at > MAX_WORD_SIZE:
            return end, _stray(buffer[at:end])
        if end == len(buffer):
            return None, None
        # A zero takes no further digits, and what is begun (a sign, a point, an e) must be ended.
        whole = number is not None and number.end() == end
        if not whole or (buffer[at:end].lstrip(b"-") == b"0" and buffer[end : end + 1].isdigit()):
            return end + 1, _stray(buffer[at : end + 1])
        return end, _number(buffer[at:end].decode())


class _Stray(str):
    """Bytes that begin no token, or break one off."""

    __slots__ = ()


class _Mark(str):
    """One of ``[]{},:``."""

    __slots__ = ()


class _Word(str):
    """``true``, ``false``, ``null``, or any other word."""

    __slots__ = ()


class _String(bytes):
    """What is between the quotes, not yet read."""

    __slots__ = ()


def _stray(found: bytes) -> _Stray:
    text = found[:MAX_WORD_SIZE].decode("utf-8", errors="replace")
    return _Stray(text.partition("\0")[0])


def _number(text: str) -> int | float:
    if text.lstrip("-").isdigit():
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return float(text)


def _read_string(raw: bytes) -> str:
    """The text of a string token. Raises BadInput."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput("invalid UTF-8 sequence in string") from None
    if "\\" not in text:
        return text
    parts, at = [], 0
    while (escape := text.find("\\", at)) >= 0:
        parts.append(text[at:escape])
        character, at = _read_escape(text, escape)
        parts.append(character)
    return "".join([*parts, text[at:]])


def _read_escape(text: str, at: int) -> tuple[str, int]:
    """(character, end) of the escape sequence at ``at``."""
    kind = text[at + 1]
    if kind != "u":
        if kind not in _ESCAPES:
            raise BadInput("invalid escape sequence in string")
        return _ESCAPES[kind], at + 2
    code, end = _read_unit(text, at), at + 6
    if 0xD800 <= code < 0xDC00 and text[end : end + 2] == "\\u":
        low = _read_unit(text, end)
        if 0xDC00 <= low < 0xE000:
            code, end = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), end + 6
    no_character = 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE
    if no_character:
        raise BadInput(f"{text[at:end]} is not a valid Unicode character")
    return chr(code), end


def _read_unit(text: str, at: int) -> int:
    digits = _HEX_DIGITS.match(text, at + 2)
    if digits is None:
        # The text's own quote has gone by now; a person finds the place without it.
        shown = re.match(r"\\u[0-9a-fA-F]*.?", text[at : at + 6], re.DOTALL)
        raise BadInput(f"{shown[0] if shown else text[at:]} is not a valid Unicode character")
    return int(digits[0], 16)


class _Value:
    """One value in the making. The first mistake is kept until the brackets are closed."""

    def __init__(self) -> None:
        self.size = 0
        self.result: Any = None
        self.error: str | None = None
        self.too_much: str | None = None
        self._tokens = 0
        self._braces = 0
        self._brackets = 0
        self._stack: list[tuple[Any, Any]] = []
        """Enclosing containers, each with the key that the value within belongs to."""
        self._container: dict[str, Any] | list[Any] | None = None
        self._key: Any = _NOTHING
        self._wanted = "value"

    @property
    def complete(self) -> bool:
        """Whether nothing is left open."""
        braces, brackets = self._braces, self._brackets
        return braces < 0 or brackets < 0 or (braces == 0 and brackets == 0)

    def take(self, token: Any) -> None:
        """Add the next token."""
        self._tokens += 1
        if isinstance(token, _Mark):
            self._count(token)
        if self._braces + self._brackets > MAX_NESTING:
            self.too_much = "JSON nesting depth limit exceeded"
        elif self._tokens > MAX_TOKENS:
            self.too_much = "JSON token count limit exceeded"
        elif self.error is None:
            try:
                self._place(token)
            except BadInput as error:
                self.error = f"JSON parse error, {error}"
                self._stack, self._container = [], None

    def _count(self, mark: str) -> None:
        self._braces += {"{": 1, "}": -1}.get(mark, 0)
        self._brackets += {"[": 1, "]": -1}.get(mark, 0)

    def _place(self, token: Any) -> None:
        wanted = self._wanted
        if wanted == "colon":
            if token != ":" or not isinstance(token, _Mark):
                raise BadInput("missing : in object pair")
            self._wanted = "value"
        elif wanted == "separator":
            self._separate(token)
        elif wanted == "first" and isinstance(token, _Mark) and token == self._closing:
            self._close()
        elif isinstance(token, _Mark) and token in "[{" and self._takes_value:
            self._open([] if token == "[" else {})
        elif isinstance(token, _Mark):
            raise BadInput("key is not a string in object" if token in "[{" else "expecting value")
        else:
            self._plain(token)

    @property
    def _closing(self) -> str:
        return "}" if isinstance(self._container, dict) else "]"

    @property
    def _takes_value(self) -> bool:
        return not isinstance(self._container, dict) or self._wanted == "value"

    def _separate(self, token: Any) -> None:
        if not isinstance(token, _Mark) or token not in ("," + self._closing):
            kind = "dict" if isinstance(self._container, dict) else "list"
            raise BadInput(f"expected separator in {kind}")
        if token == ",":
            self._wanted = "key" if isinstance(self._container, dict) else "value"
        else:
            self._close()

    def _plain(self, token: Any) -> None:
        if isinstance(token, _Word):
            if token not in _KEYWORDS:
                raise BadInput(f"invalid keyword '{token}'")
            token = _KEYWORDS[token]
        elif isinstance(token, _String):
            token = _read_string(token)
        elif isinstance(token, float) and not math.isfinite(token):
            raise BadInput("number out of range")
        if self._takes_value:
            self._put(token)
        elif not isinstance(token, str):
            raise BadInput("key is not a string in object")
        elif isinstance(self._container, dict) and token in self._container:
            raise BadInput("duplicate key")
        else:
            self._key, self._wanted = token, "colon"

    def _open(self, container: Any) -> None:
        self._stack.append((self._container, self._key))
        self._container, self._key, self._wanted = container, _NOTHING, "first"

    def _close(self) -> None:
        done = self._container
        self._container, self._key = self._stack.pop()
        self._put(done)

    def _put(self, value: Any) -> None:
        if isinstance(self._container, dict):
            self._container[self._key] = value
        elif isinstance(self._container, list):
            self._container.append(value)
        else:
            self.result = value
        self._wanted = "separator"
