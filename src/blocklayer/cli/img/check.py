"""`blk img check`: whether an image's metadata is sound, and mending it.

1. Exit codes: 0 sound (now), 1 could not be checked, 2 corruptions, 3 leaked clusters only, 63 the
   format has no checks.
2. --dry-run exits with 2 or 3 by what would be mended, or left as it is. --backup is complete
   before a repair begins.
3. What is wrong is told on standard error, line by line; standard output has the summary.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from blocklayer.api.check import ImageCheck, RepairPlan, check_image, plan_repair
from blocklayer.api.repair_backup import restore, save
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
from blocklayer.errors import UnsupportedError, UsageError

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

    dry_run: Annotated[
        bool, Option("with -r: say what the repair would do, and change nothing")
    ] = False
    backup: Annotated[
        str | None,
        Option("with -r: first keep all that the repair overwrites, in a new file", "", "FILE"),
    ] = None
    restore: Annotated[
        str | None,
        Option("put back what --backup kept in FILE, if nothing changed since", "", "FILE"),
    ] = None

    @property
    def writes(self) -> bool:
        return (self.repair is not None and not self.dry_run) or self.restore is not None

    async def run(self) -> int:
        name = one_filename(self.operands)
        self._check_options()
        if self.restore is not None:
            return await self._restore(name, self.restore)
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
            if self.repair is not None and self.dry_run:
                plan, _ = await plan_repair(disk.root.node, self.repair, report=_report)
                return self._say_plan(plan, name)
            if self.repair is not None and self.backup is not None:
                _, rehearsal = await plan_repair(disk.root.node, self.repair)
                save(rehearsal, self.backup)
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

    def _check_options(self) -> None:
        if self.repair is None and (self.dry_run or self.backup is not None):
            raise UsageError("--dry-run and --backup go with a repair: say which with -r")
        if self.dry_run and self.backup is not None:
            raise UsageError("--dry-run changes nothing, so there is nothing to --backup")
        if self.restore is not None and (self.repair is not None or self.image_opts):
            raise UsageError("--restore takes the name of a file, and goes with no repair")

    async def _restore(self, name: str, backup: str) -> int:
        length = await restore(name, backup)
        if not self.quiet:
            console.write(f"Put back {length} bytes of metadata from '{backup}'.\n")
        return 0

    def _say_plan(self, plan: RepairPlan, name: str) -> int:
        if self.output == "json":
            from blocklayer.cli.json_text import pretty

            plain = msgspec.to_builtins(plan)
            for check in (plain["found"], plain["after"]):
                check["filename"] = name
            console.say(pretty({"dry-run": True, **plain}))
        elif not self.quiet:
            console.write(_plan_text(plan))
        found = plan.found
        if found.check_errors:
            return EXIT_FAILED
        if found.corruptions or found.corruptions_fixed:
            return EXIT_CORRUPT
        return EXIT_LEAKS if found.leaks or found.leaks_fixed else 0

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


def _plan_text(plan: RepairPlan) -> str:
    found = plan.found
    if not plan.would_write:
        return f"Nothing would be repaired.\n{_summary(found)}"
    text = (
        "The following inconsistencies would be repaired:\n\n"
        f"    {found.leaks_fixed} leaked clusters\n"
        f"    {found.corruptions_fixed} corruptions\n\n"
        f"{plan.would_write} bytes of metadata would change"
    )
    if plan.file_size_after != plan.file_size:
        text += f", and the file grow from {plan.file_size} to {plan.file_size_after} bytes"
    return f"{text}. Nothing was changed.\nA check would then say:\n{_summary(plan.after)}"


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
