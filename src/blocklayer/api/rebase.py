"""Rebasing: an overlay on another backing file, reading as before.

1. The overlay's header changes last; until then it reads as before over its old backing file.
2. ``unsafe`` changes the header only; whether the new backing file fits is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec

from blocklayer.api.convert import reporter
from blocklayer.api.disk import Disk, Image
from blocklayer.api.progress import Progress
from blocklayer.api.results import Rebased
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.driver import BackingReference, ProtocolDriver
from blocklayer.graph.filename import resolve_relative, storage_of
from blocklayer.graph.gate import Policy
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.convert import supports_compression
from blocklayer.jobs.copying import CopyOptions
from blocklayer.jobs.rebase import change_backing
from blocklayer.jobs.rebase import rebase as rebase_roots


class NewBacking(msgspec.Struct, frozen=True, kw_only=True):
    """What an overlay is to stand on; ``filename`` None or empty for nothing."""

    filename: str | None
    format: str | None = None
    unsafe: bool = False
    compress: bool = False
    """Compress what must be copied into the overlay."""
    cache: str = "writeback"
    force_share: bool = False


async def rebase(
    image: Image,
    backing: str | None,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    unsafe: bool = False,
    compress: bool = False,
    progress: Callable[[Progress], None] | None = None,
    policy: Policy | None = None,
) -> Rebased:
    """Put ``image`` on ``backing``, None for no backing file; it reads as before. Raises
    BlockError. Cancelled, the image still has its old backing file.
    """
    new = NewBacking(filename=backing, format=backing_format, unsafe=unsafe, compress=compress)
    async with await Disk.open(
        image, format=format, writable=True, backing=not unsafe, policy=policy
    ) as overlay:
        return await rebase_disk(overlay, new, reporter(progress, overlay.size))


async def rebase_disk(
    overlay: Disk, new: NewBacking, progress: Callable[[int], None] | None = None
) -> Rebased:
    """The same for an open disk; ``progress`` gets the bytes done."""
    reference = _reference(overlay, new)
    copied = 0
    if not new.unsafe:
        copied = await _make_independent(overlay, new, progress)
    try:
        await change_backing(overlay.root, reference)
    except BlockError as error:
        raise error.reworded(_refusal(new, str(error))) from error
    if progress is not None:
        progress(overlay.size)
    return Rebased(
        filename=overlay.root.node.filename,
        backing_filename=reference.filename if reference else None,
        backing_filename_format=reference.format if reference else None,
        bytes_copied=copied,
    )


def _refusal(new: NewBacking, reason: str) -> str:
    return f"Could not change the backing file to '{new.filename or ''}': {reason}"


def _reference(overlay: Disk, new: NewBacking) -> BackingReference | None:
    """What the header will say. Raises UsageError if that cannot be."""
    if not overlay.root.node.driver.supports_backing:
        raise UsageError(_refusal(new, "Operation not supported"))
    if not new.filename:
        return None
    if new.format is None:
        raise UsageError(_refusal(new, "backing format must be specified"))
    return BackingReference(new.filename, new.format)


async def _make_independent(
    overlay: Disk, new: NewBacking, progress: Callable[[int], None] | None
) -> int:
    """Write into the overlay what the new backing file does not show as the old one did."""
    if new.compress and not supports_compression(type(overlay.root.node.driver)):
        raise UsageError("Compression not supported for this file format")
    async with AsyncExitStack() as opened:
        below = None
        if new.filename:
            below = await opened.enter_async_context(await _open_new(overlay, new, new.filename))
        old = None
        if overlay.root.node.backing is not None:
            old = Root(overlay.root.node.backing, "rebase", Permission.CONSISTENT_READ)
            opened.push_async_callback(old.close)
        return await rebase_roots(
            overlay.root,
            old,
            below.root if below else None,
            CopyOptions(compress=new.compress),
            progress=progress,
        )


async def _open_new(overlay: Disk, new: NewBacking, filename: str) -> Disk:
    full = resolve_relative(storage_of(overlay.root.node).filename, filename)
    try:
        disk = await Disk.open(
            full,
            format=new.format,
            cache=new.cache,
            force_share=new.force_share,
            graph=overlay.graph,
        )
    except BlockError as error:
        raise error.reworded(f"Could not open new backing file '{full}': {error}") from error
    if _identity(overlay.root.node) in map(_identity, disk.root.node.chain()):
        await disk.close()
        raise UsageError(
            f"Could not open new backing file '{full}': it is, or stands on, the image itself"
        )
    return disk


def _identity(node: Node) -> object:
    """Equal for two nodes that are stored in the same place."""
    driver = storage_of(node).driver
    known = driver.identity() if isinstance(driver, ProtocolDriver) else None
    return node if known is None else known
