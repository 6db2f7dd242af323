"""Internal snapshots of whatever format has them: found by id or name, changed with nobody inside.

1. All requests to the image have ended before a change begins, and new ones wait until it is done:
   a snapshot holds what was acknowledged before, and nothing else.
2. These are no requests themselves: call them outside ``Root.request``.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from blocklayer.errors import LockedError, StorageError, UnsupportedError, UsageError
from blocklayer.graph.driver import FormatDriver, SnapshotInfo
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root, drained


def listed(node: Node) -> list[SnapshotInfo]:
    """All snapshots, in the order in which the image has them."""
    info = node.driver.info()
    return info.snapshots if info else []


def find(
    node: Node, *, identifier: str | None = None, name: str | None = None
) -> SnapshotInfo | None:
    """The first snapshot with this id, this name, or both."""
    if identifier is None and name is None:
        raise UsageError("a snapshot is named by its id, its name, or both")
    for snapshot in listed(node):
        if identifier in (None, snapshot.id) and name in (None, snapshot.name):
            return snapshot
    return None


def find_any(node: Node, text: str) -> SnapshotInfo | None:
    """The snapshot with the id ``text`` or, if there is none, with that name."""
    return find(node, identifier=text) or find(node, name=text)


def get(node: Node, text: str) -> SnapshotInfo:
    """Like ``find_any``; a StorageError (ENOENT) if there is none."""
    found = find_any(node, text)
    if found is None:
        raise StorageError(f"'{node.filename}' has no snapshot '{text}'", errno.ENOENT)
    return found


async def create(root: Root, name: str) -> SnapshotInfo:
    """Keep what the disk holds now as a snapshot called ``name``."""
    _check(root)
    return await take(root.node, name)


async def take(node: Node, name: str) -> SnapshotInfo:
    """``create``, for a caller who need not be a user of ``node``."""
    async with _changing(node) as driver:
        return await driver.snapshot_create(name)


async def apply(root: Root, snapshot: SnapshotInfo) -> None:
    """Let the disk hold, and be as large as, what it was at ``snapshot``."""
    if not root.taken & Permission.RESIZE:
        raise LockedError(f"{root.label} was not opened with the permission to resize")
    _check(root)
    await restore(root.node, snapshot)


async def restore(node: Node, snapshot: SnapshotInfo) -> None:
    """``apply``, for a caller who need not be a user of ``node``."""
    if node.dirty_bitmaps:
        # Nobody knows which parts differ from then to now.
        raise UnsupportedError("Device has active dirty bitmaps")
    try:
        async with _changing(node) as driver:
            await driver.snapshot_apply(snapshot.id)
    finally:
        node.resized()
        node.changed(0, node.size)


async def delete(root: Root, snapshot: SnapshotInfo) -> None:
    """Drop a snapshot."""
    _check(root)
    await drop(root.node, snapshot)


async def drop(node: Node, snapshot: SnapshotInfo) -> None:
    """``delete``, for a caller who need not be a user of ``node``."""
    async with _changing(node) as driver:
        await driver.snapshot_delete(snapshot.id)


async def load(node: Node, snapshot: SnapshotInfo) -> None:
    """Let the read-only ``node`` show a snapshot in place of the disk, until it is closed."""
    if not node.flags.read_only:
        raise UsageError("a snapshot is shown in place of the disk in read-only images only")
    async with drained(node.graph, node):
        await _driver(node).snapshot_load(snapshot.id)
    node.mapping_changed()


def _check(root: Root) -> None:
    root.node.check_writable()
    if not root.taken & Permission.WRITE:
        raise LockedError(f"{root.label} was not opened with the permission to write")


@asynccontextmanager
async def _changing(node: Node) -> AsyncIterator[FormatDriver]:
    node.check_writable()
    driver = _driver(node)
    async with drained(node.graph, node), node.claims.claim(0, max(1, node.size)):
        yield driver
    node.mapping_changed()


def _driver(node: Node) -> FormatDriver:
    driver = node.driver
    if not driver.supports_snapshots:
        raise UnsupportedError(f"Format '{driver.NAME}' does not support internal snapshots")
    assert isinstance(driver, FormatDriver)
    return driver
