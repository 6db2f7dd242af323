"""Reading commands from standard input: a prompt with history on a terminal, plain lines elsewhere.

1. While requests are under way, waiting for input does not stop them.
2. Ctrl-C at the prompt ends the session as the end of input does, but for the exit code.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Collection

_CHUNK = 64 * 1024


class Prompt:
    """Standard input, line by line."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._rest = b""
        self._ended = False
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self._interactive:
            # Importing it is what gives input() its line editing and history.
            import readline  # noqa: F401

    async def line(self, busy: Collection[asyncio.Task[None]]) -> str | None:
        """The next line; None at the end of input. ``busy`` are the requests under way."""
        busy = [task for task in busy if not task.done()]
        if self._interactive and not busy:
            return await self._ask()
        sys.stdout.write(self._text)
        sys.stdout.flush()
        while b"\n" not in self._rest and not self._ended:
            if busy and not await _readable_before(busy):
                busy = []
                if self._interactive:
                    sys.stdout.write("\r")
                    return await self._ask()
            chunk = os.read(sys.stdin.fileno(), _CHUNK)
            self._ended = not chunk
            self._rest += chunk
        line, newline, self._rest = self._rest.partition(b"\n")
        return os.fsdecode(line) if line or newline else None

    async def _ask(self) -> str | None:
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            # A Ctrl-C that came before takes effect here, not after the next line.
            await asyncio.sleep(0)
            return input(self._text)
        except EOFError:
            sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            raise
        finally:
            signal.signal(signal.SIGINT, handler)


async def _readable_before(busy: Collection[asyncio.Task[None]]) -> bool:
    """Wait for input or for all of ``busy``; whether there is input."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    file = sys.stdin.fileno()

    def found() -> None:
        if not readable.done():
            readable.set_result(None)

    try:
        loop.add_reader(file, found)
    except PermissionError:
        # A regular file, from which reading never waits.
        return True
    try:
        done = asyncio.gather(*busy, return_exceptions=True)
        await asyncio.wait((readable, done), return_when=asyncio.FIRST_COMPLETED)
        return readable.done()
    finally:
        loop.remove_reader(file)
