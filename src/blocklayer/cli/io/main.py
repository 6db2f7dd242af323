"""`blk io`: the command line, and the session's course from the first command to the last.

1. With ``-c`` the commands given are carried out in order, else those read from standard input.
   A command that fails does not stop the others; the exit code is then 1.
2. At the end, however it comes, all requests are waited for and the image is closed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from blocklayer.cli import console
from blocklayer.cli.common import ForceShare, Format, ImageOpts
from blocklayer.cli.io.session import Session, Wanted
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import UsageError
from blocklayer.graph.options import parse_pairs


class Io(Command):
    """Read and write inside an image, command by command

    Without -c, commands are read from standard input. 'help' lists them.
    """

    OPERANDS = (("[FILENAME]", "image file name (or specification with --image-opts)"),)
    EXIT_CODES = ((0, "all commands worked"), (1, "one failed, or the image cannot be opened"))
    EXAMPLE = ("-c 'write -P 7 0 64k' -c 'read -P 7 0 64k' disk.qcow2", "writes, and looks")

    cmd: Annotated[list[str], Option("carry out this command (repeatable)", "c", "COMMAND")] = (
        msgspec.field(default_factory=list)
    )
    format: Format = None
    image_opts: ImageOpts = False
    read_only: Annotated[bool, Option("open the image read-only", "r")] = False
    snapshot: Annotated[
        bool, Option("write to a temporary overlay that is thrown away at the end", "s")
    ] = False
    nocache: Annotated[bool, Option("bypass the host's page cache, short for -t none", "n")] = False
    copy_on_read: Annotated[
        bool, Option("keep a copy of what is read from backing files in the image", "C")
    ] = False
    misalign: Annotated[bool, Option("use buffers that are not aligned", "m")] = False
    native_aio: Annotated[bool, Option("short for -i native", "k")] = False
    aio: Annotated[
        str | None,
        Option("threads, native or io_uring; requests are served alike in all", "i", "MODE"),
    ] = None
    cache: Annotated[str | None, Option("cache mode (default writethrough)", "t", "CACHE_MODE")] = (
        None
    )
    discard: Annotated[
        str | None, Option("ignore or unmap what is discarded (default unmap)", "d", "MODE")
    ] = None
    force_share: ForceShare = False
    trace: Annotated[
        list[str],
        Option(
            "tell what is opened, read and written; TRACE is a pattern of event names ('help' "
            "lists them), or PATTERN,events=FILE,file=FILE",
            "T",
            "TRACE",
            group="Output",
        ),
    ] = msgspec.field(default_factory=list)

    async def run(self) -> int:
        """Carry out the commands."""
        if not self.trace:
            return await self._run()
        from blocklayer.cli import trace

        if trace.is_help(self.trace):
            console.write(trace.events_text())
            return 0
        with trace.tracing(self.trace):
            return await self._run()

    async def _run(self) -> int:
        if len(self.operands) > 1:
            raise CommandLineError("Expecting one image file name at most")
        if self.image_opts and self.format is not None:
            raise UsageError("--image-opts and -f are mutually exclusive")
        wanted = self._wanted()
        wanted.check()
        session = Session(misaligned=self.misalign)
        try:
            if self.operands:
                await session.open(wanted)
            good = await self._carry_out(session)
        finally:
            await session.close()
        return 0 if good else 1

    def _wanted(self) -> Wanted:
        default = Wanted()
        name = self.operands[0] if self.operands else None
        options: dict[str, str] = {}
        if name is not None and self.image_opts:
            options, name = parse_pairs(name, implied="file"), None
        cache = "none" if self.nocache else default.cache
        return Wanted(
            name=name,
            format=self.format,
            options=options,
            read_only=self.read_only,
            snapshot=self.snapshot,
            copy_on_read=self.copy_on_read,
            force_share=self.force_share,
            cache=self.cache or cache,
            discard=self.discard or default.discard,
            aio=self.aio or ("native" if self.native_aio else default.aio),
        )

    async def _carry_out(self, session: Session) -> bool:
        from blocklayer.cli.io.table import carry_out

        if self.cmd:
            good = True
            for line in self.cmd:
                good &= await carry_out(session, line)
                if session.finished:
                    break
            return good
        from blocklayer.cli.io.prompt import Prompt

        prompt, good = Prompt(f"{console.program}> "), True
        while not session.finished:
            typed = await prompt.line(session.pending)
            if typed is None:
                break
            good &= await carry_out(session, typed)
        return good
