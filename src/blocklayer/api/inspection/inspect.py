"""Inspecting an image: which format it is, what it names, what is wrong with it.

1. No file but the image itself is opened, and of it a bounded part is read.
2. Whatever the file holds, the answer is a report or an error of ours; never an endless wait.
3. A format that is given must be the file's. A disk without any image signature is raw, and only
   raw; an image is never raw, except one that only its end tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from blocklayer.api.inspection import foreign, known
from blocklayer.api.inspection.qcow2 import inspect_qcow2
from blocklayer.api.inspection.reader import Reader
from blocklayer.api.inspection.report import UNSAFE_SIZE, Inspection
from blocklayer.codec.signatures import HEAD_SIZE, TAIL_SIZE, find_content, find_formats
from blocklayer.errors import BlockError, FormatError, PolicyError, UnsupportedError
from blocklayer.graph.waiting import offload
from blocklayer.units import format_size

_Inspector = Callable[[Inspection, Reader], None]

_INSPECTORS: Final[dict[str, _Inspector]] = {
    "qcow2": inspect_qcow2,
    "vmdk": foreign.inspect_vmdk,
    "vhdx": foreign.inspect_vhdx,
    "vpc": foreign.inspect_vpc,
    "vdi": foreign.inspect_vdi,
    "qcow": known.inspect_qcow,
    "qed": known.inspect_qed,
    "parallels": known.inspect_parallels,
    "dmg": known.inspect_dmg,
    "luks": known.inspect_luks,
    "bochs": known.inspect_bochs,
    "cloop": known.inspect_cloop,
}
_RARE: Final = ("qcow", "qed", "parallels", "dmg", "bochs", "cloop")
_READABLE: Final = ("qcow2", "vmdk", "vhdx", "vpc", "vdi", *_RARE)


async def inspect(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    max_size: int | None = None,
    content: bool = True,
) -> Inspection:
    """Look at the image in the file ``path`` without trusting it.

    ``format`` must be the file's own if it is given. ``max_size`` is the largest disk, in bytes,
    that is not ``too-large``. ``content`` False leaves the start of the disk itself unread. Raises
    FormatError if the format is another one, StorageError or UsageError if there is no such file.
    """
    name = os.fspath(path)
    report = await offload(_inspect_headers, name, format, max_size)
    if content and report.format in _READABLE and not report.has("invalid-header"):
        await _inspect_content(report)
    return report


def _inspect_headers(path: str, format: str | None, max_size: int | None) -> Inspection:
    with Reader(path) as reader:
        head = reader.read(0, HEAD_SIZE)
        tail = reader.read(reader.size - TAIL_SIZE, TAIL_SIZE)
        formats, at_start = find_formats(head, tail), find_formats(head, b"")
        content = find_content(head)
        if format is not None and format not in formats and (format != "raw" or at_start):
            found = " and ".join(formats) or "raw"
            raise FormatError(f"'{path}' is not in {format} format: it is {found}")
        report = Inspection(
            filename=path,
            format=formats[0] if formats else "raw",
            formats=formats or ["raw"],
            file_size=reader.size,
            actual_size=reader.actual_size,
        )
        if format == "raw":
            report.format = "raw"
        # A disk may be partitioned and a volume as well; nothing else may be two things at once.
        several = [*formats, *content] if at_start else formats
        if len(several) > 1:
            report.add("several-formats", f"The file could be {' and '.join(several)}.")
        if formats and not at_start:
            report.add("end-only", f"Only the end of the file tells its format ({formats[0]}).")
        if report.format == "raw":
            report.virtual_size = reader.size
            report.content = content
        else:
            _inspect_format(report, reader)
    _judge_size(report, max_size)
    return report


def _inspect_format(report: Inspection, reader: Reader) -> None:
    if report.format in _RARE:
        report.add("rare-format", f"Images in {report.format} format are seldom met.")
    try:
        _INSPECTORS[report.format](report, reader)
    except UnsupportedError as error:
        report.add("unsupported", f"{error}.")
    except FormatError as error:
        report.add("invalid-header", f"{error}.")


def _judge_size(report: Inspection, max_size: int | None) -> None:
    size = report.virtual_size or 0
    if size > UNSAFE_SIZE:
        report.add("absurd-size", f"The disk has {format_size(size)}.")
    if max_size is not None and size > max_size:
        report.add("too-large", f"The disk has {size} bytes, more than the {max_size} allowed.")


async def _inspect_content(report: Inspection) -> None:
    from blocklayer.api.inspection.content import read_head

    if report.encryption is not None:
        # Nobody gave us the key; that it is encrypted was found before.
        return
    try:
        head = await read_head(report.filename, report.format)
    except PolicyError as error:
        if not report.references:
            report.add("expensive", f"{error}.")
        return
    except UnsupportedError:
        # A finished stream, a variant: that was found before.
        return
    except BlockError as error:
        report.add("unreadable", f"{error}.")
        return
    formats = find_formats(head, b"")
    report.content = [*formats, *find_content(head)]
    if formats:
        report.add("nested-format", f"The disk begins like an image in {formats[0]} format.")
