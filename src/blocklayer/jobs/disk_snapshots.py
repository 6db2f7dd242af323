"""Internal snapshots of several disks, taken, gone back to or deleted together, as jobs.

1. All disks are looked at before any is changed. A snapshot of several disks is of one moment.
2. Taking and going back happen to all disks or to none: what was done is taken back when one of
   them fails, or when the job is cancelled. Deleting cannot be taken back; it stops at the first
   failure.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final

from blocklayer.errors import BlockError, CancelledError, UnsupportedError, UsageError
from blocklayer.graph import edit, snapshots
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.job import Job, to_its_end

_BEFORE: Final = "before-snapshot-load"
"""The name of the state that a failed ``snapshot-load`` returns to; it is deleted in the end."""


class DiskSnapshots(Job):
    """What the three have in common: the disks, and the snapshot's name."""

    is_block_job = False

    def __init__(self, nodes: Sequence[Node], tag: str, **job: Any) -> None:
        super().__init__(nodes[0].graph, **job)
        self.tag = tag
        self.nodes = list(dict.fromkeys(nodes))
        label = f"job '{self.id}'"
        # Holds the nodes, and takes nothing: all happens with nobody inside.
        self._roots = [Root(node, label, Permission.NONE, follows=False) for node in self.nodes]

    async def run(self) -> None:
        """Do it, with nobody inside any of the disks."""
        self.total = 1
        try:
            async with edit.changing(self.graph, *self.nodes):
                for node in self.nodes:
                    if not node.driver.supports_snapshots:
                        raise UnsupportedError(f"Device '{node.name}' does not support snapshots")
                    node.check_writable()
                await to_its_end(self.act())
        finally:
            self.done = 1

    @abstractmethod
    async def act(self) -> None:
        """The job's own part; nobody is inside."""

    def check_cancelled(self) -> None:
        """Raise CancelledError if the job was given up meanwhile."""
        if self.cancelled:
            raise CancelledError("Operation canceled")

    async def clean(self) -> None:
        """Let go of the disks."""
        for root in self._roots:
            await root.close()

    def found(self) -> list[tuple[Node, SnapshotInfo]]:
        """The disks that have the snapshot."""
        pairs = [(node, snapshots.find(node, name=self.tag)) for node in self.nodes]
        return [(node, snapshot) for node, snapshot in pairs if snapshot is not None]


class SnapshotSave(DiskSnapshots):
    """Take a snapshot of all disks."""

    TYPE = "snapshot-save"

    async def act(self) -> None:
        """Take it."""
        if self.found():
            raise UsageError(f"Snapshot '{self.tag}' already exists in one or more devices")
        taken = await _on_all(self.nodes, self.tag)
        try:
            self.check_cancelled()
        except BlockError:
            await _drop(list(zip(self.nodes, taken, strict=True)))
            raise


class SnapshotLoad(DiskSnapshots):
    """Go back to a snapshot of all disks."""

    TYPE = "snapshot-load"

    async def act(self) -> None:
        """Go back, by way of a snapshot of now."""
        found = self.found()
        if len(found) < len(self.nodes):
            raise UsageError(f"Snapshot '{self.tag}' does not exist in one or more devices")
        before = list(zip(self.nodes, await _on_all(self.nodes, _BEFORE), strict=True))
        try:
            for node, snapshot in found:
                await snapshots.restore(node, snapshot)
            self.check_cancelled()
        except BlockError as error:
            try:
                for node, previous in before:
                    await snapshots.restore(node, previous)
            except BlockError as second:
                raise error.reworded(
                    f"{error} (and '{node.name}' could not go back to its snapshot "
                    f"'{_BEFORE}': {second})"
                ) from second
            await _drop(before)
            raise
        await _drop(before)


class SnapshotDelete(DiskSnapshots):
    """Delete a snapshot from the disks that have it."""

    TYPE = "snapshot-delete"

    async def act(self) -> None:
        """Delete it."""
        for node, snapshot in self.found():
            await snapshots.drop(node, snapshot)


async def _on_all(nodes: Sequence[Node], name: str) -> list[SnapshotInfo]:
    """A snapshot of each disk, or of none."""
    taken: list[tuple[Node, SnapshotInfo]] = []
    for node in nodes:
        try:
            taken.append((node, await snapshots.take(node, name)))
        except BlockError as error:
            try:
                await _drop(taken)
            except BlockError as second:
                raise error.reworded(f"{error} (and taking it back: {second})") from second
            raise
    return [snapshot for _, snapshot in taken]


async def _drop(taken: Sequence[tuple[Node, SnapshotInfo]]) -> None:
    for node, snapshot in taken:
        await snapshots.drop(node, snapshot)
