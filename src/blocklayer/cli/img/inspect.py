"""`blk img inspect`: what an image is, before anybody opens it.

1. Exit codes: 0 nothing against it, 1 it could not be inspected or is not in the format given, 2 at
   worst suspicious, 3 unsafe.
2. Text that the image chose is printed with everything escaped that a terminal would act upon.
"""

from __future__ import annotations

from typing import Annotated

from blocklayer.api import disk as aio
from blocklayer.api.inspection.report import SEVERITIES, Features, Inspection
from blocklayer.cli import console
from blocklayer.cli.common import Output, one_filename, size_argument
from blocklayer.cli.options import Command, Option
from blocklayer.units import format_size

EXIT_CODES = {"clean": 0, "suspicious": 2, "unsafe": 3}


class Inspect(Command):
    """Look at an image that nobody vouches for, opening nothing it names

    Exit codes: 0 nothing against it, 1 it could not be inspected or is not in the
    format given, 2 suspicious, 3 unsafe.
    """

    OPERANDS = (("FILENAME", "image file"),)
    EXAMPLE = ("disk.qcow2", "what disk.qcow2 is, what it names, and what may be wrong with it")

    format: Annotated[str | None, Option("format that the image must have", "f", "FMT")] = None
    max_size: Annotated[
        str | None, Option("the largest disk, as a guest sees it, that is not unsafe", value="SIZE")
    ] = None
    headers_only: Annotated[
        bool, Option("read the headers only, not what the disk itself begins with")
    ] = False
    output: Output = "human"

    @property
    def writes(self) -> bool:
        return False

    async def run(self) -> int:
        limit = None if self.max_size is None else size_argument(self.max_size, "largest size")
        report = await aio.inspect(
            one_filename(self.operands),
            self.format,
            max_size=limit,
            content=not self.headers_only,
        )
        if self.output == "json":
            import msgspec

            from blocklayer.cli.json_text import pretty

            console.say(pretty({**msgspec.to_builtins(report), "verdict": report.verdict}))
        else:
            console.write("".join(f"{line}\n" for line in _lines(report)))
        return EXIT_CODES[report.verdict]


def _lines(report: Inspection) -> list[str]:
    lines = [
        f"image: {_shown(report.filename)}",
        f"file format: {report.format}"
        + (f" ({_shown(report.variant)})" if report.variant else ""),
    ]
    sizes = {
        "virtual size": report.virtual_size,
        "file size": report.file_size,
        "disk size": report.actual_size,
        "cluster size": report.cluster_size,
    }
    lines += [f"{name}: {_size(size)}" for name, size in sizes.items() if size is not None]
    if report.encryption:
        lines.append(f"encryption: {report.encryption}")
    if report.content:
        lines.append(f"disk begins with: {', '.join(report.content)}")
    for file in report.references:
        kind = f" ({_shown(file.format)})" if file.format else ""
        lines.append(f"{file.role.replace('-', ' ')}: {_shown(file.name)}{kind}")
    return [*lines, *_feature_lines(report.features), *_finding_lines(report)]


def _feature_lines(features: Features | None) -> list[str]:
    if features is None:
        return []
    kinds = {
        "incompatible": features.incompatible,
        "compatible": features.compatible,
        "autoclear": features.autoclear,
    }
    return [
        f"{kind} features: {', '.join(map(_shown, names))}"
        for kind, names in kinds.items()
        if names
    ]


def _finding_lines(report: Inspection) -> list[str]:
    order = SEVERITIES[::-1]
    found = sorted(report.findings, key=lambda finding: order.index(finding.severity))
    lines = [f"verdict: {report.verdict}"]
    return lines + [f"  {f.severity:<10}  {f.id:<22}  {_shown(f.message)}" for f in found]


def _size(size: int) -> str:
    return f"{format_size(size)} ({size} bytes)"


def _shown(text: str) -> str:
    """``text`` with control characters and broken UTF-8 spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
