"""`blk shell`: the conversation at the prompt.

1. Every reply is shown whole, as JSON; events are shown when they come.
2. Lines that are piped in are a script: the exit code is 1 if any command failed. At a terminal it
   is 0, but for a connection that cannot be made or is lost.
3. Ctrl-C drops the line, or gives up waiting for a reply; Ctrl-D leaves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from blocklayer.cli import console
from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.errors import BlockError, UsageError

if TYPE_CHECKING:
    from blocklayer.cli.shell.completion import Completer
    from blocklayer.cli.shell.connection import Connection
    from blocklayer.cli.shell.prompt import Prompt


class Shell(Command):
    """Talk to a running daemon in QMP (used like qmp-shell)

    A line is a command with arguments: blockdev-add driver=file filename=a.raw node-name=a
    Values are JSON or Python literals or plain words, dots reach into objects, and a line
    that begins with { is a whole message in JSON. Between 'transaction(' and ')' every line
    is one action. Tab completes commands, arguments and values. Commands may be piped in.
    """

    OPERANDS = (("ADDRESS", "path of the daemon's socket, or HOST:PORT"),)

    hmp: Annotated[bool, Option("speak to the human monitor", "H")] = False
    verbose: Annotated[bool, Option("show what is sent", "v")] = False
    pretty: Annotated[bool, Option("show JSON over several lines", "p")] = False
    logfile: Annotated[str | None, Option("append all messages to a file", "l", "FILE")] = None
    skip_negotiation: Annotated[bool, Option("do not negotiate (for the guest agent)", "N")] = False

    @property
    def writes(self) -> bool:
        """What Ctrl-C means is decided here, where a line is waited for."""
        return False

    async def run(self) -> int:
        """Carry out lines until there are no more."""
        from blocklayer.cli.shell.connection import Connection
        from blocklayer.cli.shell.prompt import Prompt

        if len(self.operands) != 1:
            raise CommandLineError("Expecting one address of a daemon")
        log = _open_log(self.logfile) if self.logfile is not None else None
        try:
            talk = Conversation(self, log)
            talk.prompt = Prompt("hmp_history" if self.hmp else "qmp_history", talk.complete)
            talk.connection = Connection(talk.on_event)
            try:
                return talk.run(self.operands[0])
            finally:
                talk.connection.close()
                talk.prompt.save()
        finally:
            if log is not None:
                log.close()


class Conversation:
    """Lines in, replies and events out."""

    prompt: Prompt
    connection: Connection

    def __init__(self, options: Shell, log: IO[str] | None) -> None:
        self._options = options
        self._log = log
        self._completer: Completer | None = None
        self._actions: list[dict[str, Any]] | None = None
        self._good = True

    def run(self, address: str) -> int:
        """The whole conversation; the exit code. Raises BlockError when the server goes."""
        greeting = self.connection.open(address, negotiate=not self._options.skip_negotiation)
        if self.prompt.interactive:
            version = greeting.get("version", {})
            release = ".".join(str(version.get("qemu", {}).get(p)) for p in _RELEASE)
            console.say(f"Connected to {version.get('package') or 'QEMU'} (QMP of QEMU {release})")
        while True:
            try:
                line = self.prompt.line(self._prompt_text)
                if line is None or line.strip() in ("exit", "exit()"):
                    break
                self._carry_out(line.strip())
            except KeyboardInterrupt:
                if not self.prompt.interactive:
                    raise
                self._actions = None
            if self.connection.ended:
                return self._end()
        if self._actions is not None:
            raise UsageError("the transaction was not ended with ')', and not sent")
        return 0 if self._good or self.prompt.interactive else 1

    def _end(self) -> int:
        console.complain("The server closed the connection")
        return 0 if self._good else 1

    @property
    def _prompt_text(self) -> str:
        if self._options.hmp:
            return "(hmp) "
        return "(qmp) " if self._actions is None else "TRANS> "

    def _carry_out(self, line: str) -> None:
        """Do what ``line`` says; what is wrong with it is said."""
        if not line or line.startswith("#"):
            return
        try:
            if self._options.hmp:
                self._send(_human(line))
            else:
                message = self._message(line)
                if message is not None:
                    self._send(message)
        except UsageError as error:
            self._good = False
            console.error(str(error))

    def _message(self, line: str) -> dict[str, Any] | None:
        """The message that ``line`` is or completes, if it does."""
        from blocklayer.cli.shell.parsing import parse_action, parse_message

        if self._actions is None:
            if not line.replace(" ", "").startswith("transaction("):
                return parse_message(line)
            self._actions, line = [], line.partition("(")[2].strip()
        ended = line.endswith(")")
        line = line.removesuffix(")").strip()
        try:
            if line:
                self._actions.append(parse_action(line))
        except UsageError:
            self._actions = None
            raise
        if not ended:
            return None
        actions, self._actions = self._actions, None
        return {"execute": "transaction", "arguments": {"actions": actions}}

    def _send(self, message: dict[str, Any]) -> None:
        self._record("->", message)
        if self._options.verbose:
            console.say(self._text(message))
        reply = self.connection.exchange(message)
        self._record("<-", reply)
        failed = "error" in reply
        self._good = self._good and not failed
        if self._options.hmp and not failed:
            console.write(str(reply["return"]).replace("\r\n", "\n"))
        else:
            console.say(self._text(reply))
        console.flush()

    def on_event(self, event: dict[str, Any]) -> None:
        """Show ``event``; called while a line may be being typed."""
        self._record("<-", event)
        self.prompt.show(self._text(event))

    def _text(self, message: dict[str, Any]) -> str:
        return json.dumps(message, indent=4 if self._options.pretty else None, ensure_ascii=False)

    def _record(self, way: str, message: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(f"{way} {json.dumps(message)}\n")
            self._log.flush()

    def complete(self, line: str) -> list[str]:
        """What the last word of ``line`` may become."""
        try:
            if self._completer is None:
                self._completer = self._learn()
            return self._completer.candidates(line)
        except BlockError:
            return []

    def _learn(self) -> Completer:
        from blocklayer.cli.shell.completion import Completer

        if self._options.hmp:
            shown = str(self.connection.exchange(_human("help")).get("return", ""))
            return Completer.of_names(line.split()[0] for line in shown.split("\n") if line.strip())
        schema = self.connection.exchange({"execute": "query-qmp-schema"})
        if "return" in schema:
            return Completer(schema["return"])
        names = self.connection.exchange({"execute": "query-commands"}).get("return", ())
        return Completer.of_names(entry["name"] for entry in names)


_RELEASE = ("major", "minor", "micro")


def _human(line: str) -> dict[str, Any]:
    return {"execute": "human-monitor-command", "arguments": {"command-line": line}}


def _open_log(path: str) -> IO[str]:
    return Path(path).open("a", encoding="utf-8")
