"""All commands of the human monitor: importing this package declares them, one module a subject."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from blocklayer.qmp.human import HUMAN_COMMANDS

__all__ = ["HUMAN_COMMANDS"]

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
