"""What a check found, and what a repair would do: the answers of ``check`` and ``rehearse``."""

from __future__ import annotations

from typing import Final

import msgspec

PAGE_SIZE: Final = 4096
"""Bytes of the pieces of a file in which a rehearsal tells what would change."""


class CheckResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What ``check`` found, in QEMU's terms; counts are of clusters or entries."""

    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = []
    """What was found, one line each, in the order found ("ERROR …", "Leaked …", "Repairing …")."""


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
