"""`blk img convert` from standard input, or to standard output: what ``-`` stands for.

1. An image never goes to a terminal, and nothing but the image goes to standard output.
2. What comes from standard input is raw: any other format is read here and there.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing

from blocklayer.cli import console
from blocklayer.drivers import REGISTRY
from blocklayer.drivers.host.pipes import Pipe
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.root import Root
from blocklayer.graph.streams import ImageStream
from blocklayer.jobs.copying import CopyOptions
from blocklayer.jobs.receiving import Receiver, can_grow
from blocklayer.jobs.streaming import Streaming, StreamOptions

PIPE = "-"
"""The operand that stands for standard input, or output."""


def check_output(no_create: bool) -> None:
    """Raise UsageError if standard output cannot become an image."""
    if no_create:
        raise UsageError("-n cannot be used with standard output as target")
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if sys.stdout.isatty():
        raise UsageError(
            "an image is not written to a terminal: redirect standard output, or name a file"
        )


def check_input(format: str | None, target_format: str, options: Mapping[str, str] | None) -> None:
    """Raise BlockError unless standard input can be read as ``format`` and stored.

    ``options`` are those of a new target, None if it exists.
    """
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    if format is None:
        raise UsageError(
            "standard input is not looked at to guess its format: say -f raw if that is what it is"
        )
    if format != "raw":
        raise UnsupportedError(
            f"format '{format}' cannot be read from standard input, only raw can: its parts are "
            "read in any order. Store it in a file first"
        )
    if options is None:
        return
    if options.get("preallocation", "off") != "off":
        raise UsageError("preallocation needs a size, and that of standard input is not known")
    if not can_grow(REGISTRY.load(target_format)):
        raise UnsupportedError(
            f"images of format '{target_format}' cannot grow, and the size of standard input is "
            "not known: convert to raw or qcow2 first"
        )


async def give(
    sources: Sequence[Root], image: ImageStream, options: StreamOptions, progress: str | None
) -> None:
    """Write ``image``, filled from ``sources``, to standard output."""
    console.flush()
    with (
        console.Progress(progress, aside=True) as shown,
        Pipe(sys.stdout.fileno(), "standard output") as pipe,
    ):
        streaming = Streaming(sources, image, options, shown.update)
        await streaming.plan()
        async with aclosing(streaming.chunks()) as pieces:
            async for piece in pieces:
                await pipe.write(piece)
        shown.update(streaming.size, streaming.size)


async def take(target: Root, options: CopyOptions, progress: str | None, *, grow: bool) -> None:
    """Fill ``target`` from standard input."""
    descriptor = sys.stdin.fileno()
    status = os.fstat(descriptor)
    # Of a pipe nobody knows how much it will give.
    total = status.st_size if stat.S_ISREG(status.st_mode) else 0
    with console.Progress(progress) as shown, Pipe(descriptor, "standard input") as pipe:

        def update(done: int) -> None:
            if total:
                shown.update(done, total)

        size = await Receiver(pipe.read, target, options, grow=grow, progress=update).receive()
        shown.update(size, size)
