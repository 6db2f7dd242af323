"""Several actions at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec

from blocklayer.daemon import transactions
from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments
from blocklayer.qmp.shapes import Variants


class _Common(msgspec.Struct):
    type: str


def _actions() -> Mapping[str, type[msgspec.Struct]]:
    return {
        name: msgspec.defstruct(f"{kind.Options.__name__}Wrapper", [("data", kind.Options)])
        for name, kind in transactions.ACTIONS.items()
    }


_ACTION: Final = Variants(name="TransactionAction", tag="type", common=_Common, structs=_actions)


class TransactionProperties(Arguments):
    """``grouped``: the jobs of all actions take effect together, or none does."""

    completion_mode: Literal["individual", "grouped"] = "individual"


class Transaction(Arguments):
    """The actions, in their order."""

    actions: list[Annotated[dict[str, Any], _ACTION]]
    properties: TransactionProperties = msgspec.field(default_factory=TransactionProperties)


@COMMANDS.command("transaction")
async def transaction(monitor: Monitor, arguments: Transaction) -> None:
    """Carry all actions out at one instant of all their disks, or none."""
    await transactions.transaction(
        monitor.server.daemon,
        [(action["type"], action["data"]) for action in arguments.actions],
        completion_mode=arguments.properties.completion_mode,
    )
