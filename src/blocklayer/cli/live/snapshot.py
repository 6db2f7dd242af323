"""`blk live snapshot-create-as`: the state of disks in use kept, all at one instant.

1. All or none: overlays are made and opened before the one transaction that puts them in use; when
   it fails they are closed and deleted again.
2. Bitmaps that record go on recording in the overlay under their names, before its first write, so
   that incremental backups see no gap.
"""

from __future__ import annotations

import os
import re
import time
from typing import Annotated, Any

import msgspec

from blocklayer.cli.live.disks import Disk, Disks
from blocklayer.cli.live.images import Images, file_options
from blocklayer.cli.live.verb import Verb, absolute, pairs
from blocklayer.cli.options import Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client

_SPEC = frozenset(("snapshot", "file", "driver", "stype"))
_INTERNAL = ("qcow2",)


class SnapshotDisk(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one disk."""

    disk: str
    snapshot: str
    """external or internal."""
    active: str
    """The node of the active layer now."""
    file: str | None = None
    """The overlay, of an external snapshot."""


class SnapshotCreated(msgspec.Struct, frozen=True):
    """What ``snapshot-create-as`` made."""

    name: str
    disks: list[SnapshotDisk]


class SnapshotCreateAs(Verb):
    """Keep the state of disks while they are used, all at one instant

    An external snapshot puts an overlay on top of each disk; what was there stays as it is, in the
    file that it was in. An internal one is kept within the image. Without --diskspec all disks
    take part. The daemon has no guest memory: snapshots are of disks only.
    """

    OPERANDS = (
        ("[NAME]", "name of the snapshot (default: the time, in seconds)"),
        ("[DESCRIPTION]", "taken as other tools do, and not kept"),
    )
    EXAMPLE = (
        "monday --disk-only --atomic --diskspec vda,file=/x/vda.monday --diskspec vdb",
        "overlays on vda and vdb, or on neither",
    )

    disk_only: Annotated[bool, Option("of disks only (which is all there is)")] = False
    atomic: Annotated[bool, Option("all disks or none (always so)")] = False
    reuse_external: Annotated[bool, Option("the files exist; use them as they are")] = False
    diskspec: Annotated[
        list[str],
        Option(
            "a disk that takes part, and how: snapshot=external (the default), internal or no; "
            "file=PATH of the overlay; driver=FORMAT of it (default qcow2) (repeatable)",
            value="DISK[,…]",
        ),
    ] = msgspec.field(default_factory=list)
    quiesce: Annotated[bool, Option("refused: there is no guest agent to ask")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        if self.quiesce:
            raise UsageError("--quiesce needs a guest agent, which a storage daemon has not")
        name = operands[0] if operands else str(int(time.time()))
        if not name or "/" in name:
            raise UsageError(f"Invalid snapshot name '{name}': empty, or with a '/'")
        chosen = self._chosen(await Disks.ask(client))
        images, actions, made = Images(client), [], []
        try:
            for disk, spec in chosen:
                done, parts = await self._prepare(images, name, disk, spec)
                actions += parts
                made.append(done)
            await client.execute("transaction", {"actions": actions})
        except BaseException:
            await images.undo()
            raise
        lines = [
            f"'{done.disk}' continues in '{done.file}' (node '{done.active}')"
            for done in made
            if done.file
        ]
        self.tell(SnapshotCreated(name, made), f"Snapshot {name} created", *lines)
        return 0

    def _chosen(self, disks: Disks) -> list[tuple[Disk, dict[str, str]]]:
        """The disks that take part, with what is asked of each. Raises UsageError."""
        specs = [pairs(text, _SPEC, "diskspec") for text in self.diskspec]
        if not specs:
            specs = [(disk.name, {}) for disk in disks if not disk.active.read_only]
        chosen: list[tuple[Disk, dict[str, str]]] = []
        for name, spec in specs:
            disk, kind = disks.find(name), spec.get("snapshot", "external")
            if kind not in ("external", "internal", "no"):
                raise UsageError(
                    f"--diskspec {name}: snapshot={kind} is none of external, internal, no"
                )
            if any(disk.active.node == other.active.node for other, _ in chosen):
                raise UsageError(f"--diskspec {name}: this disk was named before")
            if spec.get("stype", "file") != "file":
                raise UsageError(f"--diskspec {name}: overlays are files (stype=file)")
            if kind != "no":
                chosen.append((disk, spec))
        if not chosen:
            raise UsageError("No disk takes part in the snapshot")
        return chosen

    async def _prepare(
        self, images: Images, name: str, disk: Disk, spec: dict[str, str]
    ) -> tuple[SnapshotDisk, list[dict[str, Any]]]:
        """Make the overlay of one disk; what the transaction must do for it."""
        active = disk.active
        if spec.get("snapshot") == "internal":
            if active.driver not in _INTERNAL:
                raise UsageError(f"'{disk.name}' is {active.driver}: internal snapshots need qcow2")
            data = {"device": active.node, "name": name}
            action = {"type": "blockdev-snapshot-internal-sync", "data": data}
            return SnapshotDisk(disk.name, "internal", active.node), [action]
        driver = spec.get("driver", "qcow2")
        path = absolute(spec["file"]) if "file" in spec else _overlay_name(active.filename, name)
        if not self.reuse_external:
            await images.create(path, driver, active.size, backing=active)
        options = {"driver": driver, "file": file_options(path), "backing": None}
        node = await images.add(f"{disk.name}-{name}", options)
        actions = [{"type": "blockdev-snapshot", "data": {"node": active.node, "overlay": node}}]
        for bitmap in active.bitmaps:
            if bitmap.get("name") and bitmap["recording"] and not bitmap.get("inconsistent"):
                added = {
                    "node": node, "name": bitmap["name"], "granularity": bitmap["granularity"],
                    "persistent": bitmap["persistent"] and driver == "qcow2",
                }  # fmt: skip
                actions.append({"type": "block-dirty-bitmap-add", "data": added})
        return SnapshotDisk(disk.name, "external", node, path), actions


def _overlay_name(filename: str, name: str) -> str:
    """Beside the image, with the snapshot's name for a suffix."""
    if not filename.startswith("/"):
        raise UsageError(f"'{filename}' is no absolute path: say file=PATH in --diskspec")
    folder, own = os.path.split(filename)
    return os.path.join(folder, f"{re.sub(r'[.][^.]*$', '', own)}.{name}")
