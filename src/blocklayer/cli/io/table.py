"""All commands of `blk io`, and carrying out one line."""

from __future__ import annotations

from typing import Final

from blocklayer.cli import console
from blocklayer.cli.io import control, inspecting, reading, special, writing
from blocklayer.cli.io.session import Session
from blocklayer.cli.io.transfer import say_refusal
from blocklayer.cli.io.verbs import CallError, CommandError, by_name
from blocklayer.errors import BlockError, UsageError

TABLE: Final = by_name(
    (*control.VERBS, *inspecting.VERBS, *reading.VERBS, *special.VERBS, *writing.VERBS)
)


async def carry_out(session: Session, line: str) -> bool:
    """Carry out the command in ``line``; whether it worked. Says itself what did not."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return True
    called, *rest = words
    verb = TABLE.get(called)
    if verb is None:
        console.complain(f'command "{called}" not found')
        return False
    if verb.needs_image and session.image is None:
        console.complain("no file open, try 'help open'")
        return False
    try:
        verb.check_count(len(rest), called)
    except UsageError as error:
        console.complain(str(error))
        return False
    if verb.changes and session.node.read_only:
        console.error("Block node is read-only")
        return False
    try:
        await verb.run(session, verb.parse(rest, called))
    except CallError as error:
        if str(error):
            console.complain(str(error))
        console.say(verb.usage_line())
    except CommandError as refusal:
        say_refusal(refusal)
    except BlockError as error:
        console.error(str(error))
    else:
        return True
    return False
