"""`blk img check`: whether an image's metadata is sound, and mending it.

1. Exit codes: 0 sound (now), 1 could not be checked, 2 corruptions, 3 leaked clusters only, 63 the
   format has no checks.
2. What is wrong is told on standard error, line by line; standard output has the summary.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from blocklayer.api.check import ImageCheck, check_image
from blocklayer.cli import console
from blocklayer.cli.common import (
    FILENAME,
    ForceShare,
    Format,
    ImageOpts,
    Output,
    Quiet,
    ReadCache,
    check_cache,
    one_filename,
    open_disk,
    say_result,
)
from blocklayer.cli.options import Command, Option
from blocklayer.errors import UnsupportedError

EXIT_FAILED: Final = 1
EXIT_CORRUPT: Final = 2
EXIT_LEAKS: Final = 3
EXIT_UNSUPPORTED: Final = 63


class Check(Command):
    """Check whether an image's metadata is sound, and mend it"""

    OPERANDS = (FILENAME,)
    EXIT_CODES = (
        (0, "the image is sound, or is now"),
        (EXIT_FAILED, "it could not be checked"),
        (EXIT_CORRUPT, "corruptions were found (and are left)"),
        (EXIT_LEAKS, "clusters are leaked: they waste space, and harm nothing"),
        (EXIT_UNSUPPORTED, "its format has no checks"),
    )
    EXAMPLE = ("-r leaks disk.qcow2", "gives leaked clusters back")

    quiet: Quiet = False
    format: Format = None
    image_opts: ImageOpts = False
    cache: ReadCache = "writeback"
    force_share: ForceShare = False
    output: Output = "human"
    repair: Annotated[
        str | None,
        Option(
            "mend leaked clusters only, or all damage (excludes --force-share)",
            "r",
            "leaks|all",
            ("leaks", "all"),
        ),
    ] = None

    @property
    def writes(self) -> bool:
        return self.repair is not None

    async def run(self) -> int:
        name = one_filename(self.operands)
        disk = await open_disk(
            name,
            format=self.format,
            image_opts=self.image_opts,
            writable=self.writes,
            force_share=self.force_share,
            cache=check_cache(self.cache, "source cache"),
            quiet=self.quiet,
            repair=True,
            metadata_only=True,
        )
        try:
            found = await check_image(
                disk.root.node, repair=self.repair, report=_report, repaired=self._say_repaired
            )
        except UnsupportedError:
            console.error("This image format does not support checks")
            return EXIT_UNSUPPORTED
        finally:
            await disk.close()
        if self.output == "json":
            say_result(msgspec.structs.replace(found, filename=name))
        elif not self.quiet:
            console.write(_summary(found))
        return _exit_code(found)

    def _say_repaired(self, leaks: int, corruptions: int) -> None:
        if self.output == "human" and not self.quiet:
            console.write(
                "The following inconsistencies were found and repaired:\n\n"
                f"    {leaks} leaked clusters\n"
                f"    {corruptions} corruptions\n\n"
                "Double checking the fixed image now...\n"
            )

    def left_behind(self) -> str:
        return f"the repair of '{self.operands[0]}' is incomplete, run it again"


def _report(messages: list[str]) -> None:
    if messages:
        console.complain("\n".join(messages))


def _summary(found: ImageCheck) -> str:
    lines = []
    if found.corruptions:
        lines += [
            f"\n{found.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if found.leaks:
        lines += [
            f"\n{found.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if found.check_errors:
        lines.append(f"\n{found.check_errors} internal errors have occurred during the check.")
    if not lines:
        lines.append("No errors were found on the image.")
    total, allocated = found.total_clusters, found.allocated_clusters
    if total and allocated:
        lines.append(
            f"{allocated}/{total} = {allocated * 100 / total:0.2f}% allocated, "
            f"{found.fragmented_clusters * 100 / allocated:0.2f}% fragmented, "
            f"{found.compressed_clusters * 100 / allocated:0.2f}% compressed clusters"
        )
    if found.image_end_offset:
        lines.append(f"Image end offset: {found.image_end_offset}")
    return "\n".join(lines) + "\n"


def _exit_code(found: ImageCheck) -> int:
    if found.check_errors:
        return EXIT_FAILED
    if found.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if found.leaks else 0
