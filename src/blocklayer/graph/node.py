"""Nodes: one driver's instance in the graph, with its options, children and users.

1. A node is opened by ``graph.open`` and lives until its last parent is detached and the graph
   holds no reference of its own.
2. ``generation`` grows with every change of where guest bytes live, here or below; whatever was
   derived from the mapping (``graph.resolve``) is stale from then on.
3. ``watchers`` hear of every change of the node's bytes, from above or by a job, when it has ended
   and before whoever asked for it hears (``changed``), and of every change of its size.
4. After ``poison`` (an error that leaves memory and disk in doubt) writes are refused and reads go
   on (R4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.child import Child, Role
from blocklayer.graph.request import Claims

if TYPE_CHECKING:
    from blocklayer.graph.dirty_bitmap import DirtyBitmap
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.extent import Run
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.options import NodeOptions, Reference


class Flags(msgspec.Struct, kw_only=True):
    """The generic options in force, after inheritance from the parent."""

    read_only: bool = True
    auto_read_only: bool = False
    direct: bool = False
    no_flush: bool = False
    force_share: bool = False
    discard_unmap: bool = False
    detect_zeroes: str = "off"
    repair: bool = False
    """Opened to be checked or repaired: one that is marked dirty or corrupt is let in as it is."""
    one_pass: bool = False
    """Every place will be visited once, in order: caches beyond a little are a waste of memory."""
    named_by: str | None = None
    """The image on whose word the node is opened; None for what the user named."""
    metadata_only: bool = False
    """No guest data will be asked for: encrypted images are opened without their keys, and data
    files stay closed, unless it is for a check.
    """
    nesting: int = 0
    """How many formats inside formats lie above; a backing file is not inside its overlay."""

    inactive: bool = False
    """Another process has the image: nothing is written, and no locks are held."""

    def at_rest(self) -> Flags:
        """What holds while the node is inactive."""
        return msgspec.structs.replace(self, read_only=True, force_share=True)

    def inherited(self, role: Role) -> Flags:
        """What a child in ``role`` has where its own options are silent."""
        if role is Role.BACKING:
            return Flags(
                direct=self.direct,
                no_flush=self.no_flush,
                force_share=self.force_share,
                one_pass=self.one_pass,
                named_by=self.named_by,
                metadata_only=self.metadata_only,
                nesting=self.nesting,
                inactive=self.inactive,
            )
        return Flags(
            read_only=self.read_only,
            auto_read_only=self.auto_read_only,
            direct=self.direct,
            no_flush=self.no_flush,
            force_share=self.force_share,
            # What may be discarded is decided above; below, it is done.
            discard_unmap=True,
            one_pass=self.one_pass,
            named_by=self.named_by,
            metadata_only=self.metadata_only,
            nesting=self.nesting + 1,
            inactive=self.inactive,
        )


class Watcher(Protocol):
    """Who wants to hear of writes: a dirty bitmap, a mirror. Must not fail, and cannot wait."""

    def changed(self, offset: int, length: int) -> None:
        """A request to change the range has ended; if it failed, perhaps half way."""

    def resized(self, size: int) -> None:
        """The node has ``size`` bytes now."""


class Node:
    """One node of the graph. Made by ``graph.open`` only."""

    def __init__(self, graph: Graph, name: str, flags: Flags, options: NodeOptions) -> None:
        self.graph = graph
        self.name = name
        self.flags: Flags
        """The generic options in force."""
        self.wanted: Flags
        """The same, or while the node is inactive those that wait for it to be activated."""
        self.set_flags(flags)
        self.options = options
        self.driver: Driver
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.held = False
        """The graph keeps the node alive without a parent (added by name)."""
        self.taken = 0
        self.shared = 15
        self.generation = 0
        self.runs: list[Run] = []
        """Resolved runs of generation ``runs_generation``; owned by ``graph.resolve``."""
        self.runs_generation = -1
        self.gap: tuple[int, int, int, Node] = (-1, 0, 0, self)
        """Generation, start and end of a run that the node below shows; owned by ``resolve``."""
        self.claims = Claims()
        self.probed = False
        """The format was guessed, not told: the guard on sector 0 applies to raw."""
        self.overrides: dict[str, Any] = {}
        """The options that differ from what the plain file name alone would give."""
        self.poisoned: str | None = None
        self.busy: str | None = None
        """Why jobs and graph changes have to keep off it (a job works with it)."""
        self.given_up = False
        """What it shows is of no more use: a layer that was committed, a job's filter."""
        self.watchers: tuple[Watcher, ...] = ()
        self.dirty_bitmaps: dict[str, DirtyBitmap] = {}
        """Those with a name, oldest first; ``graph.bitmaps`` adds and removes them."""

    @property
    def size(self) -> int:
        """Bytes the node shows."""
        return self.driver.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.flags.read_only

    @property
    def active(self) -> bool:
        """Whether the image is ours to use now."""
        return not self.wanted.inactive

    def set_flags(self, flags: Flags) -> None:
        """From now on these hold; the driver has to be opened anew."""
        self.wanted = flags
        self.flags = flags.at_rest() if flags.inactive else flags

    @property
    def backing(self) -> Node | None:
        """The node that shows through where this one has nothing."""
        edge = self.children.get("backing")
        return edge.node if edge else None

    @property
    def filename(self) -> str:
        """What to call the node's image: a plain name, or a ``json:`` one that opens it."""
        from blocklayer.graph.filename import describe

        return describe(self)

    async def open_child(
        self,
        name: str,
        reference: Reference | None,
        role: Role = Role.STORAGE,
        *,
        named_by: str | None = None,
    ) -> Node:
        """Open or look up the child that ``reference`` stands for, and attach it.

        While a node is reopened its children are there already: they stay what they are.
        ``named_by`` is the image that names it, where it is not the user.
        """
        from blocklayer.graph.open import open_reference

        if name in self.children:
            return self.children[name].node
        if reference is None or reference == "":
            raise UsageError(f'A block device must be specified for "{name}"')
        flags = self.wanted.inherited(role)
        flags.named_by = named_by or flags.named_by
        node = await open_reference(self.graph, reference, flags)
        try:
            self.graph.attach(self, name, node, role)
        except BaseException:
            await self.graph.release(node)
            raise
        return node

    def mapping_changed(self) -> None:
        """Where guest bytes live has changed: forget what was resolved here and above."""
        pending = [self]
        while pending:
            node = pending.pop()
            node.generation += 1
            pending += [edge.parent for edge in node.parents if edge.parent is not None]

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` of changes from now on."""
        self.watchers = (*self.watchers, watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell it no more."""
        self.watchers = tuple(each for each in self.watchers if each is not watcher)

    def changed(self, offset: int, length: int) -> None:
        """A request to change the range has ended, well or not. Costly: ask ``watchers`` first."""
        for watcher in self.watchers:
            watcher.changed(offset, length)

    def resized(self) -> None:
        """The size may have changed."""
        size = self.size
        for watcher in self.watchers:
            watcher.resized(size)

    def poison(self, reason: str) -> None:
        """Refuse writes from now on."""
        if self.poisoned is None:
            self.poisoned = reason

    def check_writable(self) -> None:
        """Raise unless the node takes writes."""
        if self.flags.read_only:
            raise StorageError(f"Block node '{self.filename}' is read-only", 1, self.filename)
        if self.poisoned is not None:
            raise StorageError(f"Writes to '{self.filename}' are refused: {self.poisoned}", 5)

    def chain(self) -> list[Node]:
        """The layers of the image: this node and its backing nodes, from the top down.

        Filters hold nothing, and are left out.
        """
        from blocklayer.graph.filter import FilterDriver

        layers: list[Node] = []
        layer: Node | None = self
        while layer is not None:
            if isinstance(layer.driver, FilterDriver):
                layer = layer.driver.child
                continue
            layers.append(layer)
            layer = layer.backing
        return layers
