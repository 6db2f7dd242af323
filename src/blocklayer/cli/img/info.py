"""`blk img info`: what is known of an image, and with --backing-chain of each one below it.

1. Backing files are not opened unless the chain is asked for: an overlay whose backing file is
   missing still has its information.
2. With the chain, each image is opened by itself, so that the error of one names that one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from blocklayer.api.disk import Disk
from blocklayer.api.info import ImageInfo, image_info
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    Cache,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    check_cache,
    one_filename,
    open_disk,
    say_result,
)
from blocklayer.cli.options import Command, Option
from blocklayer.errors import FormatError, UsageError
from blocklayer.graph.driver import ProtocolDriver, SnapshotInfo
from blocklayer.graph.filename import scheme_of, storage_of
from blocklayer.units import format_size


class Info(Command):
    """Say what an image is: its format, its sizes, its backing file, its snapshots"""

    OPERANDS = (FILENAME,)
    EXAMPLE = ("--output=json disk.qcow2", "everything known of disk.qcow2, for programs")

    format: Format = None
    image_opts: ImageOpts = False
    backing_chain: Annotated[
        bool, Option("go on with the backing file, its backing file, and so on", "b")
    ] = False
    limits: Annotated[
        bool, Option("also tell what requests the image and its storage take well")
    ] = False
    cache: Cache = "writeback"
    force_share: ForceShare = False
    output: Output = "human"

    @property
    def writes(self) -> bool:
        return False

    async def run(self) -> int:
        check_cache(self.cache)
        found = await self._collect(one_filename(self.operands))
        if self.output == "json":
            say_result(found if self.backing_chain else found[0])
        else:
            console.write("\n".join("".join(_lines(info)) for info in found))
        return 0

    async def _collect(self, name: str) -> list[ImageInfo]:
        """The information of the image ``name`` and, if wanted, of those below it."""
        found: list[ImageInfo] = []
        seen: set[object] = set()
        image, format, image_opts = name, self.format, self.image_opts
        above: str | None = None
        while True:
            disk = await open_disk(
                image,
                format=format,
                image_opts=image_opts,
                force_share=self.force_share,
                cache=self.cache,
                backing=False,
                named_by=above,
                metadata_only=True,
            )
            try:
                info = image_info(disk.root.node, limits=self.limits)
                identity = _identity(disk)
                if identity is not None and identity in seen:
                    raise FormatError(f"Backing file '{image}' creates an infinite loop.")
                seen.add(identity)
                found.append(info)
                if not self.backing_chain or info.backing_filename is None:
                    return found
                if info.full_backing_filename is None:
                    raise UsageError(f"Cannot tell where the backing file of '{image}' is")
                below = info.full_backing_filename
                policy = disk.graph.policy
                local = not below.startswith("json:") and scheme_of(below) in (None, "file")
                policy.check(image, "backing file", below.removeprefix("file:"), local=local)
                policy.check_depth(name, len(found) + 1)
            finally:
                await disk.close()
            above, image = image, below
            format, image_opts = info.backing_filename_format, False


def _identity(disk: Disk) -> object | None:
    driver = storage_of(disk.root.node).driver
    return driver.identity() if isinstance(driver, ProtocolDriver) else None


def _lines(info: ImageInfo) -> list[str]:
    return _node_lines(info, "", "", is_child=False)


def _node_lines(info: ImageInfo, path: str, indent: str, *, is_child: bool) -> list[str]:
    """The lines about one node and its children; ``path`` names it from the top ("/file")."""
    protocol = is_child and not info.children
    size = f"{format_size(info.virtual_size)} ({info.virtual_size} bytes)"
    used = "unavailable" if info.actual_size is None else format_size(info.actual_size)
    lines = [
        f"{'filename' if protocol else 'image'}: {info.filename}",
        f"{'protocol type' if protocol else 'file format'}: {info.format}",
        f"{'file length' if protocol else 'virtual size'}: {size}",
        f"disk size: {used}",
    ]
    if info.encrypted:
        lines.append("encrypted: yes")
    if info.cluster_size:
        lines.append(f"cluster_size: {info.cluster_size}")
    if info.dirty_flag:
        lines.append("cleanly shut down: no")
    lines += _backing_lines(info)
    if info.snapshots:
        lines += snapshot_lines(info.snapshots)
    if info.limits is not None:
        lines += ["Block limits:", *tree(msgspec.to_builtins(info.limits), 1)]
    if info.format_specific is not None:
        specific = tree(msgspec.to_builtins(info.format_specific.data), 1)
        lines += ["Format specific information:", *specific] if specific else []
    lines = [f"{indent}{line}\n" for line in lines]
    for child in info.children:
        name = f"{path}/{child.name}"
        lines.append(f"{indent}Child node '{name}':\n")
        lines += _node_lines(child.info, name, indent + "    ", is_child=True)
    return lines


def _backing_lines(info: ImageInfo) -> list[str]:
    if info.backing_filename is None:
        return []
    line = f"backing file: {info.backing_filename}"
    if info.full_backing_filename is None:
        line += " (cannot determine actual path)"
    elif info.full_backing_filename != info.backing_filename:
        line += f" (actual path: {info.full_backing_filename})"
    if info.backing_filename_format is None:
        return [line]
    return [line, f"backing file format: {info.backing_filename_format}"]


def tree(value: Any, level: int) -> list[str]:
    """Nested members as indented ``name: value`` lines."""
    if isinstance(value, dict):
        members = [(name.replace("-", " "), item) for name, item in value.items()]
    else:
        members = [(f"[{index}]", item) for index, item in enumerate(value)]
    lines: list[str] = []
    for name, item in members:
        head = f"{'    ' * level}{name}:"
        if isinstance(item, (dict, list)):
            lines += [head, *tree(item, level + 1)]
        else:
            shown = str(item).lower() if isinstance(item, bool) else str(item)
            lines.append(f"{head} {shown}")
    return lines


_SNAPSHOT_HEAD = (
    f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}"
)


def snapshot_lines(snapshots: Sequence[SnapshotInfo]) -> list[str]:
    """The table of internal snapshots."""
    return ["Snapshot list:", _SNAPSHOT_HEAD, *map(_snapshot_line, snapshots)]


def _snapshot_line(snapshot: SnapshotInfo) -> str:
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_sec))
    minutes, seconds = divmod(snapshot.vm_clock_sec, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours:04}:{minutes:02}:{seconds:02}.{snapshot.vm_clock_nsec // 1_000_000:03}"
    icount = "" if snapshot.icount is None else str(snapshot.icount)
    return (
        f"{snapshot.id:<7} {snapshot.name:<16} {format_size(snapshot.vm_state_size):>8} "
        f"{date:>19} {clock:>15} {icount:>10}"
    )
