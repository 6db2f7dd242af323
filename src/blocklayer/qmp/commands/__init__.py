"""All commands: importing this package declares them."""

from __future__ import annotations

from blocklayer.qmp.commands import backups, chardev, descriptors, human, nodes, objects, protocol
from blocklayer.qmp.commands.table import COMMANDS

__all__ = ["COMMANDS", "backups", "chardev", "descriptors", "human", "nodes", "objects", "protocol"]
