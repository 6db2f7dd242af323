"""Snapshots of disks in use: an overlay takes a node's place, or a qcow2 image keeps its state.

1. The overlay is made and open before anybody has to wait. While nobody is inside, the base is
   flushed, so that no later flush need reach below the overlay, and users move: no more than that.
2. Then the base, which nobody writes to any more, becomes read-only, with its caches as they are. A
   base that cannot be read-only stays as it is: the snapshot is made, and nothing is lost.
3. A snapshot that fails leaves no file behind that it made. A file that was there before is emptied
   only after all else was checked.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Literal

from msgspec import UNSET, UnsetType, structs

from blocklayer.daemon import actions
from blocklayer.daemon.actions import Action
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import BlockError, LockedError, StorageError, UnsupportedError, UsageError
from blocklayer.graph import create, edit, io, reopen, snapshots
from blocklayer.graph.child import Role
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.filename import image_options, resolve_relative, scheme_of
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options


class BlockdevSnapshot(actions.Options):
    """Both nodes are there already; ``overlay`` has no backing node and no users."""

    node: str
    overlay: str


class BlockdevSnapshotSync(actions.Options, kw_only=True):
    """The overlay is made, or (``existing``) opened, by the name of its file."""

    device: str | UnsetType = UNSET
    node_name: str | UnsetType = UNSET
    snapshot_file: str
    snapshot_node_name: str | UnsetType = UNSET
    format: str = "qcow2"
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"


class BlockdevSnapshotInternal(actions.Options):
    """``device``: a device or node; ``name``: the snapshot's, new and not empty."""

    device: str
    name: str


class BlockdevSnapshotDeleteInternal(actions.Options):
    """Which snapshot of ``device``: by its id, its name, or both."""

    device: str
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


def check_base(node: Node) -> None:
    """Raise LockedError or UsageError unless ``node`` may get an overlay."""
    if node.given_up and isinstance(node.driver, FilterDriver):
        # Its job has ended since it was looked up: nobody would see the overlay.
        raise UsageError(f"Cannot find device='{node.name}' nor node-name='{node.name}'")
    if node.busy:
        raise LockedError(f"Node '{node.name}' is busy: {node.busy}")
    for edge in node.parents:
        if edge.role is Role.BACKING and edge.parent is not None:
            raise LockedError(
                f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )


def check_overlay(overlay: Node) -> None:
    """Raise UsageError or LockedError unless ``overlay`` may be put above a node."""
    if any(edge.follows for edge in overlay.parents):
        raise UsageError("The overlay is already in use")
    if overlay.busy:
        raise LockedError(f"Node '{overlay.name}' is busy: {overlay.busy}")
    if overlay.backing is not None:
        raise UsageError("The overlay already has a backing image")
    if not overlay.driver.supports_backing:
        raise UsageError("The overlay does not support backing images")


class _External(Action):
    base: Node
    overlay: Node
    _change: edit.Change | None = None
    _failed = False

    async def change(self) -> None:
        """Let users move to the overlay."""
        check_base(self.base)
        check_overlay(self.overlay)
        await _flush(self.base)
        self._change = edit.append(self.base, self.overlay)

    async def undo(self) -> None:
        """Users go back."""
        if self._change is not None:
            self._change.undo()

    async def abort(self) -> None:
        """There is no snapshot."""
        self._failed = True

    async def clean(self) -> None:
        """Let the base be read-only from now on."""
        if self._failed:
            return
        async with edit.changing(self.daemon.graph, self.base):
            # What it has not stored it stores when it closes, or says that it cannot.
            with suppress(BlockError):
                await reopen.retire(self.base)


async def _flush(node: Node) -> None:
    if not node.read_only:
        await io.flush(node)


class External(_External):
    """``blockdev-snapshot``."""

    NAME = "blockdev-snapshot"
    Options = BlockdevSnapshot
    options: BlockdevSnapshot

    async def prepare(self) -> None:
        """Find both nodes, and bring most of what is to be flushed to the disk already."""
        self.base = self.pin(self.daemon.find(self.options.node))
        self.overlay = self.pin(self.daemon.find(self.options.overlay))
        self.nodes = [self.base, self.overlay]
        check_base(self.base)
        check_overlay(self.overlay)
        await _flush(self.overlay)
        await _flush(self.base)


class Sync(_External):
    """``blockdev-snapshot-sync``."""

    NAME = "blockdev-snapshot-sync"
    Options = BlockdevSnapshotSync
    options: BlockdevSnapshotSync
    _made: str | None = None
    """The file that was not there before."""
    _opened: Node | None = None

    async def prepare(self) -> None:
        """Make the overlay, and open it."""
        options, graph = self.options, self.daemon.graph
        self.base = self.pin(_find(self.daemon, options))
        self.nodes = [self.base]
        name = self._new_name()
        check_base(self.base)
        await _flush(self.base)
        if options.mode != "existing":
            await self._create()
        image = image_options(options.snapshot_file, graph.registry, options.format)
        wanted: dict[str, Any] = {**image, "backing": None}
        if name is not None:
            wanted["node-name"] = name
        below = self.base.flags
        flags = Flags(
            read_only=below.read_only, auto_read_only=below.auto_read_only, direct=below.direct,
            no_flush=below.no_flush, discard_unmap=below.discard_unmap,
        )  # fmt: skip
        self._opened = self.overlay = await open_options(graph, wanted, flags)
        self.pin(self.overlay)
        check_overlay(self.overlay)
        # A new file's header is durable before a guest's flush may rely on it.
        await _flush(self.overlay)

    def _new_name(self) -> str | None:
        options = self.options
        if options.snapshot_node_name is UNSET:
            if options.node_name is not UNSET:
                raise UsageError("New overlay node-name missing")
            return None
        if options.snapshot_node_name in self.daemon.graph.nodes:
            raise UsageError("New overlay node-name already in use")
        return self.daemon.graph.new_name(options.snapshot_node_name)

    async def _create(self) -> None:
        graph, options = self.daemon.graph, self.options
        if options.format not in graph.registry.table:
            raise UsageError(f"Unknown file format '{options.format}'")
        layer = self.base.chain()[0]
        backing = seen_from(options.snapshot_file, layer)
        decoded, below = await create.prepare(
            graph, options.snapshot_file, options.format, {}, self.base.size, backing,
            layer.driver.NAME, check_backing=False,
        )  # fmt: skip
        if not os.path.lexists(options.snapshot_file):
            self._made = options.snapshot_file
        await create.write_image(graph, options.snapshot_file, options.format, decoded, below)

    async def abort(self) -> None:
        """Close the overlay, and remove what was made."""
        self._failed = True
        opened, self._opened = self._opened, None
        await self.unpin()
        if opened is not None:
            await self.daemon.graph.release(opened)
        if self._made is not None:
            create.remove(self._made)


def _find(daemon: Daemon, options: BlockdevSnapshotSync) -> Node:
    """By device or node name, of which one is given."""
    device = "" if options.device is UNSET else options.device
    name = "" if options.node_name is UNSET else options.node_name
    node = None
    if name:
        node = daemon.graph.nodes.get(name)
    elif device and device not in daemon.graph.nodes:
        node = daemon.find(device)
    if node is None:
        raise UsageError(f"Cannot find device='{device}' nor node-name='{name}'")
    return node


def seen_from(overlay: str, layer: Node) -> str:
    """The name under which an image ``overlay`` finds ``layer``: as it is, if that is right."""
    name = layer.filename
    if name.startswith("json:") or scheme_of(name) not in (None, "file"):
        return name
    path = name.removeprefix("file:")
    found = resolve_relative(overlay, path) if not overlay.startswith("json:") else ""
    with suppress(OSError, ValueError):
        if os.path.samefile(found, path):
            return path
    return os.path.abspath(path)


class Internal(Action):
    """``blockdev-snapshot-internal-sync``."""

    NAME = "blockdev-snapshot-internal-sync"
    Options = BlockdevSnapshotInternal
    options: BlockdevSnapshotInternal
    _taken: SnapshotInfo | None = None

    async def prepare(self) -> None:
        """Find the image."""
        node = self.pin(self.daemon.find(self.options.device))
        self.nodes = [node]
        self._check(node)
        await _flush(node)

    def _check(self, node: Node) -> None:
        device, name = self.options.device, self.options.name
        _check_root(node)
        if node.read_only:
            raise StorageError(f"Device '{device}' is read only", 1)
        if not node.driver.supports_snapshots:
            raise UnsupportedError(
                f"Block format '{node.driver.NAME}' used by device '{device}' does not support "
                "internal snapshots"
            )
        if not name:
            raise UsageError("Name is empty")
        if snapshots.find(node, name=name) is not None:
            raise UsageError(f"Snapshot with name '{name}' already exists on device '{device}'")

    async def change(self) -> None:
        """Keep what the image holds."""
        node = self.nodes[0]
        self._check(node)
        self._taken = await snapshots.take(node, self.options.name)

    async def undo(self) -> None:
        """Drop it again."""
        if self._taken is not None:
            await snapshots.drop(self.nodes[0], self._taken)


def _check_root(node: Node) -> None:
    if node.busy:
        raise LockedError(f"Node '{node.name}' is busy: {node.busy}")
    if any(edge.parent is not None for edge in node.parents):
        raise UsageError("Need a root block node")


async def blockdev_snapshot(daemon: Daemon, options: BlockdevSnapshot) -> None:
    """Let a node that is there already become the overlay of another."""
    await actions.carry_out(daemon, [External(daemon, options)])


async def blockdev_snapshot_sync(daemon: Daemon, options: BlockdevSnapshotSync) -> None:
    """Make an overlay, and let it take the place of a node."""
    await actions.carry_out(daemon, [Sync(daemon, options)])


async def blockdev_snapshot_internal_sync(
    daemon: Daemon, options: BlockdevSnapshotInternal
) -> None:
    """Keep the state of a disk in its image."""
    await actions.carry_out(daemon, [Internal(daemon, options)])


async def blockdev_snapshot_delete_internal_sync(
    daemon: Daemon, options: BlockdevSnapshotDeleteInternal
) -> SnapshotInfo:
    """Drop a state that an image keeps; the answer is what was known of it."""
    device = options.device
    node = daemon.find(device)
    _check_root(node)
    given = structs.asdict(options)
    wanted = {name: None if given[name] is UNSET else given[name] for name in ("id", "name")}
    if wanted == {"id": None, "name": None}:
        raise UsageError("Name or id must be provided")
    if not node.driver.supports_snapshots:
        raise UnsupportedError("Failed to get a snapshot list: Operation not supported")
    async with daemon.graph.changes:
        found = snapshots.find(node, identifier=wanted["id"], name=wanted["name"])
        if found is None:
            shown = {name: "null" if value is None else value for name, value in wanted.items()}
            raise UsageError(
                f"Snapshot with id '{shown['id']}' and name '{shown['name']}' does not exist on "
                f"device '{device}'"
            )
        await snapshots.drop(node, found)
    return found
