"""What all verbs share: the connection to the daemon, and how results are said.

1. A verb works through QMP alone; it serves blocklayer's daemon and QEMU's alike.
2. File names of images are made absolute: the daemon's current folder is its own affair.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from blocklayer.cli import console
from blocklayer.cli.common import Output, say_result
from blocklayer.cli.live.disks import Disk, Disks
from blocklayer.cli.options import Command, CommandLineError
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client
from blocklayer.units import MAX_SIZE, MIB, parse_size

DISK = ("DISK", "a device, an export, or the node of a disk's active layer")


class Verb(Command, kw_only=True):
    """A command whose first operand is the daemon's address."""

    output: Output = "human"

    async def run(self) -> int:
        """Connect, and do it."""
        address, *operands = self.operands
        names = [name for name, _ in self.OPERANDS]
        least = sum(not name.startswith("[") for name in names)
        many = any("…" in name for name in names)
        if len(operands) < least or (len(operands) > len(names) and not many):
            raise CommandLineError(f"Expecting {' '.join(names) or 'no further operand'}")
        async with await Client.connect(address) as client:
            return await self.act(client, operands)

    async def act(self, client: Client, operands: list[str]) -> int:
        """The verb's own work; the answer is the exit code."""
        raise AssertionError(f"{type(self).__name__} has no act()")

    def tell(self, result: Any, *lines: str) -> None:
        """The result, as JSON or in ``lines``."""
        if self.output == "json":
            say_result(result)
        else:
            for line in lines:
                console.say(line)


async def find_disk(client: Client, name: str) -> Disk:
    """The disk called ``name``. Raises UsageError."""
    return (await Disks.ask(client)).find(name)


def absolute(path: str) -> str:
    """``path`` for a daemon whose current folder may be another."""
    return os.path.abspath(path)


def bandwidth(text: str | None, in_bytes: bool) -> int:
    """Bytes a second; a plain number is in MiB/s unless ``in_bytes``. 0: no limit."""
    if text is None:
        return 0
    if not text.isdigit() or in_bytes:
        return parse_size(text, what="bandwidth")
    rate = int(text) * MIB
    if rate > MAX_SIZE:
        raise UsageError(f"Invalid bandwidth '{text}': too large")
    return rate


def pairs(text: str, known: frozenset[str], option: str) -> tuple[str, dict[str, str]]:
    """``DISK,key=value,…``: the disk, and the keys, which must be ``known``.

    A comma that belongs to a value is written twice. Raises UsageError.
    """
    first, *rest = text.replace(",,", "\0").split(",")
    values: dict[str, str] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals or key not in known:
            raise UsageError(
                f"--{option} {text}: '{key}' is none of {', '.join(sorted(known))} "
                "(as DISK,key=value,…)"
            )
        values[key] = value.replace("\0", ",")
    if not first:
        raise UsageError(f"--{option} {text}: no disk is named")
    return first.replace("\0", ","), values


class Done(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a verb without numbers of its own."""

    disk: str | None = None
    job: str | None = None
    status: str
    """started, ready, pivoted, finished, kept, cancelled or done."""
    active: str | None = None
    """The node of the disk's active layer now."""
