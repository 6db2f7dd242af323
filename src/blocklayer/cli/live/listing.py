"""`blk live domblklist`, `domblkinfo`, `domblkstat`: what disks there are, and what they take."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from blocklayer.cli.live.disks import Disk, Disks
from blocklayer.cli.live.verb import DISK, Verb
from blocklayer.cli.options import CommandLineError, Option
from blocklayer.qmp.client import Client
from blocklayer.units import format_size

_STATS = (
    ("rd_req", "rd_operations", "number of read operations"),
    ("rd_bytes", "rd_bytes", "bytes read"),
    ("wr_req", "wr_operations", "number of write operations"),
    ("wr_bytes", "wr_bytes", "bytes written"),
    ("errs", "", "failed operations"),
    ("flush_operations", "flush_operations", "number of flush operations"),
    ("rd_total_times", "rd_total_time_ns", "total duration of reads (ns)"),
    ("wr_total_times", "wr_total_time_ns", "total duration of writes (ns)"),
    ("flush_total_times", "flush_total_time_ns", "total duration of flushes (ns)"),
)


class ListedLayer(msgspec.Struct, frozen=True):
    """One image of a listed disk."""

    node: str
    driver: str
    filename: str
    read_only: bool = msgspec.field(name="read-only")
    bitmaps: list[str] = []


class Listed(msgspec.Struct, frozen=True):
    """A disk as ``domblklist`` shows it; ``layers`` from the active one down."""

    disk: str
    kind: str
    """device, export, or node (when nothing else uses it)."""
    source: str
    size: int
    layers: list[ListedLayer]


class Info(msgspec.Struct, frozen=True):
    """Bytes: what the guest sees, what the active layer takes, and how large its file is."""

    disk: str
    capacity: int
    allocation: int
    physical: int


class DomBlkList(Verb):
    """List the disks, what uses them and what they consist of"""

    EXAMPLE = ("--details", "the whole chain of each disk as well")

    details: Annotated[bool, Option("show what each disk is, and all its layers")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        disks = list(await Disks.ask(client))
        listed = [_listed(disk) for disk in disks]
        rows: list[list[str]] = []
        for disk in listed:
            for depth, layer in enumerate(disk.layers if self.details else disk.layers[:1]):
                detail = [disk.kind if depth == 0 else "", layer.driver, layer.node]
                row = [disk.disk if depth == 0 else "", layer.filename]
                rows.append([*detail, *row] if self.details else row)
        head = ["Target", "Source"]
        self.tell(
            listed, *_table(["Type", "Driver", "Node", *head] if self.details else head, rows)
        )
        return 0


class DomBlkInfo(Verb):
    """Show how large a disk is, and how much room it takes"""

    OPERANDS = (("[DISK]", DISK[1] + " (or --all)"),)
    EXAMPLE = ("disk0 --human", "sizes with units")

    all: Annotated[bool, Option("show all disks, as a table")] = False
    human: Annotated[bool, Option("show sizes with units")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        if self.all == bool(operands):
            raise CommandLineError("Expecting either DISK or --all")
        disks = await Disks.ask(client)
        found = list(disks) if self.all else [disks.find(operands[0])]
        infos = [
            Info(disk.name, disk.active.size, disk.active.allocated, disk.active.physical)
            for disk in found
        ]
        shown = format_size if self.human else str
        if self.all:
            rows = [
                [info.disk, shown(info.capacity), shown(info.allocation), shown(info.physical)]
                for info in infos
            ]
            self.tell(infos, *_table(["Target", "Capacity", "Allocation", "Physical"], rows))
            return 0
        self.tell(
            infos[0],
            f"Capacity:       {shown(infos[0].capacity)}",
            f"Allocation:     {shown(infos[0].allocation)}",
            f"Physical:       {shown(infos[0].physical)}",
        )
        return 0


class DomBlkStat(Verb):
    """Show how much a disk was read and written"""

    OPERANDS = (("[DISK]", DISK[1] + " (default: all disks together)"),)
    EXAMPLE = ("disk0 --human", "with words for each number")

    human: Annotated[bool, Option("say what each number is")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        disks = await Disks.ask(client)
        found = [disks.find(operands[0])] if operands else list(disks)
        entries = await _stats(client)
        totals = {name: 0 for name, _, _ in _STATS}
        for disk in found:
            stats = entries.get(disk.name) or entries.get(disk.active.node) or {}
            for name, member, _ in _STATS:
                totals[name] += stats.get(member, 0) if member else _errors(stats)
        lines = []
        for name, _, meaning in _STATS:
            label = (
                f"{meaning + ':':<36}"
                if self.human
                else f"{operands[0] if operands else ''} {name}"
            )
            lines.append(f"{label} {totals[name]}".strip())
        self.tell(totals, *lines)
        return 0


def _listed(disk: Disk) -> Listed:
    return Listed(
        disk.name,
        disk.kind,
        disk.active.filename,
        disk.active.size,
        [
            ListedLayer(
                layer.node, layer.driver, layer.filename, layer.read_only,
                [bitmap["name"] for bitmap in layer.bitmaps if bitmap.get("name")],
            )
            for layer in disk.layers
        ],
    )  # fmt: skip


async def _stats(client: Client) -> dict[str, dict[str, Any]]:
    """Accounting by device (its name or its path) and by node."""
    found: dict[str, dict[str, Any]] = {}
    for arguments in ({"query-nodes": True}, {"query-nodes": False}):
        for entry in await client.execute("query-blockstats", arguments):
            for name in (entry.get("node-name"), entry.get("device"), entry.get("qdev")):
                if name:
                    found[name] = entry["stats"]
    return found


def _errors(stats: dict[str, Any]) -> int:
    return sum(stats.get(f"failed_{what}_operations", 0) for what in ("rd", "wr", "flush"))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as what they hold, under a rule."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        " "
        + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return [lines[0], "-" * (sum(widths) + 3 * len(widths) - 1), *lines[1:]]
