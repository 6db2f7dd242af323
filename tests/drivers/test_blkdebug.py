"""blkdebug: which requests fail, when, and what qcow2 above makes of it; the same as with QEMU."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from blocklayer import aio
from blocklayer.drivers import REGISTRY
from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import KIB, MIB
from oracles import Oracle

READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE


async def attach(**rules: Any) -> Root:
    options = {
        "driver": "blkdebug", "image": {"driver": "memory", "size": MIB},
        **{name.replace("_", "-"): value for name, value in rules.items()},
    }  # fmt: skip
    node = await open_options(Graph(REGISTRY), options, Flags(read_only=False, discard_unmap=True))
    return Root(node, "the guest", READ_WRITE)


async def fails(request: Any, number: int = errno.EIO) -> None:
    with pytest.raises(StorageError, match="was made to fail") as failure:
        await request
    assert failure.value.errno == number


def test_what_fails_is_what_the_rules_say() -> None:
    async def scene() -> None:
        root = await attach(
            inject_error=[
                {"event": "none", "iotype": "read", "sector": 8},
                {"event": "none", "iotype": "discard", "errno": errno.ENOSPC},
                {"event": "none", "iotype": "flush", "once": True},
            ]
        )
        await root.write(0, b"x" * 64 * KIB)
        await root.read(0, 4096)
        await root.read(4608, 4096)
        await fails(root.read(4607, 1))
        await fails(root.read(0, 64 * KIB))
        await fails(root.discard(0, 4096), errno.ENOSPC)
        await fails(root.flush())
        await root.flush()

    asyncio.run(scene())


def test_events_and_states() -> None:
    async def scene() -> None:
        root = await attach(
            inject_error=[{"event": "pwritev", "state": 3, "once": True}],
            set_state=[
                {"event": "pwritev", "state": 1, "new_state": 2},
                {"event": "flush_to_disk", "state": 2, "new_state": 3},
            ],
        )
        await root.write(0, b"a")
        await root.write(0, b"b")
        await root.flush()
        await root.read(0, 1)
        await fails(root.write(0, b"c"))
        assert await root.read(0, 1) == b"b"

    asyncio.run(scene())


def test_what_it_cannot_do_is_refused() -> None:
    async def scene() -> None:
        for rules in (
            {"inject_error": [{"event": "l2_update"}]},
            {"align": 4096},
            {"config": "rules.conf"},
        ):
            with pytest.raises(UsageError):
                await attach(**rules)

    asyncio.run(scene())


@pytest.mark.parametrize("iotype", ["read", "write", "flush", "write-zeroes"])
def test_below_a_format_as_with_the_real_one(tmp_path: Path, qemu_io: Oracle, iotype: str) -> None:
    """The same rule and the same request: it fails in both, or in neither."""
    path = tmp_path / "a.qcow2"
    asyncio.run(aio.create(path, MIB))
    # The data of the first cluster begin at sector 640.
    qemu_io("-c", "write -P 1 0 192k", path)
    options = {
        "driver": "qcow2",
        "file": {
            "driver": "blkdebug", "image": {"driver": "file", "filename": str(path)},
            "inject-error": [{"event": "none", "iotype": iotype, "sector": 640}],
        },
    }  # fmt: skip
    commands = ["write -P 2 0 192k", "read 0 64k", "read 64k 64k"]
    theirs = []
    for command in commands:
        done = qemu_io("-c", command, "json:" + json.dumps(options), check=False)
        theirs.append("Input/output error" not in done.stdout + done.stderr)

    async def scene(command: str) -> bool:
        node = await open_options(Graph(REGISTRY), options, Flags(read_only=False))
        root = Root(node, "the guest", READ_WRITE)
        try:
            if command.startswith("write"):
                await root.write(0, b"\2" * 192 * KIB)
            else:
                await root.read(0 if command == "read 0 64k" else 64 * KIB, 64 * KIB)
            return True
        except StorageError:
            return False
        finally:
            await root.close()

    assert [asyncio.run(scene(command)) for command in commands] == theirs
