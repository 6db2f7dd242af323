"""`blk img`: one module a subcommand; this table says where each is, and loads none."""

from __future__ import annotations

from typing import Final

_HERE = "blocklayer.cli.img"

OWN: Final = frozenset(("chain", "clone", "inspect"))
"""Subcommands that the original tool does not have."""

COMMANDS: Final = {
    "amend": f"{_HERE}.amend:Amend",
    "bench": f"{_HERE}.bench:Bench",
    "bitmap": f"{_HERE}.bitmap:Bitmap",
    "chain": f"{_HERE}.chain:Chain",
    "check": f"{_HERE}.check:Check",
    "clone": f"{_HERE}.clone:Clone",
    "commit": f"{_HERE}.commit:Commit",
    "compare": f"{_HERE}.compare:Compare",
    "convert": f"{_HERE}.convert:Convert",
    "create": f"{_HERE}.create:Create",
    "dd": f"{_HERE}.dd:Dd",
    "info": f"{_HERE}.info:Info",
    "inspect": f"{_HERE}.inspect:Inspect",
    "map": f"{_HERE}.map:Map",
    "measure": f"{_HERE}.measure:Measure",
    "rebase": f"{_HERE}.rebase:Rebase",
    "resize": f"{_HERE}.resize:Resize",
    "snapshot": f"{_HERE}.snapshot:Snapshot",
}
