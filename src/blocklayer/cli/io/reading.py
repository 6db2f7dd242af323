"""Commands that read guest data, verify it and show it: read, readv, aio_read."""

from __future__ import annotations

from blocklayer.cli import console
from blocklayer.cli.io.session import Session
from blocklayer.cli.io.texts import (
    check_sectors,
    dump,
    length,
    number,
    pattern_byte,
    total_length,
)
from blocklayer.cli.io.transfer import (
    ASYNCHRONOUS,
    IGNORED,
    INVALID,
    MANY,
    QUIET,
    REGISTER,
    STATISTICS,
    VM_STATE,
    Timed,
    say_refusal,
)
from blocklayer.cli.io.verbs import CallError, CommandError, Given, Verb
from blocklayer.units import MIB

_VERIFY = {"P": "every byte read must be this one"}
_DUMP = {"v": "show what was read, in hex"}


def _matches(view: memoryview, byte: int) -> bool:
    block = bytes([byte]) * min(len(view), MIB)
    # Compared as bytes: comparing memoryviews goes byte by byte.
    return all(block.startswith(bytes(view[at : at + MIB])) for at in range(0, len(view), MIB))


class _Read:
    """A read, its verification and its dump; shared by the commands that read."""

    def __init__(self, session: Session, given: Given, offset: int, count: int) -> None:
        self._session = session
        self._given = given
        self._offset = offset
        self._count = count
        pattern = given.value("P")
        self._pattern = None if pattern is None else pattern_byte(pattern)
        self.verify_start, self.verify_end = 0, count

    async def run(self, name: str) -> bool:
        """Whether the pattern, if there is one, was found. Raises CommandError."""
        view = self._session.buffer(self._count)
        timed = Timed(self._given, "read", self._offset, self._count)
        root = self._session.root
        read = root.read_vm_state if self._given.has("b") else root.read_into
        await timed.run(read(self._offset, view), name)
        good = self._verify(view[self.verify_start : self.verify_end])
        if self._given.has("v") and not self._given.has("q"):
            for line in dump(view, self._offset):
                console.say(line)
        timed.report()
        return good

    def _verify(self, view: memoryview) -> bool:
        if self._pattern is None or _matches(view, self._pattern):
            return True
        start = self._offset + self.verify_start
        console.say(f"Pattern verification failed at offset {start}, {len(view)} bytes")
        return False

    async def run_later(self) -> None:
        """As an asynchronous request: it says itself what became of it."""
        try:
            await self.run("readv")
        except CommandError as refusal:
            say_refusal(refusal)


def _check_found(good: bool) -> None:
    if not good:
        raise CommandError


async def _read(session: Session, given: Given) -> None:
    start_text, length_text = given.value("s"), given.value("l")
    start = number(start_text) if start_text is not None else 0
    verified = number(length_text) if length_text is not None else None
    if given.has("s", "l") and not given.has("P"):
        raise CallError
    offset, count = number(given.operands[0]), length(given.operands[1])
    if given.has("b"):
        check_sectors(offset, count)
    end = count if verified is None else start + verified
    if not start <= end <= count:
        raise CommandError("pattern verification range exceeds end of read data")
    request = _Read(session, given, offset, count)
    request.verify_start, request.verify_end = start, end
    _check_found(await request.run("read"))


async def _readv(session: Session, given: Given) -> None:
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    _check_found(await _Read(session, given, offset, count).run("readv"))


async def _aio_read(session: Session, given: Given) -> None:
    if given.has("i"):
        console.say("injecting invalid read request")
        return
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    request = _Read(session, given, offset, count)

    session.start(request.run_later())


VERBS = (
    Verb(
        name="read",
        alias="r",
        run=_read,
        usage="[-P pattern [-s off] [-l len]] off len",
        flags={
            **VM_STATE,
            **STATISTICS,
            **QUIET,
            **REGISTER,
            **_DUMP,
            **IGNORED,
            **_VERIFY,
            "s": "with -P: look from here on, counted from off",
            "l": "with -P: look at so many bytes only",
        },
        least=2,
        operands=(2, 2),
        most=None,
        summary="read from the disk",
        details="""\
fills a buffer from the open image

Example:
'read -v 64k 512' - shows the 512 bytes at 64 KiB as a hex dump

With -P the command fails unless every byte is the pattern.""",
    ),
    Verb(
        name="readv",
        run=_readv,
        usage=MANY,
        flags={**STATISTICS, **QUIET, **REGISTER, **_DUMP, **_VERIFY},
        least=2,
        operands=(2, None),
        most=None,
        summary="read into several buffers",
        details="""\
fills several buffers from one place on, one for each length

Example:
'readv -v 64k 512 4k' - shows 4.5 KiB from 64 KiB on, read into two buffers""",
    ),
    Verb(
        name="aio_read",
        run=_aio_read,
        usage=MANY,
        flags={**STATISTICS, **INVALID, **QUIET, **REGISTER, **_DUMP, **_VERIFY},
        least=2,
        operands=(2, None),
        most=None,
        summary="read in the background",
        details="""\
starts a read like readv's and goes on at once

Example:
'aio_read -P 7 64k 4k' - looks in the background whether 4 KiB hold sevens
"""
        + ASYNCHRONOUS.format(what="read"),
    ),
)
