"""blocklayer: QEMU's block layer as software of its own.

    import blocklayer

    blocklayer.create("new.qcow2", size="20G", backing="base.raw", backing_format="raw")
    with blocklayer.open("new.qcow2", writable=True) as disk:
        disk.write(0, b"hello")
        print(disk.read(0, 5), [extent.depth for extent in disk.map()])
    blocklayer.convert("new.qcow2", "copy.qcow2", compress=True, progress=print)

The same for asyncio is in ``blocklayer.aio``; a ``blocklayer.Daemon`` changes disks in use. Names
are loaded when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blocklayer.api import aio
    from blocklayer.api.cancellation import Cancellation
    from blocklayer.api.sync import (
        Disk,
        clone,
        commit,
        compare,
        convert,
        create,
        inspect,
        open,
        rebase,
        serve,
        stream,
    )
    from blocklayer.daemon.program import Daemon
    from blocklayer.errors import BlockError, CancelledError
    from blocklayer.graph.gate import Policy, default_policy, set_default_policy

__version__ = "0.1.0"
__all__ = [
    "BlockError",
    "Cancellation",
    "CancelledError",
    "Daemon",
    "Disk",
    "Policy",
    "aio",
    "clone",
    "commit",
    "compare",
    "convert",
    "create",
    "default_policy",
    "inspect",
    "open",
    "rebase",
    "serve",
    "set_default_policy",
    "stream",
]

_HOMES = {
    "BlockError": "blocklayer.errors",
    "Cancellation": "blocklayer.api.cancellation",
    "CancelledError": "blocklayer.errors",
    "Daemon": "blocklayer.daemon.program",
    "Disk": "blocklayer.api.sync",
    "Policy": "blocklayer.graph.gate",
    "clone": "blocklayer.api.sync",
    "commit": "blocklayer.api.sync",
    "compare": "blocklayer.api.sync",
    "convert": "blocklayer.api.sync",
    "create": "blocklayer.api.sync",
    "default_policy": "blocklayer.graph.gate",
    "inspect": "blocklayer.api.sync",
    "open": "blocklayer.api.sync",
    "rebase": "blocklayer.api.sync",
    "serve": "blocklayer.api.sync",
    "set_default_policy": "blocklayer.graph.gate",
    "stream": "blocklayer.api.sync",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "aio":
        return importlib.import_module("blocklayer.api.aio")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'blocklayer' has no attribute '{name}'")
