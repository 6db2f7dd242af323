"""`blk img rebase`: an overlay on another backing file, reading as before.

1. The overlay's header changes last; until then it reads as before over its old backing file.
2. With ``-u`` only the header changes; whether the new backing file fits is the user's business.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

from blocklayer.api.disk import Disk
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    ForceShare,
    Format,
    ImageOpts,
    ProgressStyle,
    Quiet,
    check_cache,
    one_filename,
    open_disk,
)
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.driver import BackingReference, ProtocolDriver
from blocklayer.graph.filename import resolve_relative, storage_of
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.convert import supports_compression
from blocklayer.jobs.copying import CopyOptions
from blocklayer.jobs.rebase import change_backing, rebase


class Rebase(Command):
    """Change backing file of the image"""

    OPERANDS = (FILENAME,)

    quiet: Quiet = False
    progress: ProgressStyle = None
    format: Format = None
    image_opts: ImageOpts = False
    cache: Annotated[
        str, Option("cache mode for FILENAME (default writeback)", "t", "CACHE_MODE")
    ] = "writeback"
    backing: Annotated[
        str | None, Option('the new backing file; "" for none', "b", "BACKING_FILENAME")
    ] = None
    backing_format: Annotated[
        str | None, Option("format of the new backing file", "FB", "BACKING_FMT")
    ] = None
    backing_cache: Annotated[
        str, Option("cache mode for the backing files (default writeback)", "T", "CACHE_MODE")
    ] = "writeback"
    backing_unsafe: Annotated[
        bool, Option("only change the header: no backing file is opened", "u")
    ] = False
    compress: Annotated[bool, Option("compress what is written to the image", "c")] = False
    force_share: ForceShare = False

    async def run(self) -> int:
        name = one_filename(self.operands)
        if self.backing is None and not self.backing_unsafe:
            raise CommandLineError("Must specify backing file (-b) or use unsafe mode (-u)")
        check_cache(self.cache)
        check_cache(self.backing_cache, "source cache")
        if self.backing_format is not None and self.backing_format not in REGISTRY.table:
            raise UsageError(f"Invalid format name: '{self.backing_format}'")
        async with await open_disk(
            name,
            format=self.format,
            image_opts=self.image_opts,
            writable=True,
            backing=not self.backing_unsafe,
            cache=self.cache,
            quiet=self.quiet,
        ) as overlay:
            reference = self._reference(overlay)
            if not self.backing_unsafe:
                await self._make_independent(overlay)
            try:
                await change_backing(overlay.root, reference)
            except BlockError as error:
                raise error.reworded(self._refusal(str(error))) from error
        return 0

    def left_behind(self) -> str:
        return "the image still has its old backing file and reads as before"

    def _refusal(self, reason: str) -> str:
        return f"Could not change the backing file to '{self.backing or ''}': {reason}"

    def _reference(self, overlay: Disk) -> BackingReference | None:
        """What the header will say. Raises UsageError if that cannot be."""
        if not overlay.root.node.driver.supports_backing:
            raise UsageError(self._refusal("Operation not supported"))
        if not self.backing:
            return None
        if self.backing_format is None:
            raise UsageError(self._refusal("backing format must be specified"))
        return BackingReference(self.backing, self.backing_format)

    async def _make_independent(self, overlay: Disk) -> None:
        """Write into the overlay what the new backing file does not show as the old one did."""
        if self.compress and not supports_compression(type(overlay.root.node.driver)):
            raise UsageError("Compression not supported for this file format")
        async with AsyncExitStack() as opened:
            new = None
            if self.backing:
                new = await opened.enter_async_context(await self._open_new(overlay, self.backing))
            old = None
            if overlay.root.node.backing is not None:
                old = Root(overlay.root.node.backing, "rebase", Permission.CONSISTENT_READ)
                opened.push_async_callback(old.close)
            total = overlay.size
            with console.Progress(None if self.quiet else self.progress) as progress:
                await rebase(
                    overlay.root,
                    old,
                    new.root if new else None,
                    CopyOptions(compress=self.compress),
                    progress=lambda done: progress.update(done, total),
                )
                progress.update(total, total)

    async def _open_new(self, overlay: Disk, backing: str) -> Disk:
        full = resolve_relative(storage_of(overlay.root.node).filename, backing)
        try:
            disk = await Disk.open(
                full,
                format=self.backing_format,
                cache=self.backing_cache,
                force_share=self.force_share,
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
