"""Putting jobs in place: what is checked, which filter goes where, what each side may do meanwhile.

1. All is checked before anything changes, and while nobody else changes the graph; a job that
   cannot begin leaves the graph as it was (R7).
2. A job's hold on a node does not follow when others move (``follows``), and edges that it relies
   on are frozen.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from blocklayer.drivers.copy_before_write import CopyBeforeWriteDriver
from blocklayer.errors import BlockError, LockedError, UsageError
from blocklayer.graph import edit, reopen
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.filter import FilterDriver
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission, refresh
from blocklayer.graph.root import Root
from blocklayer.jobs.backup import Backup, BackupOptions
from blocklayer.jobs.commit_active import ActiveCommit
from blocklayer.jobs.group import Group
from blocklayer.jobs.mirror import Mirror, MirrorOptions, granularity_for

READ = int(Permission.CONSISTENT_READ)
WRITE = int(Permission.WRITE)
UNCHANGED = int(Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED)


def check_top(node: Node) -> None:
    """Raise UsageError unless only users from outside the graph use ``node``."""
    if any(edge.parent is not None for edge in node.parents):
        raise UsageError("Need a root block node")


def check_free(node: Node) -> None:
    """Raise LockedError if a job has ``node`` to itself."""
    if node.busy:
        raise LockedError(f"Node '{node.name}' is busy: {node.busy}")


def layers_down_to(node: Node, lowest: Node) -> list[Node]:
    """The layers of ``node`` down to ``lowest``, free of jobs. Raises UsageError, LockedError."""
    chain = node.chain()
    if lowest not in chain:
        raise UsageError(f"Node '{lowest.name}' is not in a chain starting from '{node.name}'")
    layers = chain[: chain.index(lowest) + 1]
    for layer in layers:
        check_free(layer)
    return layers


def check_alone(top: Node, base: Node) -> None:
    """Raise LockedError if the base, or a layer between, is part of another chain as well."""
    path = {top}
    node = top
    while node is not base:
        node = node.children["file" if isinstance(node.driver, FilterDriver) else "backing"].node
        path.add(node)
    for node in path - {top}:
        for edge in node.parents:
            if edge.parent is not None and edge.parent not in path and not edge.parent.given_up:
                raise LockedError(
                    f"Node '{node.name}' is busy: node is used as {edge.name} hd of "
                    f"'{edge.parent.name}'"
                )


def in_use(job: str) -> str:
    """What is said of a node that a job works with."""
    return f"block device is in use by block job: {job}"


async def insert_filter(node: Node, driver: str, name: str | None, **options: Any) -> Node:
    """A new filter above ``node``, used by all who used the node; drained by the caller."""
    flags = Flags(read_only=node.flags.read_only, discard_unmap=True)
    wanted = {"driver": driver, "file": node.name, **options}
    if name is not None:
        wanted["node-name"] = name
    filter_node = await open_options(node.graph, wanted, flags)
    try:
        edit.insert_above(node, filter_node)
    except BaseException:
        await node.graph.release(filter_node)
        raise
    return filter_node


async def start_mirror(
    group: Group,
    node: Node,
    target: Node,
    options: MirrorOptions,
    *,
    backing: Node | None = None,
    filter_name: str | None = None,
    **job: Any,
) -> Mirror:
    """Enter a mirror of ``node`` to ``target`` in ``group``; ``job`` are the options of ``Job``.

    ``backing``, ``node`` itself or a layer of it, is to show through ``target`` from now on.
    """
    async with edit.changing(node.graph):
        _check_mirror(node, target, options)
        # A target that lies above the source has to let the source's users write to that.
        shared = int(Permission.ALL) if backing is node else UNCHANGED
        hold = Root(target, f"block job '{job['identifier']}'", WRITE, shared, follows=False)
        try:
            shown = edit.set_backing(target, backing) if backing is not None else None
            try:
                filter_node = await insert_filter(node, "mirror_top", filter_name)
            except BaseException:
                if shown is not None:
                    shown.undo()
                raise
        except BaseException:
            await hold.close()
            raise
        source = Root(node, f"block job '{job['identifier']}'", READ, follows=False)
        mirror = Mirror(source, hold, filter_node, options, **job)
        node.busy = target.busy = filter_node.busy = in_use(mirror.TYPE)
        group.add(mirror)
    return mirror


def _check_mirror(node: Node, target: Node, options: MirrorOptions) -> None:
    check_top(node)
    check_free(node)
    check_free(target)
    granularity_for(target, options)
    if target is node:
        raise UsageError("Can't mirror node into itself")
    if edit.reaches(node, target) or edit.reaches(target, node):
        raise UsageError(f"'{target.name}' is part of what is to be mirrored")
    if target.size != node.size:
        raise UsageError("Source and target image have different sizes")


async def start_active_commit(
    group: Group,
    top: Node,
    base: Node,
    options: MirrorOptions,
    *,
    filter_name: str | None = None,
    **job: Any,
) -> ActiveCommit:
    """Enter a commit of all layers from the active layer ``top`` down to above ``base``."""
    async with edit.changing(top.graph):
        check_top(top)
        layers_down_to(top, base)
        check_alone(top, base)
        was_read_only = base.flags.read_only
        await reopen.set_read_only(base, False)
        try:
            filter_node = await insert_filter(top, "mirror_top", filter_name, commits=True)
            try:
                # Everybody may read, and change, the base as it was: nobody above sees a
                # difference.
                hold = Root(
                    base, f"block job '{job['identifier']}'", WRITE | Permission.RESIZE,
                    follows=False,
                )  # fmt: skip
            except BaseException:
                edit.drop_filter(filter_node)
                await top.graph.release(filter_node)
                raise
        except BaseException:
            await reopen.set_read_only(base, was_read_only)
            raise
        source = Root(top, f"block job '{job['identifier']}'", READ, follows=False)
        commit = ActiveCommit(source, hold, filter_node, options, was_read_only, **job)
        filter_node.busy = in_use(commit.TYPE)
        group.add(commit)
    return commit


def check_backup(node: Node, target: Node, options: BackupOptions) -> None:
    """Raise BlockError unless a backup of ``node`` to ``target`` can begin."""
    if target is node:
        raise UsageError("Source and target cannot be the same")
    if options.compress and not _compresses(target):
        raise UsageError("Compression is not supported for this drive ")
    if options.bitmap is not None:
        options.bitmap.check()
        if options.bitmap.node is not node:
            raise UsageError(f"Bitmap '{options.bitmap.name}' is not one of '{node.name}'")
    check_free(node)
    check_free(target)
    if edit.reaches(node, target):
        raise UsageError(f"'{target.name}' is part of what is to be backed up")
    if target.size != node.size:
        raise UsageError("Source and target image have different sizes")


def _compresses(node: Node) -> bool:
    driver = node.driver
    return isinstance(driver, FormatDriver) and type(driver).pack is not FormatDriver.pack


async def start_backup(
    group: Group,
    node: Node,
    target: Node,
    options: BackupOptions,
    *,
    filter_name: str | None = None,
    **job: Any,
) -> Backup:
    """Enter a backup of ``node`` to ``target`` in ``group``; the moment it shows is now."""
    if options.bitmap is not None:
        await options.bitmap.load()
    async with edit.changing(node.graph):
        return await place_backup(group, node, target, options, filter_name=filter_name, **job)


async def place_backup(
    group: Group,
    node: Node,
    target: Node,
    options: BackupOptions,
    *,
    filter_name: str | None = None,
    **job: Any,
) -> Backup:
    """What ``start_backup`` does inside ``edit.changing``: for several at one moment.

    The bitmap is loaded. Undone by ``Backup.withdraw`` inside, or ``Group.discard`` outside.
    """
    check_backup(node, target, options)
    try:
        filter_node = await insert_filter(
            node, "copy-before-write", filter_name, target=target.name,
            **{"min-cluster-size": options.min_cluster_size},
        )  # fmt: skip
    except BlockError as error:
        raise error.reworded(f"Could not create node: {error}") from error
    label = f"block job '{job['identifier']}'"
    async with AsyncExitStack() as undo:
        undo.push_async_callback(node.graph.release, filter_node)
        undo.callback(edit.drop_filter, filter_node)
        _prepare_filter(filter_node, options)
        source = Root(node, label, READ, follows=False)
        undo.push_async_callback(source.close)
        # What the job writes, it writes in the filter's name.
        hold = Root(target, label, Permission.NONE, follows=False)
        undo.push_async_callback(hold.close)
        backup = Backup(source, hold, filter_node, options, **job)
        undo.pop_all()
    target.busy = in_use(backup.TYPE)
    group.add(backup)
    return backup


def _prepare_filter(filter_node: Node, options: BackupOptions) -> None:
    driver = filter_node.driver
    assert isinstance(driver, CopyBeforeWriteDriver)
    cluster_size = driver.point.cluster_size
    if 0 < options.max_chunk < cluster_size:
        raise UsageError(
            f"Required max-chunk ({options.max_chunk}) is less than backup cluster size "
            f"({cluster_size})"
        )
    if options.discard_source:
        driver.discards_source = True
        refresh(filter_node)
