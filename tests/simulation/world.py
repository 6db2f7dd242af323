"""Disks in use, and everything at once that can be done with them: decided by one seed.

`JOBS` says which live jobs there are; a new one is one more line.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from blocklayer.daemon import bitmaps, nodes, snapshots
from blocklayer.daemon.actions import Action, Options, carry_out
from blocklayer.daemon.bitmaps import BlockDirtyBitmap, BlockDirtyBitmapAdd
from blocklayer.daemon.daemon import Daemon
from blocklayer.daemon.snapshots import BlockdevSnapshotSync
from blocklayer.errors import BlockError
from blocklayer.graph import edit, io, permission
from blocklayer.graph.create import create_image
from blocklayer.graph.filename import storage_of
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.backup import BackupOptions
from blocklayer.jobs.commit_layers import LayerCommitOptions
from blocklayer.jobs.group import Group
from blocklayer.jobs.job import Job
from blocklayer.jobs.mirror import Mirror, MirrorOptions
from blocklayer.jobs.starting import place_backup, start_active_commit, start_mirror
from blocklayer.jobs.starting_layers import start_layer_commit, start_stream
from blocklayer.jobs.states import TAKES, Status
from blocklayer.jobs.stream import StreamOptions
from blocklayer.testing.crashing import CrashingDisk, registry
from blocklayer.units import KIB
from simulation.writer import Writer, check, pattern, read

SIZE = 192 * KIB
CLUSTER_SIZE = 4 * KIB
CRASHES = 4
READ_WRITE = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


class Note(Action):
    """Remembers what was written at the instant of a transaction."""

    NAME = "note"
    Options = Options
    writers: list[Writer]
    moment: list[list[int]]

    def commit(self) -> None:
        """The instant."""
        self.moment = [list(writer.now) for writer in self.writers]


class World:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.daemon = Daemon(registry=registry())
        self.disks: dict[str, CrashingDisk] = {}
        self.writers: list[Writer] = []
        self.moments: list[tuple[str, list[int]]] = []
        """Layers below a snapshot, and what they hold for good."""
        self.crashes: list[Callable[[], Awaitable[None]]] = []
        """What the disks held when the power failed, still to be looked at."""
        self.outcomes: list[str] = []
        self.broken: set[Node] = set()
        """Targets of jobs that were made to fail."""
        self._numbers = iter(range(1, 10_000))
        self.over = False

    def name(self, kind: str) -> str:
        """A new name."""
        return f"{kind}{next(self._numbers)}"

    def disk(self) -> CrashingDisk:
        """New storage, whose requests end in any order."""
        disk = CrashingDisk(concurrent=True)
        disk.chance = self.chance
        self.disks[disk.name] = disk
        return disk

    async def pause(self) -> None:
        """Let the others get on."""
        await asyncio.sleep(self.chance.random() * 0.2)

    async def image(self, kind: str) -> tuple[Node, CrashingDisk]:
        """A node with a new, empty image."""
        disk = self.disk()
        await create_image(
            Graph(registry()), disk.name, "qcow2", {"size": SIZE, "cluster_size": CLUSTER_SIZE}
        )
        file = {"driver": "crashing", "filename": disk.name}
        name = self.name(kind)
        node = await nodes.add(
            self.daemon, {"driver": "qcow2", "node-name": name, "file": file, "discard": "unmap"}
        )
        return node, disk

    async def run(self, *, length: int) -> None:
        """All of it; raises what is wrong."""
        for _ in range(2):
            node, _ = await self.image("disk")
            self.writers.append(Writer(Root(node, "a guest", READ_WRITE), self.chance))
        players = [partial(self._jobs, writer) for writer in self.writers]
        players += [self._snapshots, self._bitmaps]
        tasks = [asyncio.create_task(self._play(player, length)) for player in players]
        crashing = asyncio.create_task(self._crash())
        await asyncio.gather(*tasks)
        self.over = True
        await crashing
        for writer in self.writers:
            await writer.stop()
            await writer.check()
        for name, moment in self.moments:
            if name in self.daemon.graph.nodes:
                await check(self.daemon.find(name), moment)
        self._check_graph()
        for look in self.crashes:
            await look()
        for writer in self.writers:
            await writer.root.close()
        try:
            await self.daemon.close()
        except BlockError:
            # A target that was made to fail cannot be written back.
            assert self.broken
        assert self.daemon.graph.nodes == {}
        assert self.daemon.graph.roots == []

    async def _play(self, player: Callable[[], Awaitable[None]], length: int) -> None:
        for _ in range(length):
            await self.pause()
            await player()

    def _check_graph(self) -> None:
        graph = self.daemon.graph
        labels = [(root.label, root.node.name) for root in graph.roots if root.label != "a guest"]
        assert not labels, labels
        assert not list(self.daemon.jobs)
        for node in graph.nodes.values():
            assert node.busy is None, node.name
            assert node.poisoned is None or not self.broken.isdisjoint(_above(node)), node.name
            permission.check_conflicts(node)
            assert permission.cumulative(node) == (node.taken, node.shared), node.name
            assert not any(edge.frozen for edge in node.children.values())
            assert not node.claims.held

    # The players.

    async def _snapshots(self) -> None:
        """Overlays for several disks at one instant; sometimes one of their files fails."""
        tops = [writer.root.node for writer in self.writers]
        if self.chance.random() < 0.8:
            tops = [top for top in tops if not top.busy]
        made: list[Action] = []
        disks = [self.disk() for _ in tops]
        for top, disk in zip(tops, disks, strict=True):
            if self.chance.random() < 0.1:
                disk.fail(self.chance.randrange(1, 12))
            options = BlockdevSnapshotSync(
                node_name=top.name, snapshot_file=disk.name, snapshot_node_name=self.name("layer")
            )
            made.append(snapshots.Sync(self.daemon, options))
        note = Note(self.daemon, Options())
        note.writers = [writer for writer in self.writers if writer.root.node in tops]
        try:
            await carry_out(self.daemon, [*made, note])
        except BlockError as error:
            self.outcomes.append(f"no snapshot: {str(error)[:40]}")
            return
        finally:
            for disk in disks:
                disk.fail(0)
        self.outcomes.append("snapshot")
        # An active commit into a layer changes it, later: looked at now.
        for top, moment in zip(tops, note.moment, strict=True):
            if not top.busy and top.read_only and top.name in self.daemon.graph.nodes:
                await self._check_unless_committed(top, moment)

    async def _check_unless_committed(self, layer: Node, moment: list[int]) -> None:
        found = await read(layer, len(moment))
        if not layer.read_only:
            return
        assert found == [pattern(token) for token in moment], layer.name

    async def _bitmaps(self) -> None:
        """Bitmaps come and go."""
        node = self.chance.choice(self.writers).root.node.name
        name = self.name("bitmap")
        persistent = self.chance.random() < 0.5
        with suppress(BlockError):
            await bitmaps.block_dirty_bitmap_add(
                self.daemon, BlockDirtyBitmapAdd(node=node, name=name, persistent=persistent)
            )
            await self.pause()
            await bitmaps.block_dirty_bitmap_remove(
                self.daemon, BlockDirtyBitmap(node=node, name=name)
            )

    async def _jobs(self, writer: Writer) -> None:
        """A job on a disk, and whatever may be done with a job."""
        if self.chance.random() < 0.3:
            await asyncio.sleep(1)
        make = self.chance.choice(JOBS)
        group = Group(self.daemon.jobs)
        try:
            live = await make(self, writer, group)
        except BlockError as error:
            self.outcomes.append(f"no job: {str(error)[:40]}")
            return
        if live is None:
            return
        job, judge = live
        group.start()
        for patience in reversed(range(60)):
            if job.ended.is_set():
                break
            await asyncio.sleep(self.chance.random() * 0.3)
            self._meddle(job)
            if not patience and not job.ended.is_set():
                # In the background it may never catch up with a guest.
                with suppress(BlockError):
                    job.cancel()
                await job.ended.wait()
        self.outcomes.append(f"{job.TYPE}: {job.error or 'done'}")
        await judge()

    def _meddle(self, job: Job) -> None:
        allowed = [verb for verb, states in TAKES.items() if job.status in states]
        deed = self.chance.choice(("pause", "resume", "resume", "set-speed", "complete", "complete",
                                   "complete", "cancel", "soft", "nothing"))  # fmt: skip
        if ("cancel" if deed == "soft" else deed) not in allowed:
            return
        with suppress(BlockError):
            match deed:
                case "pause":
                    job.pause()
                case "resume":
                    job.resume()
                case "set-speed":
                    job.set_speed(self.chance.choice((0, 0, 256 * KIB)))
                case "complete":
                    job.complete()
                case "cancel" if self.chance.random() < 0.3:
                    job.cancel()
                case "soft" if job.status in (Status.READY, Status.STANDBY):
                    job.cancel(force=False)

    # Power failures.

    async def _crash(self) -> None:
        for _ in range(CRASHES):
            await asyncio.sleep(self.chance.random() * 3)
            if self.over:
                return
            for writer in self.writers:
                self._note_crash(writer)

    def _note_crash(self, writer: Writer) -> None:
        chain = [storage_of(layer).driver.filename for layer in writer.root.node.chain()]  # type: ignore[attr-defined]
        seed = self.chance.randrange(1 << 30)
        held = [next(iter(self.disks[name].random_states(1, seed))) for name in chain]
        possible = [set(tokens) for tokens in writer.possible]

        async def look() -> None:
            disks = [state.disk() for state in held]
            options: dict[str, Any] | None = None
            for disk in reversed(disks):
                file = {"driver": "crashing", "filename": disk.name}
                below, options = options, {"driver": "qcow2", "file": file}
                options["backing"] = below
            assert options is not None
            graph = Graph(registry())
            node = await open_options(graph, options, Flags(read_only=False))
            node.held = True
            found = await read(node, len(possible))
            for sector, tokens in enumerate(possible):
                assert found[sector] in map(pattern, tokens), (
                    f"sector {sector} after a crash: {found[sector][:8].hex()}, not of {tokens}; "
                    f"{[str(state) for state in held]}"
                )
            checked = await node.driver.check(frozenset())  # type: ignore[attr-defined]
            assert not checked.corruptions, checked.messages
            node.held = False
            await graph.release(node)

        self.crashes.append(look)


def _above(node: Node) -> set[Node]:
    return {node, *(edge.parent for edge in node.parents if edge.parent is not None)}


Live = tuple[Job, Callable[[], Awaitable[None]]]


async def mirror(world: World, writer: Writer, group: Group) -> Live | None:
    """A mirror to a new image, which sometimes fails."""
    chance = world.chance
    target, disk = await world.image("copy")
    options = MirrorOptions(
        granularity=chance.choice((0, 512, 16 * KIB)),
        copy_mode=chance.choice(("background", "write-blocking")),
    )
    job = await start_mirror(
        group, writer.root.node, target, options, identifier=world.name("mirror")
    )
    if chance.random() < 0.2:
        disk.fail(chance.randrange(1, 60))
    moment = _at_the_end(job, writer, disk)

    async def judge() -> None:
        if disk.failures:
            world.broken.add(target)
        disk.fail(0)
        if job._pivoted is None and job.error is None:
            await check(target, moment)

    return job, judge


async def active_commit(world: World, writer: Writer, group: Group) -> Live | None:
    """A commit of the layers above one of the chain."""
    top = writer.root.node
    below = top.chain()[1:]
    if not below:
        return None
    base = world.chance.choice(below)
    job = await start_active_commit(
        group, top, base, MirrorOptions(base=base), identifier=world.name("commit")
    )

    async def judge() -> None:
        assert base.busy is None or base.name not in world.daemon.graph.nodes

    return job, judge


def _at_the_end(job: Mirror, writer: Writer, disk: CrashingDisk) -> list[int]:
    """What was written when the last of it was copied; empty until then. No failure comes later: it
    would be the guest's.
    """
    moment: list[int] = []
    finish = job._background.finish

    async def finish_and_note() -> None:
        await finish()
        moment[:] = writer.now
        disk.fail(0)
        # Drained: no request is let in.
        found = await io.read(job.target.node, 0, SIZE)
        assert found == b"".join(map(pattern, moment)), job.id

    job._background.finish = finish_and_note  # type: ignore[method-assign]
    return moment


async def stream(world: World, writer: Writer, group: Group) -> Live | None:
    """What the layers down to one of the chain hold comes up."""
    top = writer.root.node
    layers = top.chain()
    lowest = world.chance.choice(layers)
    below = lowest.backing
    job = await start_stream(
        group, top, StreamOptions(lowest=lowest), identifier=world.name("stream")
    )

    async def judge() -> None:
        if job.error is None:
            assert layers[0].backing is below

    return job, judge


async def layer_commit(world: World, writer: Writer, group: Group) -> Live | None:
    """A commit below the layer that the guest writes to."""
    layers = writer.root.node.chain()
    if len(layers) < 3:
        return None
    lower = world.chance.randrange(2, len(layers))
    upper = world.chance.randrange(1, lower)
    top, base = layers[upper], layers[lower]
    job = await start_layer_commit(
        group, top, base, LayerCommitOptions(), identifier=world.name("commit")
    )

    async def judge() -> None:
        if job.error is None:
            assert layers[upper - 1].backing is base
            assert base.read_only

    return job, judge


async def backup(world: World, writer: Writer, group: Group) -> Live | None:
    """A backup to a new image, which sometimes fails."""
    chance = world.chance
    target, disk = await world.image("copy")
    sync = chance.choice(("full", "full", "none"))
    fails = chance.random() < 0.3
    policy = "break-snapshot" if fails else chance.choice(("break-snapshot", "break-guest-write"))
    options = BackupOptions(sync=sync, on_cbw_error=policy)
    async with edit.changing(world.daemon.graph):
        node = writer.root.node
        job = await place_backup(group, node, target, options, identifier=world.name("backup"))
        moment = list(writer.now)
    if fails:
        disk.fail(chance.randrange(1, 60))

    async def judge() -> None:
        if disk.failures:
            world.broken.add(target)
        disk.fail(0)
        if job.error is None:
            await check(target, moment)

    return job, judge


JOBS: list[Callable[[World, Writer, Group], Awaitable[Live | None]]] = [
    mirror, active_commit, stream, layer_commit, backup,
]  # fmt: skip
"""Every kind of job that runs beside a guest."""
