"""Commands about the session: open, close, reopen, waiting, crashing, help and quit."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import msgspec

from blocklayer.cli import console
from blocklayer.cli.io.session import Session, Wanted
from blocklayer.cli.io.texts import number, plain_integer
from blocklayer.cli.io.verbs import CallError, CommandError, Given, Verb
from blocklayer.errors import UsageError
from blocklayer.graph.options import parse_pairs

_CACHE_OPTIONS = ("cache.direct", "cache.no-flush")
_FIXED = ("driver", "filename", "node-name")
"""Members of a node that make it what it is."""


def _options(given: Given) -> dict[str, str]:
    options: dict[str, str] = {}
    for text in given.flags.get("o", ()):
        options.update(parse_pairs(text))
    return options


async def _open(session: Session, given: Given) -> None:
    options = _options(given)
    if not given.operands and not options:
        raise CallError
    cache = "none" if given.has("n") else Wanted().cache
    await session.open(
        Wanted(
            name=given.operands[0] if given.operands else None,
            options=options,
            read_only=given.has("r"),
            snapshot=given.has("s"),
            copy_on_read=given.has("C"),
            force_share=given.has("U"),
            cache=given.value("t") or cache,
            discard=given.value("d") or Wanted().discard,
            aio=given.value("i") or ("native" if given.has("k") else Wanted().aio),
        )
    )


async def _close(session: Session, given: Given) -> None:
    await session.close()


async def _reopen(session: Session, given: Given) -> None:
    assert session.image is not None
    before, options = session.image.wanted, _options(given)
    if len(given.flags.get("r", [])) + len(given.flags.get("w", [])) > 1:
        raise UsageError("Only one -r/-w option may be given")
    if given.has("r", "w") and "read-only" in options:
        raise UsageError("Cannot set both -r/-w and 'read-only'")
    if given.has("c") and any(name in options for name in _CACHE_OPTIONS):
        raise UsageError("Cannot set both -c and the cache options")
    _check_changeable(session, options)
    merged = {**before.options, **options}
    read_only = before.read_only
    if given.has("r", "w"):
        read_only = given.has("r")
        merged.pop("read-only", None)
    wanted = msgspec.structs.replace(
        before, options=merged, read_only=read_only, cache=given.value("c") or before.cache
    )
    wanted.check()
    await session.reopen(wanted)


def _check_changeable(session: Session, options: dict[str, str]) -> None:
    """Raise UsageError for options that the node does not have, or cannot change."""
    fields = msgspec.structs.fields(type(session.node.options))
    known = {field.encode_name for field in fields}
    for name, value in options.items():
        top, _, last = name.rpartition(".")
        if name == "driver" and value == session.node.driver.NAME:
            continue
        if name.partition(".")[0] not in known or last in _FIXED:
            raise UsageError(f"Cannot change the option '{last if top else name}'")


async def _aio_flush(session: Session, given: Given) -> None:
    await session.drain()


async def _sleep(session: Session, given: Given) -> None:
    text = given.operands[0]
    milliseconds = plain_integer(text)
    if milliseconds is None or milliseconds < 0:
        raise CommandError(f"{text} is not a valid number")
    await asyncio.sleep(milliseconds / 1000)


async def _abort(session: Session, given: Given) -> None:
    # What was said is part of the test that wants the crash; what was written is not saved.
    sys.stdout.flush()
    os.abort()


async def _sigraise(session: Session, given: Given) -> None:
    text = given.operands[0]
    value = number(text)
    if value >= signal.NSIG:
        raise CommandError(f"signal argument '{text}' is too large to be a valid signal")
    sys.stdout.flush()
    if value not in (0, signal.SIGKILL, signal.SIGSTOP):
        # Python ignores or catches some.
        signal.signal(value, signal.SIG_DFL)
    os.kill(os.getpid(), value)


async def _quit(session: Session, given: Given) -> None:
    session.finished = True


async def _help(session: Session, given: Given) -> None:
    # The table holds this command too.
    from blocklayer.cli.io.table import TABLE

    if given.operands:
        called = given.operands[0]
        verb = TABLE.get(called)
        if verb is None:
            raise CommandError(f"command {called} not found")
        console.say(verb.usage_line(called))
        if verb.help_text:
            console.say(verb.help_text)
        return
    for name in sorted({verb.name for verb in TABLE.values()}):
        console.say(TABLE[name].usage_line())
    console.say("\nUse 'help commandname' for extended help.")


VERBS = (
    Verb(
        name="abort",
        run=_abort,
        needs_image=False,
        summary="end as a crash would: nothing is written back",
    ),
    Verb(name="aio_flush", run=_aio_flush, summary="wait for all asynchronous requests"),
    Verb(name="close", alias="c", run=_close, summary="close the image"),
    Verb(
        name="help",
        alias="?",
        run=_help,
        usage="[command]",
        most=1,
        needs_image=False,
        summary="explain one command, or list all",
    ),
    Verb(
        name="open",
        alias="o",
        run=_open,
        usage="[-t cache] [-d discard] [-i aio] [-o options] [path]",
        flags={
            "r": "for reading only",
            "s": "write to a temporary overlay, which is thrown away",
            "C": "keep a copy of what is read from backing files in the image",
            "n": "the same as -t none",
            "k": "the same as -i native",
            "U": "although others write to it",
            "i": "AIO mode (threads, native or io_uring); requests are served alike in all",
            "t": "cache mode",
            "d": "what becomes of discards: ignore or unmap",
            "o": "options of the driver, as name=value,...",
        },
        least=1,
        most=None,
        operands=(0, 1),
        needs_image=False,
        summary="open an image",
        details="""\
makes an image the one that all other commands work on

Example:
'open -r -o driver=qcow2 disk.qcow2' - opens a qcow2 image for reading only""",
    ),
    Verb(
        name="quit",
        alias="q",
        run=_quit,
        most=None,
        needs_image=False,
        summary="end the session",
    ),
    Verb(
        name="reopen",
        run=_reopen,
        usage="[(-r|-w)] [-c cache] [-o options]",
        flags={
            "r": "for reading only",
            "w": "for reading and writing",
            "c": "in this cache mode",
            "o": "with these options of the driver",
        },
        most=None,
        operands=(0, 0),
        summary="open the image anew, with other options",
        details="""\
closes the image and opens it with other options; if they do not fit, with the old ones

Example:
'reopen -r' - takes no more writes

""",
    ),
    Verb(
        name="sigraise",
        run=_sigraise,
        usage="signal",
        least=1,
        most=1,
        needs_image=False,
        summary="send this process a signal",
        details="""\
sends this process the signal of that number

Example:
'sigraise 9' - ends as a crash would, with nothing written back""",
    ),
    Verb(
        name="sleep",
        run=_sleep,
        usage="milliseconds",
        least=1,
        most=1,
        needs_image=False,
        summary="wait so many milliseconds",
    ),
)
