"""Disks for asynchronous callers: an image, its chain and one hold on its top, as one object.

1. Opening takes everything it needs (locks included) or nothing.
2. ``close`` writes back and reports what could not be written; leaving ``async with`` closes.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from blocklayer.api.bitmaps import Bitmaps
from blocklayer.api.map import MapEntry, map_entries
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph import snapshots
from blocklayer.graph.amend import amend
from blocklayer.graph.create import create_image
from blocklayer.graph.driver import Buffer, SnapshotInfo
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import parse_size

if TYPE_CHECKING:
    from blocklayer.api.check import ImageCheck
    from blocklayer.api.info import ImageInfo
    from blocklayer.api.inspection.report import Inspection
    from blocklayer.api.stream import Stream
    from blocklayer.graph.driver import Measurement

Image = str | os.PathLike[str] | Mapping[str, Any]
"""A file name, a ``json:{…}`` name, a URI, or a dict of ``blockdev-add`` options."""

CACHE_MODES: Final = {
    "writeback": (False, False, False),
    "none": (False, True, False),
    "writethrough": (True, False, False),
    "directsync": (True, True, False),
    "unsafe": (False, False, True),
}
"""Cache mode: (write through, bypass the host's page cache, ignore flushes)."""


class Disk:
    """An open disk. Made by ``Disk.open``; all offsets and lengths are in bytes."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.graph = root.graph
        self.bitmaps = Bitmaps(root)

    @classmethod
    async def open(
        cls,
        image: Image,
        *,
        format: str | None = None,
        writable: bool = False,
        backing: bool = True,
        force_share: bool = False,
        cache: str = "writeback",
        discard: str = "unmap",
        detect_zeroes: str = "off",
        repair: bool = False,
        one_pass: bool = False,
        snapshot: str | None = None,
        metadata_only: bool = False,
        secrets: Mapping[str, bytes] | None = None,
        policy: Policy | None = None,
        named_by: str | None = None,
        graph: Graph | None = None,
    ) -> Disk:
        """Open ``image``; ``format`` None guesses it from the first bytes.

        ``backing`` False leaves the backing chain closed. ``force_share`` reads an image that
        another process writes. ``cache`` is a name from ``CACHE_MODES``. ``repair`` lets an image
        that is marked dirty or corrupt in as it is, to be checked. ``one_pass`` keeps caches small,
        for who goes through the disk once. ``snapshot``, an id or a name, shows that internal
        snapshot in place of the disk, read-only. ``metadata_only`` opens encrypted images without
        their keys and leaves data files closed, to look at and check; ``secrets`` holds passphrases
        by the ids that options (``key-secret``) name them with. ``policy`` says what images may
        open (else ``default_policy``); ``named_by`` is the image that names this one, if it is not
        the user.
        Raises BlockError.
        """
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache mode '{cache}': use one of {', '.join(CACHE_MODES)}")
        write_through, direct, no_flush = CACHE_MODES[cache]
        flags = Flags(
            read_only=not writable,
            direct=direct,
            no_flush=no_flush,
            force_share=force_share,
            discard_unmap=discard == "unmap",
            detect_zeroes=detect_zeroes,
            repair=repair,
            one_pass=one_pass,
            named_by=named_by,
            metadata_only=metadata_only,
        )
        where = graph or Graph(REGISTRY, policy)
        for name, data in (secrets or {}).items():
            where.objects.add_secret(name, data)
        source = image if isinstance(image, (str, Mapping)) else os.fspath(image)
        node = await open_image(where, source, format=format, flags=flags, backing=backing)
        taken = int(Permission.CONSISTENT_READ)
        if writable:
            taken |= Permission.WRITE | Permission.RESIZE
        try:
            if snapshot is not None:
                await snapshots.load(node, snapshots.get(node, snapshot))
            return cls(Root(node, "the disk", taken, write_through=write_through))
        except BaseException:
            await where.release(node)
            raise

    async def __aenter__(self) -> Disk:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Write back and close. Raises what could not be written."""
        await self.root.close()

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.root.node.size

    @property
    def format(self) -> str:
        """The driver's name: ``"qcow2"``, ``"raw"``, …"""
        return self.root.node.driver.NAME

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``. Raises StorageError outside the disk."""
        return await self.root.read(offset, length)

    async def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        await self.root.read_into(offset, memoryview(buffer).cast("B"))

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Store ``data`` at ``offset``; with ``fua`` on stable storage when this returns."""
        await self.root.write(offset, data, fua=fua)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make the range read as zeros; ``unmap`` allows giving the space back to the host."""
        await self.root.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        """The range's contents are of no more use."""
        await self.root.discard(offset, length)

    async def flush(self) -> None:
        """All that was written before is on stable storage when this returns."""
        await self.root.flush()

    async def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the size; ``shrink`` allows losing the tail."""
        await self.root.truncate(size, preallocation=preallocation, shrink=shrink)

    async def amend(
        self,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        force: bool = False,
        **options: Any,
    ) -> None:
        """Change what the image is; ``options`` go by the names of ``amend -o``.

        ``force`` allows to erase the last key of an encrypted image, and with it the disk. Raises
        UsageError or UnsupportedError before anything has changed.
        """
        await amend(self.root, options, progress, force=force)

    def info(self, *, limits: bool = False) -> ImageInfo:
        """What the image is: everything but guest data; ``limits`` adds what requests it likes."""
        from blocklayer.api.info import image_info

        return image_info(self.root.node, limits=limits)

    async def check(self, *, repair: str | None = None) -> ImageCheck:
        """Whether the metadata is sound; ``repair`` "leaks" or "all" mends it. Open it for that
        with ``repair=True``. Raises UnsupportedError for a format without checks.
        """
        from blocklayer.api.check import REPAIRS, check_image

        if repair not in (None, *REPAIRS):
            raise UsageError(f"Invalid repair '{repair}': use one of {', '.join(REPAIRS)}")
        return await check_image(self.root.node, repair=repair)

    async def measure(self, format: str, **options: Any) -> Measurement:
        """How large the file of a new image of ``format`` with this disk's contents would be;
        ``options`` go by the names of ``-o``.
        """
        from blocklayer.api.measure import decode_options, measure

        return await measure(format, decode_options(format, options), source=self)

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots, oldest first."""
        return list(snapshots.listed(self.root.node))

    async def create_snapshot(self, name: str) -> SnapshotInfo:
        """Keep what the disk holds now inside the image; requests wait until that is done."""
        return await snapshots.create(self.root, name)

    async def apply_snapshot(self, snapshot: str) -> None:
        """Let the disk hold, and be as large as, what it was at the snapshot of this id or name."""
        await snapshots.apply(self.root, snapshots.get(self.root.node, snapshot))

    async def delete_snapshot(self, snapshot: str) -> None:
        """Drop the internal snapshot of this id or, if there is none, of this name."""
        await snapshots.delete(self.root, snapshots.get(self.root.node, snapshot))

    async def map(self, offset: int = 0, length: int | None = None) -> AsyncIterator[MapEntry]:
        """Where the bytes of ``[offset, offset + length)`` live, run by run."""
        end = self.size if length is None else min(self.size, offset + length)
        async for entry in map_entries(self.root.node, offset, end - offset):
            yield entry


async def create(
    filename: str | os.PathLike[str],
    size: int | str | None = None,
    *,
    format: str = "qcow2",
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    secrets: Mapping[str, bytes] | None = None,
    policy: Policy | None = None,
    **options: Any,
) -> None:
    """Make a new image. ``options`` go by the names of ``-o`` (``cluster_size="2M"``).

    ``size`` is bytes or text (``"20G"``); an overlay without one is as large as its backing image.
    ``secrets`` holds passphrases by the ids that options name them with.
    """
    graph = Graph(REGISTRY, policy)
    for name, data in (secrets or {}).items():
        graph.objects.add_secret(name, data)
    await create_image(
        graph,
        os.fspath(filename),
        format,
        options,
        size=parse_size(size) if isinstance(size, str) else size,
        backing=None if backing is None else os.fspath(backing),
        backing_format=backing_format,
    )


async def stream(disk: Disk, format: str = "qcow2", **options: Any) -> Stream:
    """What ``disk`` shows, as the bytes of a new image; see ``api.stream.stream``.

    >>> async with await blocklayer.aio.stream(disk, "qcow2", compress=True) as image:
    ...     response.content_length = image.size
    ...     async for chunk in image:
    ...         await response.write(chunk)
    """
    from blocklayer.api.stream import stream as start

    return await start(disk, format, **options)


async def inspect(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    max_size: int | None = None,
    content: bool = True,
) -> Inspection:
    """Look at the image in the file ``path`` without trusting it; opens nothing that it names.

    ``format`` must be the file's own if it is given. ``max_size`` is the largest disk, in bytes,
    that is not ``too-large``. ``content`` False leaves the start of the disk itself unread. Raises
    FormatError if the format is another one, StorageError or UsageError if there is no such file.
    """
    from blocklayer.api.inspection.inspect import inspect as inspect_image

    return await inspect_image(path, format, max_size=max_size, content=content)


async def clone(
    base: str | os.PathLike[str], *names: str | os.PathLike[str], **options: Any
) -> list[str]:
    """Make a qcow2 overlay of ``base`` under each of ``names``; ``options`` as for
    ``blocklayer.api.clone.clone``: ``format``, ``size``, ``relative``, ``force``, ``sync``,
    ``policy`` and those of new images, as ``cluster_size``.

    A clone is there complete or not at all. Raises BlockError at the first that cannot be made.
    """
    from blocklayer.api.clone import clone as make_clones

    return await make_clones(base, names, **options)
