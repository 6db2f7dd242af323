"""Internal snapshots of several disks, taken, gone back to or deleted together, as jobs.

1. All disks are looked at before any is changed. A snapshot of several disks is of one moment.
2. Taking and going back happen to all disks or to none: what was done is taken back when one of
   them fails. Deleting cannot be taken back; it stops at the first failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from blocklayer.errors import BlockError, UnsupportedError, UsageError
from blocklayer.graph import edit, snapshots
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.job import Job

_TAKEN: Final = int(Permission.WRITE | Permission.RESIZE)
_BEFORE: Final = "before-snapshot-load"
"""What the state is called that a failed ``snapshot-load`` returns to; deleted in the end."""


class _SnapshotJob(Job):
    is_block_job = False

    def __init__(self, nodes: Sequence[Node], tag: str, **job: Any) -> None:
        super().__init__(nodes[0].graph, **job)
        self.tag = tag
        self._nodes = list(dict.fromkeys(nodes))
        self._roots: list[Root] = []

    async def run(self) -> None:
        self.total = 1
        try:
            for node in self._nodes:
                if not node.driver.supports_snapshots:
                    raise UnsupportedError(f"Device '{node.name}' does not support snapshots")
                node.check_writable()
            async with edit.changing(self.graph, *self._nodes):
                for node in self._nodes:
                    self._roots.append(Root(node, f"job '{self.id}'", _TAKEN, follows=False))
                await self.act()
        finally:
            self.done = 1

    async def act(self) -> None:
        """Do it, with nobody inside any of the disks."""
        raise NotImplementedError

    async def clean(self) -> None:
        for root in self._roots:
            await root.close()

    def found(self) -> list[tuple[Root, SnapshotInfo]]:
        """The disks that have the snapshot."""
        pairs = [(root, snapshots.find(root.node, name=self.tag)) for root in self._roots]
        return [(root, snapshot) for root, snapshot in pairs if snapshot is not None]


class SnapshotSave(_SnapshotJob):
    """Take a snapshot of all disks."""

    TYPE = "snapshot-save"

    async def act(self) -> None:
        """Take it."""
        if self.found():
            raise UsageError(f"Snapshot '{self.tag}' already exists in one or more devices")
        await _on_all(self._roots, self.tag)


class SnapshotLoad(_SnapshotJob):
    """Go back to a snapshot of all disks."""

    TYPE = "snapshot-load"

    async def act(self) -> None:
        """Go back, by way of a snapshot of now."""
        found = self.found()
        if len(found) < len(self._roots):
            raise UsageError(f"Snapshot '{self.tag}' does not exist in one or more devices")
        if len(found) == 1:
            await snapshots.apply(*found[0])
            return
        before = await _on_all(self._roots, _BEFORE)
        changed: list[int] = []
        try:
            for index, (root, snapshot) in enumerate(found):
                changed.append(index)
                await snapshots.apply(root, snapshot)
        except BaseException:
            for index in changed:
                await snapshots.apply(self._roots[index], before[index])
            raise
        finally:
            for root, snapshot in zip(self._roots, before, strict=True):
                await snapshots.delete(root, snapshot)


class SnapshotDelete(_SnapshotJob):
    """Delete a snapshot from the disks that have it."""

    TYPE = "snapshot-delete"

    async def act(self) -> None:
        """Delete it."""
        for root, snapshot in self.found():
            await snapshots.delete(root, snapshot)


async def _on_all(roots: Sequence[Root], name: str) -> list[SnapshotInfo]:
    """A snapshot of each disk, or of none."""
    taken: list[SnapshotInfo] = []
    try:
        for root in roots:
            taken.append(await snapshots.create(root, name))
    except BaseException:
        for root, snapshot in zip(roots, taken, strict=False):
            try:
                await snapshots.delete(root, snapshot)
            except BlockError:
                # The failure that counts is the first; a snapshot too many harms nothing.
                continue
        raise
    return taken
