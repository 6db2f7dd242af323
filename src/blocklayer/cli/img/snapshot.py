"""`blk img snapshot`: internal snapshots listed, taken, gone back to, deleted.

1. A snapshot to go back to or to copy is looked for by id, then by name; one to delete, as with the
   original tool, by name only.
2. Copying a snapshot gives a disk of the size that it had then. (The original tool takes today's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from blocklayer.api.disk import Disk
from blocklayer.api.results import SnapshotChanged
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    Quiet,
    one_filename,
    open_disk,
    say_result,
)
from blocklayer.cli.img.info import snapshot_lines
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import BlockError, UnsupportedError, UsageError
from blocklayer.graph import snapshots
from blocklayer.graph.driver import SnapshotInfo
from blocklayer.graph.node import Node
from blocklayer.graph.options import parse_pairs

Names = list[str]
"""One for each use of an option; ``list`` is an option itself below."""

_PREFIX = "snapshot."


class Snapshot(Command):
    """List the internal snapshots of an image, or change them"""

    OPERANDS = (FILENAME,)
    EXAMPLE = ("-c monday disk.qcow2", "keeps what the disk holds now, by the name of monday")

    quiet: Quiet = False
    output: Output = "human"
    format: Format = None
    image_opts: ImageOpts = False
    force_share: ForceShare = False
    list: Annotated[bool, Option("list the snapshots (the default)", "l")] = False
    create: Annotated[
        Names, Option("keep what the disk holds now under this name", "c", "NAME")
    ] = msgspec.field(default_factory=Names)
    apply: Annotated[
        Names, Option("let the disk hold again what it held then", "a", "SNAPSHOT")
    ] = msgspec.field(default_factory=Names)
    delete: Annotated[Names, Option("delete the snapshot", "d", "NAME")] = msgspec.field(
        default_factory=Names
    )

    @property
    def writes(self) -> bool:
        return bool(self.create or self.apply or self.delete)

    async def run(self) -> int:
        if self.list + len(self.create) + len(self.apply) + len(self.delete) > 1:
            raise CommandLineError("Cannot mix '-l', '-a', '-c', '-d'")
        name = one_filename(self.operands)
        disk = await open_disk(
            name,
            format=self.format,
            image_opts=self.image_opts,
            writable=self.writes,
            force_share=self.force_share,
            quiet=self.quiet,
            metadata_only=not self.writes,
        )
        async with disk:
            if not self.writes:
                self._show(disk.snapshots())
                return 0
            if self.create:
                changed = SnapshotChanged(
                    filename=name, action="create", snapshot=await _create(disk, self.create[0])
                )
            elif self.apply:
                changed = SnapshotChanged(
                    filename=name, action="apply", snapshot=await _apply(disk, self.apply[0])
                )
            else:
                changed = SnapshotChanged(
                    filename=name, action="delete", snapshot=await _delete(disk, self.delete[0])
                )
        if self.output == "json":
            say_result(changed)
        return 0

    def _show(self, found: Sequence[SnapshotInfo]) -> None:
        if self.output == "json":
            say_result(found)
        elif found:
            console.write("".join(f"{line}\n" for line in snapshot_lines(found)))

    def left_behind(self) -> str:
        return f"'{self.operands[0]}' is valid, with its old or its new snapshots"


async def _create(disk: Disk, name: str) -> SnapshotInfo:
    what = f"Could not create snapshot '{name}'"
    if not disk.root.node.driver.supports_snapshots:
        raise UnsupportedError(f"{what}: Operation not supported")
    try:
        return await snapshots.create(disk.root, name)
    except BlockError as error:
        raise error.reworded(f"{what}: {error}") from error


async def _apply(disk: Disk, name: str) -> SnapshotInfo:
    what = f"Could not apply snapshot '{name}'"
    if not disk.root.node.driver.supports_snapshots:
        raise UnsupportedError(f"{what}: Block driver does not support snapshots")
    found = snapshots.find_any(disk.root.node, name)
    if found is None:
        raise UsageError(f"{what}: Failed to load snapshot: No such file or directory")
    try:
        await snapshots.apply(disk.root, found)
    except BlockError as error:
        raise error.reworded(f"{what}: {error}") from error
    return found


async def _delete(disk: Disk, name: str) -> SnapshotInfo:
    what = f"Could not delete snapshot '{name}'"
    found = snapshots.find(disk.root.node, name=name)
    if found is None:
        raise UsageError(f"{what}: snapshot not found")
    try:
        await snapshots.delete(disk.root, found)
    except BlockError as error:
        raise error.reworded(f"{what}: {error}") from error
    return found


async def load_snapshot(sources: Sequence[Node], text: str) -> None:
    """Let the one source show the snapshot that ``text``, an option's value, stands for."""
    members = _members(text)
    if len(sources) > 1:
        raise UsageError("No support for concatenating multiple snapshot")
    node = sources[0]
    if not node.driver.supports_snapshots:
        raise UnsupportedError(
            f"Failed to load snapshot: Block format '{node.driver.NAME}' used by device '' does "
            "not support temporarily loading internal snapshots"
        )
    if members is None:
        found = snapshots.find_any(node, text)
    else:
        found = snapshots.find(node, identifier=members.get("id"), name=members.get("name"))
    if found is None:
        raise UsageError("Failed to load snapshot: Can't find snapshot")
    try:
        await snapshots.load(node, found)
    except BlockError as error:
        raise error.reworded(f"Failed to load snapshot: {error}") from error


def _members(text: str) -> dict[str, str] | None:
    """``snapshot.id=…`` and ``snapshot.name=…``; None if ``text`` is an id or a name itself."""
    if not text.startswith(_PREFIX):
        return None
    try:
        members = {key.removeprefix(_PREFIX): value for key, value in parse_pairs(text).items()}
        for key in members:
            if key not in ("id", "name"):
                raise UsageError(f"Invalid parameter '{_PREFIX}{key}'")
    except UsageError as error:
        raise UsageError(f"Failed in parsing snapshot param '{text}': {error}") from None
    return members
