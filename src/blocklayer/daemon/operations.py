"""Moving data between the layers of a chain in use: ``block-stream`` and ``block-commit``.

Arguments, defaults and texts are QEMU's. All is checked before anything changes.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from blocklayer.daemon.daemon import Daemon, DeviceNotFoundError
from blocklayer.daemon.job_control import check_speed, new_id
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.filename import resolve_relative
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Node
from blocklayer.jobs.background import Policies
from blocklayer.jobs.commit_layers import LayerCommitOptions
from blocklayer.jobs.group import Group
from blocklayer.jobs.headers import BackingName, stored_reference
from blocklayer.jobs.job import Job, OnError
from blocklayer.jobs.mirror import MirrorOptions
from blocklayer.jobs.starting import check_top, start_active_commit
from blocklayer.jobs.starting_layers import start_layer_commit, start_stream
from blocklayer.jobs.stream import StreamOptions


class JobOptions(msgspec.Struct, rename="kebab", kw_only=True, forbid_unknown_fields=True):
    """What all block jobs take; ``speed`` in bytes per second, 0: no limit."""

    job_id: str | None = None
    device: str
    speed: int = 0
    auto_finalize: bool = True
    auto_dismiss: bool = True


class LayerJobOptions(JobOptions, kw_only=True):
    """What jobs within one chain take: how the header is to call the new backing file."""

    backing_file: str | None = None
    backing_mask_protocol: bool = False
    on_error: OnError = "report"
    filter_node_name: str | None = None

    @property
    def name(self) -> BackingName:
        """How the header is to call the backing file."""
        return BackingName(filename=self.backing_file, mask_protocol=self.backing_mask_protocol)


class BlockStream(LayerJobOptions, kw_only=True):
    """Down to which layer: above ``base`` (a file), above ``base-node``, down to ``bottom``."""

    base: str | None = None
    base_node: str | None = None
    bottom: str | None = None


class BlockCommit(LayerJobOptions, kw_only=True):
    """From which layer down, and into which: by node, or by file."""

    base_node: str | None = None
    base: str | None = None
    top_node: str | None = None
    top: str | None = None


async def block_stream(daemon: Daemon, arguments: BlockStream) -> Job:
    """Begin to copy what layers below a node hold into it. Raises BlockError."""
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        if _given(arguments, one) and _given(arguments, other):
            raise UsageError(f"'{one}' and '{other}' cannot be specified at the same time")
    node = daemon.find(arguments.device)
    lowest = _lowest(daemon, node, arguments)
    if arguments.backing_file is not None and lowest.backing is None:
        raise UsageError("backing file specified, but streaming the entire chain")
    identifier = new_id(daemon, arguments.job_id, arguments.device)
    options = StreamOptions(lowest=lowest, name=arguments.name, on_error=arguments.on_error)
    group = Group(daemon.jobs)
    job = await start_stream(
        group, node, options, filter_name=arguments.filter_node_name, identifier=identifier,
        speed=check_speed(arguments.speed), auto_finalize=arguments.auto_finalize,
        auto_dismiss=arguments.auto_dismiss,
    )  # fmt: skip
    group.start()
    return job


def _given(arguments: BlockStream, name: str) -> bool:
    return getattr(arguments, name.replace("-", "_")) is not None


def _lowest(daemon: Daemon, node: Node, arguments: BlockStream) -> Node:
    """The lowest layer to be given up."""
    chain = node.chain()
    if arguments.bottom is not None:
        bottom = _node(daemon, arguments.bottom)
        if isinstance(bottom.driver, FilterDriver):
            raise UsageError(f"Node '{bottom.name}' is a filter, use a non-filter node as 'bottom'")
        if bottom not in chain:
            raise UsageError(
                f"Node '{bottom.name}' is not in a chain starting from '{arguments.device}'"
            )
        return bottom
    if arguments.base_node is not None:
        base = _node(daemon, arguments.base_node)
        layer = base.chain()[0]
        if base is node or layer not in chain[1:]:
            raise UsageError(f"Node '{base.name}' is not a backing image of '{arguments.device}'")
        return chain[chain.index(layer) - 1]
    if arguments.base is not None:
        return chain[chain.index(_by_file(chain, arguments.base)) - 1]
    return chain[-1]


async def block_commit(daemon: Daemon, arguments: BlockCommit) -> Job:
    """Begin to copy what layers hold into a lower one. Raises BlockError.

    From the active layer down the job gets ready, and moves users to the base when completed.
    """
    try:
        node = daemon.find(arguments.device)
    except UsageError:
        raise DeviceNotFoundError(f"Device '{arguments.device}' not found") from None
    check_top(node)
    chain = node.chain()
    top = _commit_top(daemon, chain, arguments)
    base = _commit_base(daemon, chain[chain.index(top) :], arguments)
    if top is base:
        raise UsageError("cannot commit an image into itself")
    active = top is chain[0]
    if active and arguments.backing_file is not None:
        raise UsageError("'backing-file' specified, but 'top' is the active layer")
    job: dict[str, Any] = {
        "identifier": new_id(daemon, arguments.job_id, arguments.device),
        "speed": check_speed(arguments.speed),
        "auto_finalize": arguments.auto_finalize,
        "auto_dismiss": arguments.auto_dismiss,
        "filter_name": arguments.filter_node_name,
    }
    group = Group(daemon.jobs)
    commit: Job
    if active:
        error = arguments.on_error
        mirror = MirrorOptions(
            base=base, policies=Policies(on_source_error=error, on_target_error=error)
        )
        commit = await start_active_commit(group, top, base, mirror, **job)
    else:
        options = LayerCommitOptions(name=arguments.name, on_error=arguments.on_error)
        commit = await start_layer_commit(group, top, base, options, **job)
    group.start()
    return commit


def _commit_top(daemon: Daemon, chain: list[Node], arguments: BlockCommit) -> Node:
    if arguments.top_node is not None:
        if arguments.top is not None:
            raise UsageError("'top-node' and 'top' are mutually exclusive")
        return _layer(daemon, chain, arguments.top_node)
    if arguments.top is None:
        return chain[0]
    try:
        return _by_file(chain, arguments.top, itself=True)
    except UsageError:
        raise UsageError(f"Top image file {arguments.top} not found") from None


def _commit_base(daemon: Daemon, chain: list[Node], arguments: BlockCommit) -> Node:
    if arguments.base_node is not None:
        if arguments.base is not None:
            raise UsageError("'base-node' and 'base' are mutually exclusive")
        return _layer(daemon, chain, arguments.base_node)
    if arguments.base is not None:
        return _by_file(chain, arguments.base)
    return chain[-1]


def _node(daemon: Daemon, name: str) -> Node:
    node = daemon.graph.nodes.get(name)
    if node is None:
        raise UsageError(f"Cannot find device='' nor node-name='{name}'")
    return node


def _layer(daemon: Daemon, chain: list[Node], name: str) -> Node:
    node = _node(daemon, name).chain()[0]
    if node not in chain:
        raise UsageError(f"'{name}' is not in this backing file chain")
    return node


def _by_file(chain: list[Node], name: str, *, itself: bool = False) -> Node:
    """The layer whose file is ``name``, as it was opened or as the layer above it says."""
    for above, layer in zip([None, *chain], chain, strict=False):
        if above is None:
            if itself and _same_file(name, layer.filename):
                return layer
            continue
        reference = stored_reference(above)
        if reference is not None and reference.filename == name:
            return layer
        try:
            relative = resolve_relative(above.filename, name)
        except BlockError:
            relative = name
        if _same_file(name, layer.filename) or _same_file(relative, layer.filename):
            return layer
    raise UsageError(f"Can't find '{name}' in the backing chain")


def _same_file(one: str, other: str) -> bool:
    if one == other:
        return True
    return not one.startswith("json:") and os.path.realpath(one) == os.path.realpath(other)
