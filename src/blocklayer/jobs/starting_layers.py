"""Putting jobs in place that move data between the layers of one chain: stream, and commit of
layers that no guest writes to.

All is checked before anything changes, and while nobody else changes the graph; a job that cannot
begin leaves the graph as it was (R7).
"""

from __future__ import annotations

from typing import Any, Final

from blocklayer.errors import UsageError
from blocklayer.graph import edit, reopen
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.node import Node
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.jobs.commit_layers import LayerCommit, LayerCommitOptions, overlays_of
from blocklayer.jobs.group import Group
from blocklayer.jobs.starting import (
    UNCHANGED,
    check_alone,
    check_free,
    insert_filter,
    layers_down_to,
)
from blocklayer.jobs.stream import Stream, StreamOptions

_COMMITS: Final = int(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE)
_NOBODY_READS: Final = int(Permission.WRITE | Permission.WRITE_UNCHANGED)


async def start_stream(
    group: Group,
    node: Node,
    options: StreamOptions,
    *,
    filter_name: str | None = None,
    **job: Any,
) -> Stream:
    """Enter a stream into ``node`` in ``group``; ``job`` are the options of ``Job``."""
    async with edit.changing(node.graph):
        check_free(node)
        top = layers_down_to(node, options.lowest)[0]
        if not isinstance(top.driver, FormatDriver):
            raise UsageError(f"'{top.name}' is no image: nothing can be streamed into it")
        was_read_only = top.flags.read_only
        await reopen.set_read_only(top, False)
        try:
            filter_node = await insert_filter(
                top, "copy-on-read", filter_name, bottom=options.lowest.name
            )
            root = Root(top, f"block job '{job['identifier']}'", UNCHANGED, follows=False)
        except BaseException:
            await reopen.set_read_only(top, was_read_only)
            raise
        stream = Stream(root, filter_node, options, was_read_only, **job)
        group.add(stream)
    return stream


async def start_layer_commit(
    group: Group,
    top: Node,
    base: Node,
    options: LayerCommitOptions,
    *,
    filter_name: str | None = None,
    **job: Any,
) -> LayerCommit:
    """Enter a commit of the layers from ``top`` down to above ``base``, below other layers."""
    label = f"block job '{job['identifier']}'"
    holds: list[Root] = []
    async with edit.changing(top.graph):
        for node in overlays_of(top):
            check_free(node)
        layers = layers_down_to(top, base)[:-1]
        check_alone(top, base)
        was_read_only = base.flags.read_only
        await reopen.set_read_only(base, False)
        try:
            filter_node = await insert_filter(top, "commit_top", filter_name)
            try:
                holds.extend(
                    Root(layer, label, Permission.NONE, _NOBODY_READS, follows=False)
                    for layer in layers
                )
                source = Root(top, label, Permission.NONE, follows=False)
                holds.append(source)
                hold = Root(base, label, _COMMITS, UNCHANGED, follows=False)
            except BaseException:
                for root in holds:
                    await root.close()
                edit.drop_filter(filter_node)
                await top.graph.release(filter_node)
                raise
        except BaseException:
            await reopen.set_read_only(base, was_read_only)
            raise
        commit = LayerCommit(source, hold, holds[:-1], filter_node, options, was_read_only, **job)
        group.add(commit)
    return commit
