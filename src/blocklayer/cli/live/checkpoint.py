"""`blk live checkpoint-*`: from when on a disk's changes are recorded, for incremental backups.

1. A checkpoint is a bitmap of its name on each disk that takes part; all begin at one instant.
2. It is deleted from every layer that has it, or (if one of them is in use) from none.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec

from blocklayer.cli import console
from blocklayer.cli.common import say_result
from blocklayer.cli.live.disks import Disk, Disks, Layer
from blocklayer.cli.live.verb import Verb, pairs
from blocklayer.cli.options import Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client

_SPEC = frozenset(("checkpoint", "bitmap"))


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint, and the disks whose changes it records."""

    name: str
    disks: list[str]


class CheckpointCreateAs(Verb):
    """Record from now on what changes on disks, for incremental backups

    Without --diskspec all disks take part. In qcow2 images the record is kept when the daemon ends.
    """

    OPERANDS = (
        ("[NAME]", "name of the checkpoint (default: the time, in seconds)"),
        ("[DESCRIPTION]", "taken as other tools do, and not kept"),
    )
    EXAMPLE = ("monday --diskspec vda", "what changes on vda is recorded under this name")

    diskspec: Annotated[
        list[str],
        Option(
            "a disk that takes part: checkpoint=bitmap (the default) or no; bitmap=NAME, if it is "
            "not the checkpoint's (repeatable)",
            value="DISK[,…]",
        ),
    ] = msgspec.field(default_factory=list)

    async def act(self, client: Client, operands: list[str]) -> int:
        name = operands[0] if operands else str(int(time.time()))
        disks = await Disks.ask(client)
        specs = [pairs(text, _SPEC, "diskspec") for text in self.diskspec]
        if not specs:
            specs = [(disk.name, {}) for disk in disks if not disk.active.read_only]
        actions, taking = [], []
        for disk_name, spec in specs:
            disk, kind = disks.find(disk_name), spec.get("checkpoint", "bitmap")
            if kind not in ("bitmap", "no"):
                raise UsageError(f"--diskspec {disk_name}: checkpoint={kind} is none of bitmap, no")
            if kind == "bitmap":
                actions.append(added(disk.active, spec.get("bitmap", name)))
                taking.append(disk.name)
        if not actions:
            raise UsageError("No disk takes part in the checkpoint")
        await client.execute("transaction", {"actions": actions})
        self.tell(Checkpoint(name, taking), f"Checkpoint {name} created")
        return 0


class CheckpointList(Verb):
    """List the checkpoints, and the disks whose changes they record"""

    OPERANDS = (("[DISK]", "of this disk only"),)

    name: Annotated[bool, Option("print names only")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        disks = await Disks.ask(client)
        found: dict[str, list[str]] = {}
        for disk in [disks.find(operands[0])] if operands else list(disks):
            for bitmap in disk.active.bitmaps:
                if bitmap.get("name") and bitmap["recording"]:
                    found.setdefault(bitmap["name"], []).append(disk.name)
        checkpoints = [Checkpoint(name, on) for name, on in found.items()]
        if self.output == "json":
            say_result(checkpoints)
            return 0
        for checkpoint in checkpoints:
            on = "" if self.name else f"   {', '.join(checkpoint.disks)}"
            console.say(f" {checkpoint.name}{on}")
        return 0


class CheckpointDelete(Verb):
    """Stop recording under a checkpoint's name, and forget what was recorded"""

    OPERANDS = (("NAME", "the checkpoint"),)

    async def act(self, client: Client, operands: list[str]) -> int:
        name = operands[0]
        actions, taking = [], []
        for disk in await Disks.ask(client):
            layers = layers_with(disk, name)
            below = [layer for layer in layers if layer.read_only]
            if below:
                raise UsageError(
                    f"'{disk.name}' has '{name}' also in '{below[0].node}', read-only now; "
                    "commit or pull the layers into one first"
                )
            taking += [disk.name] if layers else []
            actions += [
                {"type": "block-dirty-bitmap-remove", "data": {"node": layer.node, "name": name}}
                for layer in layers
            ]
        if not actions:
            raise UsageError(f"There is no checkpoint '{name}'")
        await client.execute("transaction", {"actions": actions})
        self.tell(Checkpoint(name, taking), f"Checkpoint {name} deleted")
        return 0


def added(layer: Layer, name: str, **more: Any) -> dict[str, Any]:
    """The action that begins a bitmap, kept in the image where its format can."""
    data = {"node": layer.node, "name": name, "persistent": layer.driver == "qcow2", **more}
    return {"type": "block-dirty-bitmap-add", "data": data}


def layers_with(disk: Disk, name: str) -> list[Layer]:
    """The layers from the active one down that have a bitmap of that name, without a gap."""
    found: list[Layer] = []
    for layer in disk.layers:
        bitmap = next((b for b in layer.bitmaps if b.get("name") == name), None)
        if bitmap is None:
            break
        if bitmap.get("inconsistent"):
            raise UsageError(
                f"bitmap '{name}' in '{layer.filename}' was not stored when its user ended; "
                "what it says is lost, it can only be deleted"
            )
        found.append(layer)
    return found
