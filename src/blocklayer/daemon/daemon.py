"""The daemon: one live graph, the jobs that run on it, and the front ends through which it is used.

    async with Daemon() as daemon:
        await nodes.add(daemon, {"driver": "qcow2", "node-name": "disk0", "file": {…}})

What can be done is in the modules beside this one, one file a subject; each takes the daemon first.

1. What is added by name stays until it is removed by name, or the daemon closes.
2. Closing ends everything in order: front ends stop taking requests, jobs are cancelled, caches and
   bitmaps are stored. What could not be stored is raised, after the rest was closed all the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blocklayer.drivers import REGISTRY
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.gate import Policy
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Node
from blocklayer.graph.registry import Registry
from blocklayer.jobs.group import Jobs

if TYPE_CHECKING:
    from blocklayer.daemon.devices import Device
    from blocklayer.exports.export import Export
    from blocklayer.exports.nbd.server import NbdServer
    from blocklayer.graph.throttling import ThrottleGroup


class DeviceNotFoundError(UsageError):
    """There is no device, node or object of that name."""

    error_class = "DeviceNotFound"


class Daemon:
    """A live block layer. Use it on one event loop only."""

    def __init__(self, *, policy: Policy | None = None, registry: Registry = REGISTRY) -> None:
        self.graph = Graph(registry, policy)
        self.jobs = Jobs()
        self.devices: list[Device] = []
        """The oldest first; ``daemon.devices`` adds and removes them."""
        self.throttle_groups: dict[str, ThrottleGroup] = {}
        """Those that devices share and no object stands for; ``daemon.limits`` adds and removes."""
        self.status = "running"
        """Of a machine that is not there: ``stop`` and errors pause it, ``cont`` resumes it."""
        self.exports: dict[str, Export] = {}
        """By id, the oldest first; ``daemon.exports`` adds and removes them."""
        self.nbd_servers: dict[str, NbdServer] = {}
        """By name; the one that QMP knows has the name ""."""
        self.front_ends: list[Callable[[], Awaitable[None]]] = []
        """What ends each kind of front end (devices, servers, exports), the first to end last."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def find(self, name: str) -> Node:
        """The node that ``name`` stands for: a device's, or the node of that name."""
        node = self.device_medium(name) or self.graph.nodes.get(name)
        if node is None:
            raise UsageError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def device_medium(self, name: str) -> Node | None:
        """The node in the device ``name``, if there is such a device with a medium in it."""
        found = (each for each in self.devices if name and name in (each.drive, each.id))
        device = next(found, None)
        return device.node if device is not None else None

    async def close(self) -> None:
        """End everything. Raises the first error met."""
        from blocklayer.daemon import devices

        failure: BlockError | None = None
        for end in reversed(self.front_ends):
            try:
                await end()
            except BlockError as error:
                failure = failure or error
        await self.jobs.cancel_all()
        try:
            await devices.close_all(self)
        except BlockError as error:
            failure = failure or error
        for node in list(self.graph.nodes.values()):
            if node.held:
                node.held = False
                try:
                    await self.graph.release(node)
                except BlockError as error:
                    failure = failure or error
        if failure is not None:
            raise failure
