"""All commands: importing this package declares them."""

from __future__ import annotations

from blocklayer.qmp.commands import (
    bitmaps,
    chardev,
    descriptors,
    human,
    protocol,
    snapshots,
    transactions,
)
from blocklayer.qmp.commands.table import COMMANDS

__all__ = [
    "COMMANDS",
    "bitmaps",
    "chardev",
    "descriptors",
    "human",
    "protocol",
    "snapshots",
    "transactions",
]
