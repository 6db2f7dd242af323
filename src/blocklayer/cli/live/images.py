"""Images that a verb makes and opens in the daemon, and takes back when it fails.

1. A file that exists is never overwritten; whoever wants to use it says so (``--reuse-external``).
2. ``undo`` closes what was opened and deletes what was made, in the opposite order.
"""

from __future__ import annotations

import os
import re
import uuid
from typing import Any, Final

from blocklayer.cli.live.disks import Disks, Layer
from blocklayer.cli.live.following import Job, JobFailed
from blocklayer.errors import BlockError, UsageError
from blocklayer.qmp.client import Client, CommandFailed

_NODE_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9\-._]{0,30}\Z")


class Images:
    """The images of one operation."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._nodes: list[str] = []
        self._files: list[str] = []

    async def create(
        self, path: str, driver: str, size: int, *, backing: Layer | None = None
    ) -> None:
        """Make an image file. Raises UsageError if there is one, JobFailed."""
        if os.path.exists(path):
            raise UsageError(f"'{path}' exists already; --reuse-external uses it as it is")
        raw = driver == "raw"
        self._files.append(path)
        await self._create({"driver": "file", "filename": path, "size": size if raw else 0}, path)
        if raw:
            return
        options: dict[str, Any] = {
            "driver": driver, "file": {"driver": "file", "filename": path}, "size": size,
        }  # fmt: skip
        if backing is not None:
            options |= {"backing-file": backing.filename, "backing-fmt": backing.driver}
        await self._create(options, path)

    async def _create(self, options: dict[str, Any], path: str) -> None:
        identifier = f"create-{uuid.uuid4().hex[:12]}"
        await self._client.execute("blockdev-create", {"job-id": identifier, "options": options})
        try:
            async with Job(self._client, identifier) as job:
                await job.reaches(told=lambda done, total: None)
        except JobFailed as error:
            raise BlockError(
                f"Could not create '{path}': {str(error).partition(': ')[2]}"
            ) from None

    async def add(self, name: str, options: dict[str, Any]) -> str:
        """Open a node called ``name`` if a node may be; the name it has."""
        if not _NODE_NAME.match(name) or (await Disks.ask(self._client)).has_node(name):
            name = f"live-{uuid.uuid4().hex[:12]}"
        await self._client.execute("blockdev-add", {"node-name": name, **options})
        self._nodes.append(name)
        return name

    async def undo(self) -> None:
        """Close and delete; what somebody uses by now stays."""
        for node in reversed(self._nodes):
            await remove_node(self._client, node)
        for path in reversed(self._files):
            try:
                os.unlink(path)
            except OSError:
                # Never made, or on another machine.
                pass


def file_options(path: str) -> dict[str, Any]:
    """The protocol node for an image in a file."""
    return {"driver": "file", "filename": path}


async def remove_node(client: Client, node: str) -> bool:
    """Close ``node`` if it is the user's to close and nobody uses it; whether it was."""
    try:
        await client.execute("blockdev-del", {"node-name": node})
    except CommandFailed:
        return False
    return True


def check_deletable(layers: list[Layer]) -> None:
    """Raise UsageError if the file of one of ``layers`` cannot be deleted from here."""
    for layer in layers:
        if not os.path.isabs(layer.filename):
            raise UsageError(
                f"'{layer.filename}' is no absolute path: --delete cannot tell which file that is"
            )


async def drop_layers(client: Client, layers: list[Layer], *, delete: bool) -> list[str]:
    """Close layers that a chain no longer has; ``delete`` their files; the names of those deleted.

    A file is deleted only when no node of the daemon has it open any more.
    """
    for layer in layers:
        await remove_node(client, layer.node)
    if not delete:
        return []
    nodes = await client.execute("query-named-block-nodes", {"flat": True})
    in_use = {node["file"] for node in nodes}
    gone: list[str] = []
    for layer in layers:
        if layer.filename in in_use:
            raise UsageError(f"'{layer.filename}' is still in use and was not deleted")
        os.unlink(layer.filename)
        gone.append(layer.filename)
    return gone
