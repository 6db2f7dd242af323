"""``blockdev-reopen``: other options for nodes in use, several of them at once.

1. All nodes change, or none; users of a node notice nothing but what the options say.
2. What is not given goes back to its default. A child is given by a name (which may be another
   node's), by the options that its own node is to have from now on, or, for ``backing`` only, as
   null. An image that has or names a backing file must be told about ``backing``.
3. What a node *is* does not change: driver, file name, size of null storage.
4. A child that was opened by the node's own options takes over what the node hands down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET

from blocklayer.daemon.daemon import Daemon
from blocklayer.errors import LockedError, UsageError
from blocklayer.graph import edit
from blocklayer.graph.child import Child
from blocklayer.graph.driver import FormatDriver, ProtocolDriver
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import flags_of
from blocklayer.graph.options import NodeOptions, decode
from blocklayer.graph.reopen import Reopen, reopen

_FREE: Final = frozenset(NodeOptions.__struct_encode_fields__) - {"driver", "node-name"}
"""Options that every node may change."""
_STORAGE_FREE: Final = frozenset(("locking",))
"""Options that storage may change beside them; a format may change all of its own."""
_REPLACEABLE: Final = frozenset(("file", "backing"))


async def change(daemon: Daemon, wanted: Sequence[Mapping[str, Any]]) -> None:
    """Give nodes the options ``wanted``, each with a ``node-name``."""
    if not wanted:
        return
    nodes = [_named(daemon, options) for options in wanted]
    for node in nodes:
        if nodes.count(node) > 1:
            raise UsageError(f"Node '{node.name}' is given twice")
        if node.busy:
            raise LockedError(f"Node '{node.name}' is busy: {node.busy}")
    async with edit.changing(daemon.graph, *nodes):
        plan = _Plan(daemon)
        for node, options in zip(nodes, wanted, strict=True):
            plan.add(node, options, Flags(read_only=False))
        await reopen(list(plan.steps.values()))


def _named(daemon: Daemon, options: Mapping[str, Any]) -> Node:
    name = options.get("node-name")
    if not name:
        raise UsageError("node-name not specified")
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{name}'")
    return node


class _Plan:
    """What becomes of which node."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.steps: dict[Node, Reopen] = {}

    def add(self, node: Node, options: Mapping[str, Any], inherited: Flags) -> None:
        """``node`` is to have ``options``, and with it the children that it opened."""
        if options.get("driver") != node.driver.NAME:
            raise UsageError("Cannot change the option 'driver'")
        decoded = decode(type(node.driver).Options, options)
        decoded.node_name = node.options.node_name
        _check_unchanged(node, decoded)
        decoded.active = node.active
        if decoded.force_share is True and not node.wanted.force_share:
            raise UsageError("Cannot change the option 'force-share'")
        flags = _flags(node, decoded, inherited)
        step = self.steps[node] = Reopen(node, flags, decoded)
        step.children = {}
        for name in sorted(node.children.keys() | {"file", "backing"}):
            self._child(step, name, options)

    def _child(self, step: Reopen, name: str, options: Mapping[str, Any]) -> None:
        node = step.node
        edge = node.children.get(name)
        given = options.get(name, UNSET)
        if given is UNSET:
            if name == "backing" and _must_tell(node):
                raise UsageError(f"backing is missing for '{node.name}'")
            if edge is not None:
                self._inherit(step, edge)
            return
        if given is None or given == "":
            if name != "backing":
                raise UsageError(f'A block device must be specified for "{name}"')
            step.children[name] = None
            return
        if isinstance(given, str):
            self._named_child(step, name, edge, given)
            return
        if edge is None or edge.node.held or not isinstance(given, Mapping):
            member = next(iter(given), "driver")
            raise UsageError(f"Cannot change the option '{name}.{member}'")
        self.add(edge.node, given, step.flags.inherited(edge.role))

    def _named_child(self, step: Reopen, name: str, edge: Child | None, given: str) -> None:
        child = self._daemon.graph.nodes.get(given)
        if child is None:
            raise UsageError(f"Cannot find device='' nor node-name='{given}'")
        if edge is not None and edge.node is child:
            self._inherit(step, edge)
            return
        if name not in _REPLACEABLE:
            raise UsageError(f"Cannot change the option '{name}'")
        if name == "backing" and not step.node.driver.supports_backing:
            raise UsageError(f"Driver '{step.node.driver.NAME}' does not support backing files")
        step.children[name] = child

    def _inherit(self, step: Reopen, edge: Child) -> None:
        """The node at ``edge`` keeps its options; the parent's count where they are silent."""
        node = edge.node
        if node.held or node in self.steps:
            return
        flags = _flags(node, node.options, step.flags.inherited(edge.role))
        if flags == node.wanted:
            return
        below = self.steps[node] = Reopen(node, flags, node.options)
        below.children = {}
        for child in node.children.values():
            self._inherit(below, child)


def _flags(node: Node, options: NodeOptions, inherited: Flags) -> Flags:
    """What ``node`` is to have. What it was opened for, and by whom, stays."""
    now = node.wanted
    return msgspec.structs.replace(
        flags_of(options, inherited),
        named_by=now.named_by,
        nesting=now.nesting,
        metadata_only=now.metadata_only,
        one_pass=now.one_pass,
    )


def _must_tell(node: Node) -> bool:
    driver = node.driver
    if not isinstance(driver, FormatDriver) or not driver.supports_backing:
        return False
    return "backing" in node.children or driver.backing_reference is not None


def _check_unchanged(node: Node, wanted: NodeOptions) -> None:
    """Raise UsageError if ``wanted`` would make other storage of it."""
    if not isinstance(node.driver, ProtocolDriver):
        return
    free = _FREE | _STORAGE_FREE | {"driver", "node-name"}
    for field in msgspec.structs.fields(type(wanted)):
        name = field.encode_name
        now, then = getattr(node.options, field.name), getattr(wanted, field.name)
        if name in free or now == then:
            continue
        if field.default == then:
            raise UsageError(f"Option '{name}' cannot be reset to its default value")
        raise UsageError(f"Cannot change the option '{name}'")
