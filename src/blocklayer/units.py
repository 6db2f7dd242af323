"""Sizes and offsets: the units people write, the ones they read, and alignment.

1. Sizes are 1024-based; a suffix is one of b k K M G T P E (``k`` and ``K`` are the same).
2. Guest and host offsets are different types: adding one to the other is a type error.
"""

from __future__ import annotations

import errno
import math
from typing import Final, NewType

from blocklayer.errors import UsageError

GuestOffset = NewType("GuestOffset", int)
"""A byte offset in the disk that a node shows."""
HostOffset = NewType("HostOffset", int)
"""A byte offset in the child that holds the bytes."""

SECTOR: Final = 512
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
MAX_SIZE: Final = (1 << 63) - 1
"""The largest size any image, option or request may name."""

_MAX_DIGITS: Final = 100
"""Far more than any size has; Python refuses to convert thousands of them."""

_SUFFIXES: Final = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of ``alignment`` not above ``value``."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` not below ``value``."""
    return -(-value // alignment) * alignment


def div_up(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, 8, …"""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str, *, default_suffix: str = "B", what: str = "size") -> int:
    """Bytes named by ``text``: ``"64k"``, ``"1.5G"``, ``"0x200"``, ``"512"``.

    Raises UsageError when it is no size, or (with errno ERANGE) when it does not fit in 63 bits.
    """
    body = text.strip()
    if not body:
        raise UsageError(f"Invalid {what} '{text}': expected a number with an optional suffix")
    if body[:2].lower() == "0x":
        return _bounded(_parse_hex(body, text, what), text, what)
    shift = _SUFFIXES[default_suffix]
    if body[-1].upper() in _SUFFIXES:
        shift = _SUFFIXES[body[-1].upper()]
        body = body[:-1]
    whole, point, fraction = body.partition(".")
    if not body.isascii() or not whole.isdigit() or (point and not fraction.isdigit()):
        raise UsageError(
            f"Invalid {what} '{text}': use a number with an optional suffix k, M, G, T, P or E"
        )
    if len(body) > _MAX_DIGITS:
        raise UsageError(f"Invalid {what} '{text[:_MAX_DIGITS]}…': too many digits")
    if point and shift == 0 and int(fraction) != 0:
        raise UsageError(f"Invalid {what} '{text}': a fraction of a byte")
    value = int(whole) << shift
    if point:
        value += (int(fraction) << shift) // 10 ** len(fraction)
    return _bounded(value, text, what)


def _parse_hex(body: str, text: str, what: str) -> int:
    digits = body[2:]
    # int() would also take signs and underscores.
    if not digits.isalnum():
        raise UsageError(f"Invalid {what} '{text}': not a hexadecimal number")
    try:
        return int(digits, 16)
    except ValueError:
        raise UsageError(f"Invalid {what} '{text}': not a hexadecimal number") from None


def _bounded(value: int, text: str, what: str) -> int:
    if value > MAX_SIZE:
        error = UsageError(f"Invalid {what} '{text}': must be less than 8 EiB")
        error.errno = errno.ERANGE
        raise error
    return value


def format_size(size: int) -> str:
    """``size`` as people read it, three digits: ``"64 KiB"``, ``"1.5 GiB"``, ``"512 B"``."""
    # The next unit starts at 1000 of the one below, so that no more than three digits show.
    _, exponent = math.frexp(size / (1000.0 / 1024.0))
    power = min(max((exponent - 1) // 10, 0), 6)
    return f"{size / (1 << (power * 10)):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"
