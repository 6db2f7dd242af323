"""Create: a new image, or the file for one, made as a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import Driver, FormatDriver, ProtocolDriver
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_reference
from blocklayer.graph.options import CreateOptions, Reference, decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.job import Job
from blocklayer.units import SECTOR

_TAKEN = int(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE)


class Create(Job):
    """``storage`` is the file's name for a protocol, the node to write to for a format; ``values``
    are named as in ``-o``.
    """

    TYPE = "create"
    is_block_job = False

    def __init__(
        self,
        graph: Graph,
        driver: type[Driver],
        storage: Reference,
        values: Mapping[str, Any],
        **job: Any,
    ) -> None:
        super().__init__(graph, **job)
        if driver.CreateOptions is None:
            raise UsageError("Driver does not support blockdev-create")
        self._driver = driver
        self._declared = driver.CreateOptions
        self._storage = storage
        self._values = values

    async def run(self) -> None:
        """Make it. What was in the storage before is lost."""
        self.total = 1
        try:
            options = decode(self._declared, self._values)
            if options.size % SECTOR:
                raise UsageError(f"Image size must be a multiple of {SECTOR} bytes")
            options.validate()
            if issubclass(self._driver, FormatDriver):
                await self._write_format(self._driver, options)
            else:
                assert issubclass(self._driver, ProtocolDriver)
                assert isinstance(self._storage, str)
                await self._driver.create(self.graph, self._storage, options)
        finally:
            self.done = 1

    async def _write_format(self, driver: type[FormatDriver], options: CreateOptions) -> None:
        flags = Flags(read_only=False, discard_unmap=True)
        if isinstance(self._storage, str) and self._storage not in self.graph.nodes:
            raise UsageError(
                f"Cannot find device='{self._storage}' nor node-name='{self._storage}'"
            )
        target = await open_reference(self.graph, self._storage, flags)
        root = await _hold(target, f"job '{self.id}'")
        try:
            async with root.request():
                if isinstance(target.driver, ProtocolDriver) and target.size:
                    await io.truncate(target, 0, shrink=True)
                await driver.create(self.graph, target, options)
        finally:
            await root.close()


async def _hold(target: Node, label: str) -> Root:
    try:
        return Root(target, label, _TAKEN, Permission.CONSISTENT_READ, follows=False)
    except BaseException:
        await target.graph.release(target)
        raise
