"""A human monitor: a prompt, a line, what it prints.

1. Editing and echoing are the terminal's business (``rlwrap``, ``socat READLINE``, or a terminal's
   own line mode): nothing that comes in is sent back.
2. A line has ``MAX_LINE_SIZE`` bytes at most; the rest of a longer one is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from blocklayer.qmp.session import Session
from blocklayer.qmp.streams import ByteStream
from blocklayer.qmp.version import QEMU_VERSION, package

if TYPE_CHECKING:
    from blocklayer.qmp.server import Server

MAX_LINE_SIZE: Final = 64 * 1024
PROMPT: Final = b"(qemu) "
"""What scripts made for the original wait for."""


class HumanMonitor(Session):
    """One client at the prompt."""

    def __init__(self, server: Server, stream: ByteStream) -> None:
        super().__init__(stream)
        self.server = server
        self._rest = b""
        self._skipping = False

    async def _converse(self) -> None:
        version = ".".join(map(str, QEMU_VERSION))
        greeting = f"QEMU {version} monitor - type 'help' for more information ({package()})\r\n"
        self.send(greeting.encode() + PROMPT)
        async for data in self._input():
            for line in self._lines(data):
                execute = self.server.human_commands.execute
                text = await self.undisturbed(execute(self.server, line))
                self.send(text.encode("utf-8", errors="surrogateescape") + PROMPT)
                await self.room()

    def _lines(self, data: bytes) -> Iterator[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._skipping:
                yield line.rstrip(b"\r").decode("utf-8", errors="surrogateescape")
            self._skipping = False
        if len(self._rest) > MAX_LINE_SIZE:
            self._rest, self._skipping = b"", True
