"""The state file: what a daemon has open, so that the next one can open it again.

1. The file is replaced as a whole, and is on stable storage before the reply to the command that
   changed something is sent. A crash leaves the state before or after.
2. Kept are nodes that were added by name or are used from outside, with all options and children
   as they are by then: an overlay that a snapshot made is there, a layer that a job removed is not.
3. Jobs do not go on: what was under way is told when the next daemon begins.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from blocklayer.daemon import nodes
from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import StorageError
from blocklayer.graph.node import Node
from blocklayer.jobs.states import Status

_OVER = (Status.CONCLUDED, Status.NULL)


class RecordedJob(msgspec.Struct, kw_only=True):
    """A job that was under way."""

    id: str
    type: str
    status: str


class State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    version: int = 1
    nodes: list[dict[str, Any]] = []
    """Options as ``blockdev-add`` takes them, each after those that it refers to."""
    jobs: list[RecordedJob] = []


class StateFile:
    """Keeps the state of ``daemon`` at ``path``."""

    def __init__(self, daemon: Daemon, path: str) -> None:
        self._daemon = daemon
        self._path = path
        self._stored = b""

    async def restore(self) -> list[RecordedJob]:
        """Open what the file says, if there is one; the jobs that were under way."""
        try:
            with open(self._path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._failure(error) from error
        try:
            state = msgspec.json.decode(content, type=State)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StorageError(f"'{self._path}' is no state file: {error}", 22) from None
        for options in state.nodes:
            await nodes.add(self._daemon, options)
        return state.jobs

    def store(self) -> None:
        """Bring the file up to date. Raises StorageError."""
        content = msgspec.json.format(msgspec.json.encode(self._state()), indent=2) + b"\n"
        if content == self._stored:
            return
        partial = f"{self._path}.part"
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path)
            folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._failure(error) from error
        self._stored = content

    def _failure(self, error: OSError) -> StorageError:
        return StorageError.from_os(error, f"State file '{self._path}'", self._path)

    def _state(self) -> State:
        known: dict[Node, dict[str, Any]] = {}
        for node in self._daemon.graph.nodes.values():
            if node.held or any(e.parent is None and e.follows for e in node.parents):
                _record(_shown(node), known)
        jobs = [
            RecordedJob(id=job.id, type=job.TYPE, status=job.status.value)
            for job in self._daemon.jobs
            if job.status not in _OVER
        ]
        return State(nodes=list(known.values()), jobs=jobs)


def _record(node: Node, known: dict[Node, dict[str, Any]]) -> None:
    """Put ``node`` after all held nodes that it needs."""
    if node in known:
        return
    options = _options(node, known)
    known[node] = options


def _shown(node: Node) -> Node:
    """``node``, or what the filters of jobs above it show."""
    table = node.graph.registry.table
    while (entry := table.get(node.driver.NAME)) is not None and entry.internal:
        node = node.children["file"].node
    return node


def _options(node: Node, known: dict[Node, dict[str, Any]]) -> dict[str, Any]:
    options: dict[str, Any] = msgspec.to_builtins(node.options)
    options["driver"] = node.driver.NAME
    options.pop("node-name", None)
    if not node.name.startswith("#"):
        options["node-name"] = node.name
    # As it is now: jobs and reopening may have changed it.
    options["read-only"] = node.wanted.read_only
    if not node.active:
        options["active"] = False
    for name, edge in node.children.items():
        child = _shown(edge.node)
        if child.held:
            _record(child, known)
            options[name] = child.name
        else:
            options[name] = _options(child, known)
    if node.driver.supports_backing and node.backing is None:
        options["backing"] = None
    return options
