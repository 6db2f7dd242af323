"""Commands for special storage: zoned devices, and nodes with breakpoints (QEMU's `blkdebug`).

1. No driver of this package has zones or breakpoints. Arguments are read as for one that has, and
   the answer is the one that qemu-io gives for all other images.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

from blocklayer.cli.io.session import Session
from blocklayer.cli.io.texts import number
from blocklayer.cli.io.verbs import CommandError, Given, Verb

_REASON = os.strerror(errno.ENOTSUP)


def _on_zones(what: str) -> Callable[[Session, Given], Awaitable[None]]:
    async def run(session: Session, given: Given) -> None:
        for text in given.operands:
            number(text)
        raise CommandError(f"zone {what} failed: {_REASON}")

    return run


def _on_breakpoints(what: str) -> Callable[[Session, Given], Awaitable[None]]:
    async def run(session: Session, given: Given) -> None:
        tag = given.operands[0]
        raise CommandError(f"Could not {what.format(tag=tag)}: {_REASON}")

    return run


def _zones(name: str, alias: str, summary: str, usage: str = "offset len", most: int = 2) -> Verb:
    return Verb(
        name=f"zone_{name}",
        alias=alias,
        run=_on_zones(name),
        usage=usage,
        least=max(2, most - 1),
        most=most,
        summary=f"{summary} (zoned devices only)",
    )


def _breakpoints(name: str, refusal: str, summary: str, usage: str = "tag") -> Verb:
    count = len(usage.split())
    return Verb(
        name=name,
        run=_on_breakpoints(refusal),
        usage=usage,
        least=count,
        most=count,
        summary=f"{summary} (nodes with breakpoints only)",
    )


VERBS = (
    _breakpoints("break", "set breakpoint", "stop the next request at an event", "event tag"),
    _breakpoints("remove_break", "remove breakpoint {tag}", "forget a breakpoint"),
    _breakpoints("resume", "resume request", "let a stopped request go on"),
    _breakpoints("wait_break", "wait for breakpoint {tag}", "wait until a request has stopped"),
    _zones("append", "zap", "write at the end of a zone", "offset len [len..]", 4),
    _zones("close", "zc", "close zones"),
    _zones("finish", "zf", "make zones full"),
    _zones("open", "zo", "open zones"),
    _zones("report", "zrp", "list zones", "offset number"),
    _zones("reset", "zrs", "empty zones"),
)
