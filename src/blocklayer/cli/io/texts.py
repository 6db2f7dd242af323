"""What the user writes and reads in `blk io`: numbers, patterns, sizes, times, reports and dumps.

Texts are those of qemu-io, since test suites and parsers are made for them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from blocklayer.cli.io.verbs import CommandError
from blocklayer.errors import UsageError
from blocklayer.units import KIB, SECTOR, parse_size

REQUEST_MAX = 2**31 - 512
"""The largest request: sectors counted in bytes by a signed 32-bit number."""

_NUMBER = re.compile(
    r"\s*\+?(?:(?P<hex>0x[0-9a-f]+)|(?P<whole>\d*)(?:\.(?P<fraction>\d*))?(?P<suffix>[bkmgtpe]?))",
    re.IGNORECASE | re.ASCII,
)
_INTEGER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_LINE_BYTES = 16


def number(text: str) -> int:
    """Bytes named by ``text``. Raises CommandError."""
    if re.match(r"\s*-\d", text):
        raise CommandError(f"Parsing error: argument too large -- {text}")
    found = _NUMBER.fullmatch(text)
    try:
        if found is None or not (found["hex"] or found["whole"] or found["fraction"]):
            raise UsageError(text)
        return parse_size(
            found["hex"] or f"{found['whole'] or 0}.{found['fraction'] or 0}{found['suffix']}"
        )
    except UsageError as error:
        if error.errno == errno.ERANGE:
            raise CommandError(f"Parsing error: argument too large -- {text}") from None
        raise CommandError(
            f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        ) from None


def length(text: str, limit: str = "") -> int:
    """Bytes of one request; ``limit`` says how to ask for a larger one. Raises CommandError."""
    value = number(text)
    if value > REQUEST_MAX:
        raise CommandError(f"length cannot exceed {REQUEST_MAX}{limit}, given {text}")
    return value


def check_sectors(offset: int, count: int) -> None:
    """Requests to the VM state are of whole sectors. Raises CommandError."""
    for name, value in (("offset", offset), ("count", count)):
        if value % SECTOR:
            raise CommandError(f"{value} is not a sector-aligned value for '{name}'")


def total_length(texts: list[str]) -> int:
    """Bytes of one request given as the lengths of its buffers. Raises CommandError."""
    total = 0
    for text in texts:
        value = number(text)
        if value > REQUEST_MAX:
            raise CommandError(f"Argument '{text}' exceeds maximum size {REQUEST_MAX}")
        total += value
        if total > REQUEST_MAX:
            raise CommandError(f"The total number of bytes exceed the maximum size {REQUEST_MAX}")
    return total


def plain_integer(text: str) -> int | None:
    """A number as C's ``strtol`` reads it with base 0 (``010`` is eight), or None."""
    if not _INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-")
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    return int(digits, base) * (-1 if text.startswith("-") else 1)


def pattern_byte(text: str) -> int:
    """The byte that ``-P`` names. Raises CommandError."""
    value = plain_integer(text)
    if value is None or not 0 <= value <= 0xFF:
        raise CommandError(f"{text} is not a valid pattern byte")
    return value


def size_text(value: float) -> str:
    """``"512 bytes"``, ``"64 KiB"``, ``"1.500 MiB"``."""
    power = 0
    scaled = value
    while scaled >= KIB and power < len(_UNITS) - 1:
        scaled /= KIB
        power += 1
    text = f"{scaled:.3f}" if power else f"{scaled:f}"
    whole, _, fraction = text.partition(".")
    return f"{whole if not fraction.strip('0') else text} {_UNITS[power]}"


def _time_text(seconds: float, *, fixed: bool) -> str:
    hundredths = int(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    # Any request of a second or more is shown in full.
    if fixed or seconds >= 1:
        return f"{hours}:{minutes:02}:{rest // 100:02}.{rest % 100:02}"
    return f"{rest // 100:02}.{rest % 100:02} sec"


def report(
    doing: str, offset: int, asked: int, moved: int, seconds: float, *, parsable: bool
) -> str:
    """What a request did ("read", "wrote") and how fast; one line of numbers if ``parsable``."""
    seconds = max(seconds, 1e-9)
    time = _time_text(seconds, fixed=parsable)
    if parsable:
        return f"{moved},1,{time},{moved / seconds:.3f},{1 / seconds:.3f}"
    return (
        f"{doing} {moved}/{asked} bytes at offset {offset}\n"
        f"{size_text(moved)}, 1 ops; {time} "
        f"({size_text(moved / seconds)}/sec and {1 / seconds:.4f} ops/sec)"
    )


def dump(data: memoryview, offset: int) -> Iterator[str]:
    """Lines of 16 bytes in hex and, letters and digits only, as text."""
    for start in range(0, len(data), _LINE_BYTES):
        line = bytes(data[start : start + _LINE_BYTES])
        text = "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in line)
        yield f"{offset + start:08x}:  {' '.join(f'{byte:02x}' for byte in line)}  {text}"
