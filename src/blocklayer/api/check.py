"""Checking an image's metadata, and repairing it: typed results for ``check``.

1. After a repair the image is checked once more; the result then is what that second check found,
   together with what the first one repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from blocklayer.errors import UnsupportedError
from blocklayer.graph.checking import PAGE_SIZE, CheckResult, Rehearsal
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.node import Node

REPAIRS = {"leaks": frozenset({"leaks"}), "all": frozenset({"leaks", "errors"})}
"""What ``repair`` may name, and which kinds of damage it lets ``check`` mend."""


class ImageCheck(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """What a check found; counts are of clusters, or of entries that are wrong."""

    image_end_offset: int = 0
    compressed_clusters: int = 0
    total_clusters: int = 0
    corruptions: int = 0
    corruptions_fixed: int = 0
    check_errors: int
    leaks: int = 0
    leaks_fixed: int = 0
    allocated_clusters: int = 0
    filename: str
    format: str
    fragmented_clusters: int = 0


async def check_image(
    node: Node,
    *,
    repair: str | None = None,
    report: Callable[[list[str]], None] = lambda messages: None,
    repaired: Callable[[int, int], None] = lambda leaks, corruptions: None,
) -> ImageCheck:
    """Check ``node``'s metadata; ``repair`` is a key of ``REPAIRS``.

    ``report`` gets what each pass has to say, and ``repaired`` the numbers of leaks and corruptions
    mended before the second pass. Raises UnsupportedError for a format without checks.
    """
    driver = node.driver
    if not isinstance(driver, FormatDriver):
        raise UnsupportedError(f"Driver '{driver.NAME}' does not support checks")
    result = await driver.check(REPAIRS[repair] if repair else frozenset())
    report(result.messages)
    leaks_fixed, corruptions_fixed = result.leaks_fixed, result.corruptions_fixed
    if leaks_fixed or corruptions_fixed:
        repaired(leaks_fixed, corruptions_fixed)
        result = await driver.check(frozenset())
        report(result.messages)
    found = _image_check(node, result)
    found.leaks_fixed, found.corruptions_fixed = leaks_fixed, corruptions_fixed
    return found


class RepairPlan(msgspec.Struct, kw_only=True, rename="kebab"):
    """What a repair would do."""

    found: ImageCheck
    """What it would find; ``…_fixed`` is what it would mend."""
    after: ImageCheck
    """What a check after it would find."""
    would_write: int
    """Bytes of the image's file that would change."""
    file_size: int
    file_size_after: int


async def plan_repair(
    node: Node,
    repair: str,
    *,
    report: Callable[[list[str]], None] = lambda messages: None,
) -> tuple[RepairPlan, Rehearsal]:
    """What ``check_image`` with ``repair`` would do to ``node``; nothing is written.

    The rehearsal has the pages, as ``repair_backup.save`` takes them.
    """
    driver = node.driver
    if not isinstance(driver, FormatDriver):
        raise UnsupportedError(f"Driver '{driver.NAME}' does not support checks")
    done = await driver.rehearse(REPAIRS[repair])
    report([_as_plan(message) for message in done.found.messages])
    plan = RepairPlan(
        found=_image_check(node, done.found),
        after=_image_check(node, done.after),
        would_write=len(done.changed) * PAGE_SIZE,
        file_size=done.size_before,
        file_size_after=done.size_after,
    )
    return plan, done


def _as_plan(message: str) -> str:
    for doing, would in (("Repairing ", "Would repair "), ("Rebuilding ", "Would rebuild ")):
        if message.startswith(doing):
            return would + message.removeprefix(doing)
    return message


def _image_check(node: Node, result: CheckResult) -> ImageCheck:
    counts = {name: getattr(result, name) for name in _COUNTS}
    return ImageCheck(filename=node.filename, format=node.driver.NAME, **counts)


_COUNTS: Iterable[str] = [name for name in CheckResult.__struct_fields__ if name != "messages"]
