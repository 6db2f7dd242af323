"""Errors as QMP shows them: a class that programs look at, and a sentence for people.

1. An exception's class names its QMP class in ``error_class``; one that says nothing is
   ``GenericError``. So errors of the floors below need no table here.
"""

from __future__ import annotations

from typing import Any, Final

from blocklayer.errors import BlockError, UsageError

GENERIC: Final = "GenericError"


class CommandError(UsageError):
    """A command was refused."""

    error_class = GENERIC


class CommandNotFoundError(CommandError):
    """There is no such command, or not now."""

    error_class = "CommandNotFound"


class DeviceNotFoundError(CommandError):
    """No device, node or character device has that name."""

    error_class = "DeviceNotFound"


class DeviceNotActiveError(CommandError):
    """Nothing runs there that the command could act on."""

    error_class = "DeviceNotActive"


def describe(error: BlockError) -> dict[str, Any]:
    """The member ``error`` of a reply."""
    return {"class": getattr(error, "error_class", GENERIC), "desc": str(error)}
