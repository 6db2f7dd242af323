"""All commands: importing this package declares them."""

from __future__ import annotations

from blocklayer.qmp.commands import chardev, descriptors, exports, human, protocol
from blocklayer.qmp.commands.table import COMMANDS

__all__ = ["COMMANDS", "chardev", "descriptors", "exports", "human", "protocol"]
