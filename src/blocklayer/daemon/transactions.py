"""Transactions: several actions at one instant of all disks that they touch, all or none.

``ACTIONS`` is the table of what a transaction can hold; other modules ``register`` theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from blocklayer.daemon import actions, backups, bitmaps, snapshots
from blocklayer.daemon.actions import Action
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import UsageError
from blocklayer.graph.options import decode
from blocklayer.jobs.group import Group


class Abort(Action):
    """``abort``: fails, to try out what happens then."""

    NAME = "abort"
    Options = actions.Options

    async def change(self) -> None:
        """Fail."""
        raise UsageError("Transaction aborted using Abort action")


ACTIONS: Final[dict[str, type[Action]]] = {}
"""Every action by its name."""


def register(*kinds: type[Action]) -> None:
    """Let transactions hold actions of these kinds."""
    ACTIONS.update((kind.NAME, kind) for kind in kinds)


register(
    Abort,
    bitmaps.Add,
    bitmaps.Remove,
    bitmaps.Clear,
    bitmaps.Enable,
    bitmaps.Disable,
    bitmaps.Merge,
    snapshots.External,
    snapshots.Sync,
    snapshots.Internal,
    backups.Blockdev,
    backups.Drive,
)


async def transaction(
    daemon: Daemon,
    wanted: Sequence[tuple[str, actions.Options | Mapping[str, Any]]],
    *,
    completion_mode: Literal["individual", "grouped"] = "individual",
) -> None:
    """Carry all actions out, given by name and options. ``grouped``: their jobs share one fate.

    Raises BlockError, with everything as it was before.
    """
    group = Group(daemon.jobs) if completion_mode == "grouped" else None
    planned: list[Action] = []
    for name, options in wanted:
        kind = ACTIONS.get(name)
        if kind is None:
            raise UsageError(f"Parameter 'type' does not accept value '{name}'")
        if group is not None and not kind.joins_group:
            raise UsageError(
                f"Action '{name}' does not support transaction property completion-mode = grouped"
            )
        if isinstance(options, Mapping):
            options = decode(kind.Options, options)
        planned.append(kind(daemon, options, group))
    await actions.carry_out(daemon, planned)
