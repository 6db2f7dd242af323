"""`blk live qemu-monitor-command`: any command, passed through as it is."""

from __future__ import annotations

import json
from typing import Annotated, Any

from blocklayer.cli import console
from blocklayer.cli.json_text import pretty
from blocklayer.cli.live.verb import Verb
from blocklayer.cli.options import Option
from blocklayer.errors import UsageError
from blocklayer.qmp.client import Client


class QemuMonitorCommand(Verb):
    """Send a command to the daemon's monitor and show its answer

    COMMAND is a QMP message in JSON, a command's name with key=value arguments as `blk shell`
    takes them, or with --hmp a line for the human monitor.
    """

    OPERANDS = (("COMMAND…", "the command; several words are joined with spaces"),)
    EXAMPLE = ('\'{"execute": "query-jobs"}\'', "all jobs, as the daemon tells them")

    hmp: Annotated[bool, Option("the command is for the human monitor")] = False
    pretty: Annotated[bool, Option("print JSON over several lines")] = False
    return_value: Annotated[bool, Option("print what is returned only")] = False

    async def act(self, client: Client, operands: list[str]) -> int:
        line = " ".join(operands)
        reply = await client.exchange(_human(line) if self.hmp else _message(line))
        if self.hmp and "return" in reply:
            console.write(str(reply["return"]).replace("\r\n", "\n"))
            return 0
        shown = reply.get("return") if self.return_value and "return" in reply else reply
        console.say(pretty(shown) if self.pretty else json.dumps(shown, ensure_ascii=False))
        return 0 if "return" in reply else 1


def _human(line: str) -> dict[str, Any]:
    return {"execute": "human-monitor-command", "arguments": {"command-line": line}}


def _message(line: str) -> dict[str, Any]:
    from blocklayer.cli.shell.parsing import parse_message

    message = parse_message(line)
    if "execute" not in message:
        raise UsageError("the message has no member 'execute'")
    return {key: message[key] for key in ("execute", "arguments") if key in message}
