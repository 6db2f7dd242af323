"""Backups by name: ``blockdev-backup`` and ``drive-backup``, with QEMU's rules and texts.

Each is split in two, so that several can begin at one moment: ``prepare_…`` checks, and opens what
has to be opened, while everything goes on; ``Prepared.place`` runs with everybody stopped.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.job_control import check_speed, new_id
from blocklayer.drivers.copy_before_write import OnCbwError
from blocklayer.errors import UsageError
from blocklayer.graph import edit
from blocklayer.graph.create import create_image
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.filename import image_options, scheme_of
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.jobs.background import Policies
from blocklayer.jobs.backup import Backup, BackupOptions, BitmapMode, SyncMode
from blocklayer.jobs.group import Group
from blocklayer.jobs.job import OnError
from blocklayer.jobs.starting import check_backup, place_backup

_MAX_WORKERS: Final = (1 << 31) - 1


class BackupPerf(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """How fast; sizes in bytes. ``use-copy-range`` is a wish: who copies is up to the storage."""

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: Annotated[int, Meta(ge=0, le=(1 << 64) - 1)] = 0


class BackupCommon(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What both take; ``speed`` in bytes per second."""

    job_id: str | None = None
    device: str
    sync: SyncMode
    speed: int = 0
    bitmap: str | None = None
    bitmap_mode: BitmapMode | None = None
    compress: bool = False
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    on_cbw_error: OnCbwError = "break-guest-write"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None
    discard_source: bool = False
    x_perf: BackupPerf = msgspec.field(default_factory=BackupPerf)


class BlockdevBackup(BackupCommon, kw_only=True):
    """``target``: a node."""

    target: str


class DriveBackup(BackupCommon, kw_only=True):
    """``target``: a file, to be made unless ``mode`` says that it exists."""

    target: str
    format: str | None = None
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"


class Prepared:
    """A backup that can begin: ``place`` it inside ``edit.changing``, ``release`` it afterwards."""

    def __init__(
        self,
        daemon: Daemon,
        arguments: BackupCommon,
        target: Node,
        options: BackupOptions,
        *,
        backing: Node | None = None,
    ) -> None:
        self.node = daemon.find(arguments.device)
        self.target = target
        self._daemon = daemon
        self._arguments = arguments
        self._options = options
        self._backing = backing
        self._given_up: Node | None = None

    @property
    def nodes(self) -> tuple[Node, Node]:
        """What nobody may be inside of."""
        return self.node, self.target

    async def place(self, group: Group) -> Backup:
        """Enter the job in ``group``. The moment is now."""
        arguments = self._arguments
        check_backup(self.node, self.target, self._options)
        identifier = new_id(self._daemon, arguments.job_id, arguments.device)
        check_speed(arguments.speed)
        change = None
        if self._backing is not None:
            self._given_up = self.target.backing
            change = edit.set_backing(self.target, self._backing)
        try:
            return await place_backup(
                group, self.node, self.target, self._options,
                filter_name=arguments.filter_node_name, identifier=identifier,
                speed=arguments.speed, auto_finalize=arguments.auto_finalize,
                auto_dismiss=arguments.auto_dismiss,
            )  # fmt: skip
        except BaseException:
            if change is not None:
                change.undo()
            raise

    async def release(self) -> None:
        """Close the target if it was opened for this and no job uses it."""
        await self._daemon.graph.release(self.target)
        if self._given_up is not None:
            await self._daemon.graph.release(self._given_up)


async def blockdev_backup(daemon: Daemon, arguments: BlockdevBackup) -> Backup:
    """Begin a backup to a node. Raises BlockError."""
    return await _begin(daemon, await prepare_blockdev_backup(daemon, arguments))


async def drive_backup(daemon: Daemon, arguments: DriveBackup) -> Backup:
    """Begin a backup to a file, which is made if need be. Raises BlockError."""
    return await _begin(daemon, await prepare_drive_backup(daemon, arguments))


async def _begin(daemon: Daemon, prepared: Prepared) -> Backup:
    group = Group(daemon.jobs)
    try:
        async with edit.changing(daemon.graph):
            backup = await prepared.place(group)
    finally:
        await prepared.release()
    group.start()
    return backup


async def prepare_blockdev_backup(daemon: Daemon, arguments: BlockdevBackup) -> Prepared:
    """Everything up to the moment itself."""
    node = daemon.find(arguments.device)
    target = daemon.find(arguments.target)
    return Prepared(daemon, arguments, target, await _options(node, arguments))


async def prepare_drive_backup(daemon: Daemon, arguments: DriveBackup) -> Prepared:
    """Everything up to the moment itself; the target is made, and open."""
    node = daemon.find(arguments.device)
    layers = node.chain()
    below: Node | None = None
    sync = arguments.sync
    if sync == "none":
        below = node
    elif sync == "top" and len(layers) > 1:
        below = layers[1]
    elif sync == "top":
        sync = "full"
    format = arguments.format
    if arguments.mode != "existing":
        format = format or layers[0].driver.NAME
        await _create(daemon.graph, arguments.target, format, node.size, below)
    target = await _open(daemon.graph, arguments.target, format, alone=sync == "none")
    try:
        options = await _options(node, arguments)
        options.sync = sync
        backing = below if sync == "none" and target.driver.supports_backing else None
        return Prepared(daemon, arguments, target, options, backing=backing)
    except BaseException:
        await daemon.graph.release(target)
        raise


async def _create(graph: Graph, name: str, format: str, size: int, below: Node | None) -> None:
    if format not in graph.registry.table:
        raise UsageError(f"Unknown file format '{format}'")
    backing = backing_format = None
    if below is not None:
        layer = below.chain()[0]
        backing, backing_format = layer.filename, layer.driver.NAME
        if os.path.dirname(name) and scheme_of(backing) is None:
            # What names it is in another folder.
            backing = os.path.abspath(backing)
    await create_image(
        graph, name, format, {}, size=size, backing=backing, backing_format=backing_format,
        check_backing=False,
    )  # fmt: skip


async def _open(graph: Graph, name: str, format: str | None, *, alone: bool) -> Node:
    """The target; ``alone``: without the backing file that its header names."""
    if format is not None and format not in graph.registry.table:
        raise UsageError(f"Unknown file format '{format}'")
    options: dict[str, Any] = {
        **image_options(name, graph.registry, format), "discard": "unmap", "detect-zeroes": "unmap",
    }  # fmt: skip
    if alone and format is not None and graph.registry.load(format).supports_backing:
        options["backing"] = None
    return await open_options(graph, options, Flags(read_only=False))


async def _options(node: Node, arguments: BackupCommon) -> BackupOptions:
    bitmap = _bitmap(node, arguments)
    if bitmap is not None:
        await bitmap.load()
    perf = arguments.x_perf
    if not 1 <= perf.max_workers <= _MAX_WORKERS:
        raise UsageError(f"max-workers must be between 1 and {_MAX_WORKERS}")
    if perf.max_chunk < 0:
        raise UsageError("max-chunk must be zero (which means no limit) or positive")
    return BackupOptions(
        sync=arguments.sync,
        bitmap=bitmap,
        bitmap_mode=arguments.bitmap_mode or "on-success",
        compress=arguments.compress,
        discard_source=arguments.discard_source,
        on_cbw_error=arguments.on_cbw_error,
        policies=Policies(
            on_source_error=arguments.on_source_error, on_target_error=arguments.on_target_error
        ),
        max_workers=perf.max_workers,
        max_chunk=perf.max_chunk,
        min_cluster_size=perf.min_cluster_size,
    )


def _bitmap(node: Node, arguments: BackupCommon) -> DirtyBitmap | None:
    """The bitmap that is meant, if its use makes sense. Raises UsageError."""
    sync, mode, name = arguments.sync, arguments.bitmap_mode, arguments.bitmap
    if name is None:
        if sync in ("incremental", "bitmap"):
            raise UsageError(f"must provide a valid bitmap name for '{sync}' sync mode")
        if mode is not None:
            raise UsageError("Cannot specify bitmap sync mode without a bitmap")
        return None
    bitmap = node.dirty_bitmaps.get(name)
    if bitmap is None:
        raise UsageError(f"Bitmap '{name}' could not be found")
    if sync == "incremental" and mode not in (None, "on-success"):
        raise UsageError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
    if sync != "incremental" and mode is None:
        raise UsageError("Bitmap sync mode must be given when providing a bitmap")
    bitmap.check()
    if sync == "none":
        raise UsageError("sync mode 'none' does not produce meaningful bitmap outputs")
    if sync in ("full", "top") and mode == "never":
        raise UsageError(
            f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode "
            f"'{sync}'"
        )
    return bitmap
