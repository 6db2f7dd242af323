"""What read-only formats with compressed blocks have in common.

1. Unpacked blocks are kept, the last used ones, up to ``MAX_BYTES`` of them; a larger one alone.
"""

from __future__ import annotations

from typing import Final

from blocklayer.drivers.blocks import BlockFormatDriver
from blocklayer.errors import UnsupportedError
from blocklayer.units import MIB

MAX_BYTES: Final = 8 * MIB


class Kept:
    """Unpacked blocks, by number."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytes] = {}
        self._bytes = 0

    def get(self, number: int) -> bytes | None:
        """The block, if it is here."""
        data = self._blocks.pop(number, None)
        if data is not None:
            self._blocks[number] = data
        return data

    def put(self, number: int, data: bytes) -> None:
        """Keep a block; forget those that were not used for longest."""
        if number in self._blocks:
            return
        self._blocks[number] = data
        self._bytes += len(data)
        while self._bytes > MAX_BYTES and len(self._blocks) > 1:
            self._bytes -= len(self._blocks.pop(next(iter(self._blocks))))


class ReadOnlyFormatDriver(BlockFormatDriver):
    """Base of drivers whose images cannot be written."""

    def info(self) -> None:
        """QEMU has nothing to say either."""

    def require_read_only(self) -> None:
        """Raise UnsupportedError, or become read-only, if the node is to be writable."""
        flags = self.node.flags
        if flags.read_only:
            return
        if not flags.auto_read_only:
            raise UnsupportedError(
                f"Images in {self.NAME} format can be read only: open it read-only"
            )
        flags.read_only = True
