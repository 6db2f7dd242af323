"""Power failure while layers are merged: after every prefix of what reached the disks, with any
single unflushed request lost or torn, the chain that the top's header names is there, has no
corruption, and reads as the disk did.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.root import Root
from blocklayer.jobs.commit_layers import LayerCommitOptions
from blocklayer.jobs.group import Group, Jobs
from blocklayer.jobs.job import Job
from blocklayer.jobs.mirror import MirrorOptions
from blocklayer.jobs.starting import start_active_commit
from blocklayer.jobs.starting_layers import start_layer_commit, start_stream
from blocklayer.jobs.states import Status
from blocklayer.jobs.stream import StreamOptions
from blocklayer.testing.contract import read_all
from blocklayer.testing.crashing import CrashingDisk, State
from proof.crashes import REGISTRY, check, new_image, take

KIB = 1024
SIZE = 40 * KIB
CLUSTER = 512
NAMES = ("base", "low", "middle", "top")

Start = Callable[[Group, dict[str, Node]], Awaitable[Job]]


async def stream_all(group: Group, nodes: dict[str, Node]) -> Job:
    options = StreamOptions(lowest=nodes["base"])
    return await start_stream(group, nodes["top"], options, identifier="j")


async def stream_above_base(group: Group, nodes: dict[str, Node]) -> Job:
    options = StreamOptions(lowest=nodes["low"])
    return await start_stream(group, nodes["top"], options, identifier="j")


async def commit_layers(group: Group, nodes: dict[str, Node]) -> Job:
    options = LayerCommitOptions()
    return await start_layer_commit(group, nodes["middle"], nodes["base"], options, identifier="j")


async def commit_active(group: Group, nodes: dict[str, Node]) -> Job:
    options = MirrorOptions(base=nodes["base"], granularity=4096)
    return await start_active_commit(group, nodes["top"], nodes["base"], options, identifier="j")


class Shelf:
    """Disks by the names that headers know, and how far each log was at every moment."""

    def __init__(self, disks: dict[str, CrashingDisk]) -> None:
        self.disks = disks
        self.moments: list[dict[str, int]] = []

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        genuine = CrashingDisk.request

        async def request(disk: CrashingDisk, event: Any) -> None:
            self.note()
            await genuine(disk, event)
            self.note()

        patch.setattr(CrashingDisk, "request", request)

    def note(self) -> None:
        moment = {name: disk.position for name, disk in self.disks.items()}
        if not self.moments or moment != self.moments[-1]:
            self.moments.append(moment)

    def states(self) -> Iterator[dict[str, State]]:
        """All disks at one moment: one of them in any state, the others with all or nothing of
        what they had not flushed.
        """
        for moment in self.moments:
            for chosen, disk in self.disks.items():
                for state in disk.states(moment[chosen]):
                    for extreme in (0, 1):
                        yield {
                            name: state
                            if name == chosen
                            else _extreme(other, moment[name], extreme)
                            for name, other in self.disks.items()
                        }


def _extreme(disk: CrashingDisk, position: int, which: int) -> State:
    found = list(islice(disk.states(position), 2))
    return found[min(which, len(found) - 1)]


async def make_chain(seed: int) -> dict[str, CrashingDisk]:
    chance = random.Random(seed)
    disks: dict[str, CrashingDisk] = {}
    below: CrashingDisk | None = None
    for name in NAMES:
        options = {} if below is None else {"base": below, "base_format": "qcow2"}
        below = disks[name] = await new_image(SIZE, cluster_size=CLUSTER, **options)
        root = await take(below)
        for _ in range(5):
            at = chance.randrange(0, SIZE // CLUSTER - 4) * CLUSTER
            await root.write(at, chance.randbytes(3 * CLUSTER - 100))
        await root.write_zeroes(chance.randrange(0, 40) * CLUSTER, 2 * CLUSTER, unmap=True)
        await root.close()
        below.settle()
    return disks


async def run_job(shelf: Shelf, start: Start, patch: pytest.MonkeyPatch) -> bytes:
    """Carry the job out on the disks of ``shelf``; the answer is what the guest sees all along."""
    graph, jobs = Graph(REGISTRY), Jobs()
    nodes: dict[str, Node] = {}
    for name, disk in shelf.disks.items():
        options = {
            "driver": "qcow2", "node-name": name,
            "file": {"driver": "crashing", "filename": disk.name},
            "backing": list(nodes)[-1] if nodes else None,
        }  # fmt: skip
        nodes[name] = await open_options(graph, options, Flags(read_only=name != "top"))
    guest = Root(nodes["top"], "the guest", 3, 5)
    content = await read_all(guest)
    with patch.context() as watched:
        shelf.watch(watched)
        group = Group(jobs)
        job = await start(group, nodes)
        group.start()
        while not job.ended.is_set():
            if job.status is Status.READY and not job.told_to_complete:
                job.complete()
            await asyncio.sleep(0)
        assert job.error is None, job.error
        assert await read_all(guest) == content
        await guest.close()
    return content


async def look(shelf: Shelf, states: dict[str, State], content: bytes) -> None:
    """Open the chain that the top's header names after the power failed."""
    by_name = {shelf.disks[name].name: state.disk() for name, state in states.items()}
    said = ", ".join(f"{name} {state}" for name, state in states.items())

    async def options_for(name: str) -> dict[str, Any]:
        disk = by_name[name]
        root = await take(disk, writable=False, backing=None)
        driver = root.node.driver
        assert isinstance(driver, FormatDriver)
        reference = driver.backing_reference
        found = await check(root)
        assert not found.corruptions, f"{said}: {found.messages}"
        assert not found.check_errors, f"{said}: {found.messages}"
        await root.close()
        below = await options_for(reference.filename) if reference is not None else None
        file = {"driver": "crashing", "filename": disk.name}
        return {"driver": "qcow2", "file": file, "backing": below}

    graph = Graph(REGISTRY)
    node = await open_options(graph, await options_for(shelf.disks["top"].name), Flags())
    root = Root(node, "a test", 1)
    assert await read_all(root) == content, said
    await root.close()


@pytest.mark.parametrize("start", [stream_all, stream_above_base, commit_layers, commit_active])
def test_the_chain_named_on_disk_is_complete(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        shelf = Shelf(await make_chain(seed=5))
        content = await run_job(shelf, start, monkeypatch)
        tried = 0
        for states in shelf.states():
            tried += 1
            await look(shelf, states, content)
        assert tried > 50

    asyncio.run(main())
