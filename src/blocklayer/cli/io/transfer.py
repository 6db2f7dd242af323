"""What the commands that move guest data share: their common flags, timing, and results.

1. A request's own result is a line on standard output, in qemu-io's words; why it failed follows in
   full on standard error.
2. An asynchronous request is refused at once for what is wrong with its arguments; what becomes of
   it later is printed when it is known, and does not change the exit code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable

from blocklayer.cli import console
from blocklayer.cli.io.texts import report
from blocklayer.cli.io.verbs import CommandError, Given
from blocklayer.errors import BlockError

STATISTICS = {"C": "print what the request took as one line of numbers"}
QUIET = {"q": "do not print what the request took"}
REGISTER = {"r": "take memory that drivers know beforehand (none needs that: no effect)"}
INVALID = {"i": "only count as a request that was invalid"}
IGNORED = {"p": "means nothing; old scripts give it"}
VM_STATE = {"b": "not on the disk, but in the VM state behind it"}

MANY = "[-P pattern] off len [len..]"
"""What the commands with several buffers take."""

ASYNCHRONOUS = """\
Success means that the {what} was begun: how it ended is printed when it has,
and aio_flush waits for all that were begun."""


class Timed:
    """One request: carries it out, times it, and says what became of it."""

    def __init__(self, given: Given, doing: str, offset: int, count: int) -> None:
        self._given = given
        self._doing = doing
        self._offset = offset
        self._count = count
        self._seconds = 0.0

    async def run(self, request: Awaitable[None], failed: str) -> None:
        """Raises CommandError, which starts with ``failed``, if the request fails."""
        start = time.perf_counter()
        try:
            await request
        except BlockError as error:
            console.error(str(error))
            raise CommandError(f"{failed} failed: {os.strerror(error.errno)}") from None
        self._seconds = time.perf_counter() - start

    def report(self) -> None:
        """Unless ``-q`` was given."""
        if not self._given.has("q"):
            count, parsable = self._count, self._given.has("C")
            console.say(
                report(self._doing, self._offset, count, count, self._seconds, parsable=parsable)
            )


async def reported(request: Awaitable[None], timed: Timed, failed: str) -> None:
    """Carry out an asynchronous request and say what became of it."""
    try:
        await timed.run(request, failed)
        timed.report()
    except CommandError as refusal:
        say_refusal(refusal)


def say_refusal(refusal: CommandError) -> None:
    """The result of a command that failed."""
    if str(refusal):
        console.say(str(refusal))
