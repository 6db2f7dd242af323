"""The program `blk`: which command is meant, and what becomes of its errors.

1. Only the module of the chosen command is imported.
2. Called by the name of an original tool (a link named ``qemu-img``), the program is that tool:
   same arguments, and that name in front of its messages. Otherwise they start with ``blk img:``.
3. One policy holds for whatever a command opens: ``--policy`` before the command, else what
   BLOCKLAYER_POLICY says.
4. Exit codes: 0, 1 for every error, 130 after Ctrl-C; ``check`` and ``compare`` have more. Bad
   input gives lines for a person, never a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from blocklayer.cli import console
from blocklayer.cli.options import Command, CommandLineError, HelpRequest, parse
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.gate import Policy, default_policy, set_default_policy

if TYPE_CHECKING:
    from types import ModuleType

EXIT_INTERRUPTED: Final = 130
QEMU_VERSION: Final = "10.0.0"
"""The release of QEMU whose tools are resembled, for scripts that compare versions."""

GROUPS: Final = {
    "img": ("qemu-img", "blocklayer.cli.img", "Work on disk images (used like qemu-img)"),
    "io": ("qemu-io", "blocklayer.cli.io.main:Io", "Read and write inside an image (like qemu-io)"),
    "daemon": (
        "qemu-storage-daemon",
        "blocklayer.cli.daemon.main:Daemon",
        "Keep disks open, and change them while they are used (like qemu-storage-daemon)",
    ),
    "live": (
        None,
        "blocklayer.cli.live",
        "Snapshot, commit, copy, back up disks of a running daemon (like virsh)",
    ),
    "nbd": (
        "qemu-nbd",
        "blocklayer.cli.nbd.main:Nbd",
        "Serve an image by NBD (like qemu-nbd)",
    ),
    "shell": (
        "qmp-shell",
        "blocklayer.cli.shell.main:Shell",
        "Talk to a running daemon (like qmp-shell)",
    ),
    "tour": (
        None,
        "blocklayer.cli.tour.story:Tour",
        "Build a chain of images and show what can be done",
    ),
}
"""Name: the tool it stands for, its table of subcommands or its one Command, and its summary."""


def main(arguments: Sequence[str] | None = None, called: str | None = None) -> int:
    """Run the program by the name ``called`` with ``arguments``; the answer is the exit code.

    Both come from ``sys.argv`` unless given.
    """
    called = os.path.basename(sys.argv[0]) if called is None else called
    rest = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # File names are bytes: what was not UTF-8 on the way in is the same on the way out.
            stream.reconfigure(errors="surrogateescape")
    console.program = called if called in {tool for tool, _, _ in GROUPS.values()} else "blk"
    policy = default_policy()
    try:
        code = _run_guarded(rest)
        console.flush()
        return code
    except (BrokenPipeError, console.OutputError) as error:
        if sys.stdout is not None:
            # What is still buffered has nowhere to go; the interpreter would try once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, console.OutputError):
            console.error(str(error))
        return 1
    finally:
        set_default_policy(policy)


def _run_guarded(arguments: list[str]) -> int:
    """Run; turn every error into lines for a person and an exit code."""
    try:
        named = os.environ.get("BLOCKLAYER_POLICY")
        if named:
            _use_policy(named)
        return _choose_group(arguments)
    except CommandLineError as error:
        console.error(str(error), error.by)
        console.complain(f"Try '{error.command or console.program} --help' for more info")
    except (BrokenPipeError, console.OutputError):
        raise
    except BlockError as error:
        console.error(str(error))
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        console.error(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        console.error("interrupted")
        return EXIT_INTERRUPTED
    except MemoryError:
        console.error("out of memory")
    except Exception as error:
        return _report_bug(error)
    return 1


def _report_bug(error: Exception) -> int:
    if os.environ.get("BLOCKLAYER_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    console.error(
        f"internal error: {type(error).__name__}: {error}. This is a bug, please report it "
        "(BLOCKLAYER_DEBUG=1 shows where it happened)"
    )
    return 1


def _use_policy(text: str) -> None:
    """Put the policy ``text`` in force: a name of ours, or a JSON file."""
    import msgspec

    if text in ("strict", "no-probe"):
        set_default_policy(Policy.strict() if text == "strict" else Policy(probing=False))
        return
    try:
        with open(text, "rb") as file:
            set_default_policy(msgspec.json.decode(file.read(), type=Policy))
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"Could not use the policy '{text}': {said} (strict, no-probe, or a JSON file)"
        ) from None


def _take_policy(arguments: list[str]) -> list[str]:
    """``arguments`` without the ``--policy`` at their start, which is put in force."""
    while arguments and arguments[0].partition("=")[0] == "--policy":
        first, *arguments = arguments
        _, equals, policy = first.partition("=")
        if not equals and not arguments:
            raise CommandLineError("option '--policy' requires an argument")
        _use_policy(policy if equals else arguments.pop(0))
    return arguments


def _choose_group(arguments: list[str]) -> int:
    if console.program != "blk":
        place = next(place for tool, place, _ in GROUPS.values() if tool == console.program)
        return _run_place(place, arguments)
    arguments = _take_policy(arguments)
    if not arguments:
        raise CommandLineError("Not enough arguments")
    first, *rest = arguments
    if first in ("-h", "--help"):
        console.write(_top_help())
        return 0
    if first in ("-V", "--version"):
        console.write(_version())
        return 0
    if first.startswith("-"):
        raise CommandLineError(f"unrecognized option '{first}'")
    if first not in GROUPS:
        raise CommandLineError(f"Command not found: {first}")
    console.program = f"blk {first}"
    return _run_place(GROUPS[first][1], rest)


def _run_place(place: str, arguments: list[str]) -> int:
    """Run the one command at ``place``, or the chosen one of the table there."""
    arguments = _take_policy(arguments)
    if arguments[:1] in (["-V"], ["--version"]):
        console.write(_version())
        return 0
    if ":" in place:
        return _run_command(place, console.program, arguments)
    group = _import(place)
    table: dict[str, str] = group.COMMANDS
    if hasattr(group, "ADDRESS"):
        return _run_at_address(group, arguments)
    traced, arguments = _split_trace(arguments)
    if traced:
        from blocklayer.cli import trace

        if trace.is_help(traced):
            console.write(trace.events_text())
            return 0
        with trace.tracing(traced):
            return _run_subcommand(table, arguments)
    return _run_subcommand(table, arguments)


def _run_at_address(group: ModuleType, arguments: list[str]) -> int:
    """``ADDRESS COMMAND …``: the address becomes the command's first operand."""
    table: dict[str, str] = group.COMMANDS
    if not arguments or arguments[0] in ("-h", "--help"):
        console.write(_group_help(table, group.TITLE, f"{group.ADDRESS} "))
        return 0 if arguments else 1
    address, *rest = arguments
    if address in table:
        # Help about a command needs no daemon.
        address, rest = group.ADDRESS, arguments
    if not rest or rest[0] not in table:
        known = f"one of {', '.join(table)}"
        raise CommandLineError(
            f"Command not found: {rest[0]}; expecting {known}" if rest else f"Expecting {known}"
        )
    called = f"{console.program} {group.ADDRESS} {rest[0]}"
    if address == group.ADDRESS and not {"-h", "--help"}.intersection(rest):
        raise CommandLineError(f"Expecting {group.ADDRESS} before '{rest[0]}'")
    return _run_command(table[rest[0]], called, [address, *rest[1:]])


def _split_trace(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What ``-T`` and ``--trace`` before the subcommand say, and the rest. Raises
    CommandLineError.
    """
    traced: list[str] = []
    rest = list(arguments)
    while rest and rest[0][:2] in ("-T", "--"):
        first = rest[0]
        name, equals, value = first.partition("=")
        if first[:2] == "-T" and len(first) > 2:
            traced.append(rest.pop(0)[2:])
        elif name == "--trace" and equals:
            traced.append(value)
            del rest[0]
        elif first in ("-T", "--trace"):
            if len(rest) == 1:
                short = "option requires an argument -- 'T'"
                long = "option '--trace' requires an argument"
                raise CommandLineError(short if first == "-T" else long)
            traced.append(rest[1])
            del rest[:2]
        else:
            break
    return traced, rest


def _run_subcommand(table: dict[str, str], arguments: list[str]) -> int:
    if not arguments:
        raise CommandLineError("Not enough arguments")
    first, *rest = arguments
    if first in ("-h", "--help"):
        console.write(_group_help(table))
        return 0
    if first.startswith("-"):
        raise CommandLineError(f"unrecognized option '{first}'")
    if first not in table:
        raise CommandLineError(f"Command not found: {first}")
    return _run_command(table[first], f"{console.program} {first}", rest)


def load_command(place: str) -> type[Command]:
    """The class at ``package.module:Class``."""
    module, _, name = place.partition(":")
    command: type[Command] = getattr(_import(module), name)
    return command


def _import(module: str) -> ModuleType:
    from importlib import import_module

    return import_module(module)


def _run_command(place: str, called: str, arguments: list[str]) -> int:
    command_class = load_command(place)
    try:
        command = parse(command_class, arguments, called)
        _answer_progress_signal()
        code = command.run_alone()
        if code is not None:
            return code
        _import("blocklayer.cli.objects").define(command.object)
        if command.writes:
            return _run_as_task(command)
        return _run_in_place(command)
    except HelpRequest:
        from blocklayer.cli.help import help_text

        console.write(help_text(command_class, called))
        return 0
    except CommandLineError as error:
        error.command = called
        raise


def _answer_progress_signal() -> None:
    """SIGUSR1 asks how far we are, as it does the original tools."""
    import signal

    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, console.answer_signal)


def _run_in_place(command: Command) -> int:
    """Without tasks: nothing is changed, so that Ctrl-C may strike anywhere."""
    import asyncio

    from blocklayer.graph import waiting

    loop = asyncio.new_event_loop()
    try:
        return waiting.run(command.run(), loop)
    finally:
        loop.close()


def _run_as_task(command: Command) -> int:
    """As a task: Ctrl-C cancels it where it waits, which leaves images valid."""
    import asyncio
    import signal

    async def run() -> int:
        # Whoever ends us politely wants what Ctrl-C wants: nothing half-made left behind. SIGINT
        # itself may be ignored, as it is in the background of a script.
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
        return await command.run()

    try:
        with asyncio.Runner() as runner:
            return runner.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        left = command.left_behind()
        console.error(f"interrupted: {left}" if left else "interrupted")
        return EXIT_INTERRUPTED


def _version() -> str:
    from importlib.metadata import version

    own = f"blocklayer {version('blocklayer')}"
    if console.program.startswith("qemu-"):
        return f"{console.program} version {QEMU_VERSION} ({own})\n"
    return f"blk ({own}, resembles QEMU {QEMU_VERSION})\n"


def _top_help() -> str:
    lines = ["blk: disk images and their chains.  Usage:", "", "  blk COMMAND [--help | …]", ""]
    lines += ["Commands:", ""]
    lines += [f"  {name} - {summary}" for name, (_, _, summary) in GROUPS.items()]
    return "\n".join([*lines, *_standard_options()])


def _group_help(table: dict[str, str], title: str = "disk image utility", address: str = "") -> str:
    from blocklayer.cli.help import summary
    from blocklayer.drivers import REGISTRY

    program = console.program
    lines = [
        f"{program}: {title}.  Usage:",
        "",
        f"  {program} [standard options] {address}COMMAND [--help | command options]",
        "",
        f"Recognized commands (run {program} COMMAND --help for command-specific help):",
        "",
    ]
    lines += [f"  {name} - {summary(load_command(place))}" for name, place in table.items()]
    if address:
        return "\n".join([*lines, *_standard_options()])
    names = sorted(name for name, entry in REGISTRY.table.items() if not entry.internal)
    lines += ["", "Supported image formats:", "", f"  {' '.join(names)}"]
    return "\n".join([*lines, *_standard_options()[:-1], *_TRACE_HELP, ""])


_TRACE_HELP = (
    "  -T, --trace TRACE",
    "     tell what is opened, read and written; TRACE is a pattern of event names",
    "     ('help' lists them), or PATTERN,events=FILE,file=FILE",
)


def _standard_options() -> list[str]:
    return [
        "",
        "Standard options:",
        "  -h, --help",
        "     print this help and exit",
        "  -V, --version",
        "     print the version and exit",
        "  --policy POLICY",
        "     what images may open, for every command: strict, no-probe, or a JSON file",
        "     (before the command; else the environment variable BLOCKLAYER_POLICY says)",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
