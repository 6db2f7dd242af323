"""What a repair would do: the answer of ``FormatDriver.rehearse``."""

from __future__ import annotations

from typing import Final

import msgspec

from blocklayer.graph.driver import CheckResult

PAGE_SIZE: Final = 4096
"""Bytes of the pieces of a file in which a rehearsal tells what would change."""


class ChangedPage(msgspec.Struct, frozen=True):
    """``PAGE_SIZE`` bytes of an image's file that a repair would change, before and after.

    What lies past the end of the file counts as zeros.
    """

    offset: int
    before: bytes
    after: bytes


class Rehearsal(msgspec.Struct, frozen=True):
    """A repair that was not done. Sizes are those of the file, in bytes."""

    found: CheckResult
    """What the repair would find, and what of it it would mend."""
    after: CheckResult
    """What a check after it would find."""
    changed: list[ChangedPage]
    size_before: int
    size_after: int
