"""Commands that change guest data: write, writev, aio_write, discard."""

from __future__ import annotations

from blocklayer.cli import console
from blocklayer.cli.io.session import Session
from blocklayer.cli.io.texts import check_sectors, length, number, pattern_byte, total_length
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
    reported,
)
from blocklayer.cli.io.verbs import CommandError, Given, Verb

_DEFAULT_PATTERN = 0xCD

_FILL = {"P": "store this byte instead of 0xcd"}
_FUA = {"f": "come back only when the data is on stable storage"}
_ZEROES = {"z": "store zeros without sending any"}
_UNMAP = {"u": "with -z: the space may be given back"}


def _pattern(given: Given) -> int:
    text = given.value("P")
    return _DEFAULT_PATTERN if text is None else pattern_byte(text)


def _filled(session: Session, count: int, block: bytes) -> memoryview:
    """``count`` bytes to write: ``block`` over and over."""
    view = session.buffer(count)
    view[:] = (block * -(-count // len(block)))[:count]
    return view


def _read_start(path: str, count: int) -> bytes:
    try:
        with open(path, "rb") as file:
            block = file.read(max(count, 1))
    except OSError as error:
        console.complain(f"{path}: {error.strerror}")
        raise CommandError from None
    if not block:
        console.complain(f"{path}: file is empty")
        raise CommandError
    return block


def _check_write_flags(given: Given) -> None:
    if given.has("b") and given.has("z"):
        raise CommandError("-b and -z cannot be specified at the same time")
    if given.has("b", "c") and given.has("f"):
        raise CommandError("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if given.has(letter) and not given.has("z"):
            raise CommandError(f"-{letter} requires -z to be specified")
    if given.has("z") + given.has("P") + given.has("s") > 1:
        raise CommandError("Only one of -z, -P, and -s can be specified at the same time")


async def _write(session: Session, given: Given) -> None:
    block = bytes([_pattern(given)])
    _check_write_flags(given)
    offset = number(given.operands[0])
    fast, path = given.has("n"), given.value("s")
    count = number(given.operands[1]) if fast else length(given.operands[1], " without -n")
    if given.has("b"):
        check_sectors(offset, count)
    if given.has("z") and given.has("r"):
        raise CommandError("cannot combine zero write with registered I/O buffer")
    if path is not None:
        block = _read_start(path, count)
    root, fua = session.root, given.has("f")
    if given.has("z"):
        unmap = given.has("u")
        request = root.write_zeroes(offset, count, unmap=unmap, fallback=not fast, fua=fua)
    elif given.has("b"):
        request = root.write_vm_state(offset, _filled(session, count, block))
    elif given.has("c"):
        request = root.write_compressed(offset, _filled(session, count, block))
    else:
        request = root.write(offset, _filled(session, count, block), fua=fua)
    timed = Timed(given, "wrote", offset, count)
    await timed.run(request, "write")
    timed.report()


async def _writev(session: Session, given: Given) -> None:
    block = bytes([_pattern(given)])
    offset, count = number(given.operands[0]), total_length(given.operands[1:])
    data = _filled(session, count, block)
    timed = Timed(given, "wrote", offset, count)
    await timed.run(session.root.write(offset, data, fua=given.has("f")), "writev")
    timed.report()


async def _aio_write(session: Session, given: Given) -> None:
    block = bytes([_pattern(given)])
    if given.has("i"):
        console.say("injecting invalid write request")
        return
    zeroes, unmap, fua = given.has("z"), given.has("u"), given.has("f")
    if zeroes and len(given.operands) > 2:
        raise CommandError("-z supports only a single length parameter")
    if unmap and not zeroes:
        raise CommandError("-u requires -z to be specified")
    if zeroes and given.has("r"):
        raise CommandError("cannot combine zero write with registered I/O buffer")
    root, offset, texts = session.root, number(given.operands[0]), given.operands[1:]
    count = number(texts[0]) if zeroes else total_length(texts)
    if zeroes:
        request = root.write_zeroes(offset, count, unmap=unmap, fua=fua)
    else:
        request = root.write(offset, _filled(session, count, block), fua=fua)
    session.start(reported(request, Timed(given, "wrote", offset, count), "aio_write"))


async def _discard(session: Session, given: Given) -> None:
    offset, count = number(given.operands[0]), length(given.operands[1])
    timed = Timed(given, "discard", offset, count)
    await timed.run(session.root.discard(offset, count), "discard")
    timed.report()


VERBS = (
    Verb(
        name="write",
        alias="w",
        run=_write,
        usage="[-P pattern | -s source_file] off len",
        flags={
            **VM_STATE,
            "c": "store the data compressed",
            **STATISTICS,
            **_FUA,
            "n": "with -z: fail where zeros would have to be written",
            **QUIET,
            **REGISTER,
            **_UNMAP,
            **_ZEROES,
            **IGNORED,
            **_FILL,
            "s": "store what this file starts with, over and over",
        },
        least=2,
        operands=(2, 2),
        most=None,
        changes=True,
        summary="write to the disk",
        details="""\
stores bytes in the open image: a pattern (0xcd unless -P names one), zeros or a file's

Example:
'write -P 7 64k 4k' - stores 4 KiB of sevens at 64 KiB""",
    ),
    Verb(
        name="writev",
        run=_writev,
        usage=MANY,
        flags={**STATISTICS, **_FUA, **QUIET, **REGISTER, **_FILL},
        least=2,
        operands=(2, None),
        most=None,
        changes=True,
        summary="write from several buffers",
        details="""\
stores several buffers from one place on, one for each length

Example:
'writev -P 7 64k 512 4k' - stores 4.5 KiB of sevens at 64 KiB, from two buffers""",
    ),
    Verb(
        name="aio_write",
        run=_aio_write,
        usage=MANY,
        flags={
            **STATISTICS,
            **_FUA,
            **INVALID,
            **QUIET,
            **REGISTER,
            **_UNMAP,
            **_ZEROES,
            **_FILL,
        },
        least=2,
        operands=(2, None),
        most=None,
        changes=True,
        summary="write in the background",
        details="""\
starts a write like writev's and goes on at once

Example:
'aio_write -P 7 64k 4k' - stores 4 KiB of sevens in the background
"""
        + ASYNCHRONOUS.format(what="write"),
    ),
    Verb(
        name="discard",
        alias="d",
        run=_discard,
        usage="off len",
        flags={**STATISTICS, **QUIET},
        least=2,
        operands=(2, 2),
        most=None,
        changes=True,
        summary="give up a range of the disk",
        details="""\
tells the image that a range is of no more use

Example:
'discard 64k 4k' - gives up the 4 KiB at 64 KiB

What reads there afterwards is the image's choice: zeros, or what was there.""",
    ),
)
