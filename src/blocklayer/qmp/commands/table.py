"""The one table that the modules beside this one fill."""

from __future__ import annotations

from typing import Final

from blocklayer.qmp.registry import CommandTable

COMMANDS: Final = CommandTable()
