"""Backups by name: ``blockdev-backup`` and ``drive-backup``, with QEMU's rules and texts.

Both are actions (``daemon.actions``): several can begin at one moment, which is also that of what
else their transaction does.

1. The bitmap is looked up at the moment itself: an action before may have made it.
2. Jobs begin when all actions of their transaction have taken effect.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from blocklayer.daemon import actions
from blocklayer.daemon.actions import Action, Options
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.job_control import check_speed, new_id
from blocklayer.daemon.snapshots import seen_from
from blocklayer.drivers.copy_before_write import OnCbwError
from blocklayer.errors import UsageError
from blocklayer.graph import edit
from blocklayer.graph.create import create_image
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.filename import image_options
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.options import Size
from blocklayer.jobs.background import Policies
from blocklayer.jobs.backup import Backup, BackupOptions, BitmapMode, SyncMode
from blocklayer.jobs.group import Group
from blocklayer.jobs.job import OnError
from blocklayer.jobs.starting import check_backup, place_backup
from blocklayer.jobs.states import Status

_MAX_WORKERS: Final = (1 << 31) - 1


class BackupPerf(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """How fast; sizes in bytes. ``use-copy-range`` is a wish: who copies is up to the storage."""

    use_copy_range: bool = False
    max_workers: int = 64
    max_chunk: int = 0
    min_cluster_size: Size = 0


class BackupCommon(Options, kw_only=True):
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


class _Backup(Action):
    """What both do once there is a target."""

    joins_group = True
    options: BackupCommon
    node: Node
    target: Node
    _job: Backup | None = None
    _backing: Node | None = None
    """What is to show through the target, in place of what its header names."""
    _change: edit.Change | None = None

    async def begin_with(self, node: Node, target: Node) -> None:
        """Both ends, open and free to be held."""
        self.node, self.target = self.pin(node), self.pin(target)
        self.nodes = [node, target]
        bitmap = node.dirty_bitmaps.get(self.options.bitmap or "")
        if bitmap is not None and not bitmap.inconsistent:
            await bitmap.load()

    def sync(self) -> SyncMode:
        """What to save, in the end."""
        return self.options.sync

    async def change(self) -> None:
        """Put the job in place. The moment is now."""
        options = self.options
        wanted = await _job_options(self.node, options, self.sync())
        check_backup(self.node, self.target, wanted)
        identifier = new_id(self.daemon, options.job_id, options.device)
        check_speed(options.speed)
        if self._backing is not None:
            if self.target.backing is not None:
                self.pin(self.target.backing)
            self._change = edit.set_backing(self.target, self._backing)
        self.group = self.group or Group(self.daemon.jobs)
        self._job = await place_backup(
            self.group, self.node, self.target, wanted,
            filter_name=options.filter_node_name, identifier=identifier, speed=options.speed,
            auto_finalize=options.auto_finalize, auto_dismiss=options.auto_dismiss,
        )  # fmt: skip

    async def undo(self) -> None:
        """Take the job out again."""
        if self._job is not None:
            await self._job.withdraw()
        if self._change is not None:
            self._change.undo()

    def commit(self) -> None:
        """Let the job begin, with all of its group."""
        assert self.group is not None
        assert self._job is not None
        if self._job.status is Status.CREATED:
            self.group.start()


class Blockdev(_Backup):
    """``blockdev-backup``."""

    NAME = "blockdev-backup"
    Options = BlockdevBackup
    options: BlockdevBackup

    async def prepare(self) -> None:
        """Find both ends."""
        options, daemon = self.options, self.daemon
        await self.begin_with(daemon.find(options.device), daemon.find(options.target))


class Drive(_Backup):
    """``drive-backup``."""

    NAME = "drive-backup"
    Options = DriveBackup
    options: DriveBackup

    def sync(self) -> SyncMode:
        """Without a layer below, the top layer is all there is."""
        alone = self.options.sync == "top" and len(self.node.chain()) == 1
        return "full" if alone else self.options.sync

    async def prepare(self) -> None:
        """Make the target, and open it."""
        options, graph = self.options, self.daemon.graph
        node = self.daemon.find(options.device)
        layers = node.chain()
        below: Node | None = None
        if options.sync == "none":
            below = node
        elif options.sync == "top" and len(layers) > 1:
            below = layers[1]
        format = options.format
        if options.mode != "existing":
            format = format or layers[0].driver.NAME
            await _create(graph, options.target, format, node.size, below)
        alone = options.sync == "none"
        target = await _open(graph, options.target, format, alone=alone)
        if alone and target.driver.supports_backing:
            self._backing = node
        try:
            await self.begin_with(node, target)
        except BaseException:
            await graph.release(target)
            raise


async def blockdev_backup(daemon: Daemon, arguments: BlockdevBackup) -> None:
    """Begin a backup to a node. Raises BlockError."""
    await actions.carry_out(daemon, [Blockdev(daemon, arguments)])


async def drive_backup(daemon: Daemon, arguments: DriveBackup) -> None:
    """Begin a backup to a file, which is made if need be. Raises BlockError."""
    await actions.carry_out(daemon, [Drive(daemon, arguments)])


async def _create(graph: Graph, name: str, format: str, size: int, below: Node | None) -> None:
    if format not in graph.registry.table:
        raise UsageError(f"Unknown file format '{format}'")
    backing = backing_format = None
    if below is not None:
        layer = below.chain()[0]
        backing, backing_format = seen_from(name, layer), layer.driver.NAME
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


async def _job_options(node: Node, arguments: BackupCommon, sync: SyncMode) -> BackupOptions:
    bitmap = _bitmap(node, arguments)
    if bitmap is not None:
        await bitmap.load()
    perf = arguments.x_perf
    if not 1 <= perf.max_workers <= _MAX_WORKERS:
        raise UsageError(f"max-workers must be between 1 and {_MAX_WORKERS}")
    if perf.max_chunk < 0:
        raise UsageError("max-chunk must be zero (which means no limit) or positive")
    return BackupOptions(
        sync=sync,
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
