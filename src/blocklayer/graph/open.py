"""Opening: from names and options to nodes, one layer at a time, down the whole backing chain.

1. On any error nothing that was opened stays open, and the error says which layer failed.
2. A chain is opened top down in a loop, so its depth is bounded by the policy, not by the stack.
3. What an image names passes ``Policy.check`` before anything is opened (R8). A file that is met
   twice in one chain is a loop.
4. An image's format is probed only when nobody names it; then the node is marked ``probed``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from blocklayer.errors import BlockError, FormatError, PolicyError, UsageError
from blocklayer.graph.child import Role
from blocklayer.graph.driver import FormatDriver, ProtocolDriver
from blocklayer.graph.filename import (
    image_options,
    path_options,
    protocol_options,
    resolve_relative,
    scheme_of,
    storage_of,
)
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.options import NodeOptions, Reference, decode
from blocklayer.graph.registry import PROBE_SIZE

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph

_MAX_NESTING = 32
"""Formats inside formats that options, and images by the names they hold, may ask for."""


async def open_image(
    graph: Graph,
    image: str | Mapping[str, Any],
    *,
    format: str | None = None,
    flags: Flags | None = None,
    backing: bool = True,
) -> Node:
    """Open ``image`` (a name, ``json:{…}``, or options) as a node without parents.

    ``backing`` False leaves the backing chain closed: the node then shows zeros where it has
    nothing; good for metadata only. The caller attaches a root, or gives the node back with
    ``graph.release``.
    """
    options = image_options(image, graph.registry, format) if isinstance(image, str) else {**image}
    if format is not None and not isinstance(image, str):
        options.setdefault("driver", format)
    with _limits(graph):
        return await open_options(graph, options, flags or Flags(), backing=backing)


@contextmanager
def _limits(graph: Graph) -> Iterator[None]:
    """The time while an image is opened; those opened side by side share the policy's limits."""
    budget = graph.budget = graph.budget or graph.policy.budget()
    if budget is None:
        yield
        return
    budget.users += 1
    try:
        yield
    finally:
        budget.users -= 1
        if not budget.users:
            graph.budget = None


async def open_reference(graph: Graph, reference: Reference, inherited: Flags) -> Node:
    """The storage that ``reference`` stands for: an existing node by name, or a new one.

    A plain file name in it is a protocol's: the format inside is the parent's, and is not guessed.
    """
    if isinstance(reference, str):
        if inherited.named_by is not None:
            graph.policy.check_node(inherited.named_by, reference)
        return graph.find(reference)
    if not isinstance(reference, Mapping):
        raise UsageError(f"A node is given by its name or its options, not by '{reference}'")
    if reference.get("driver") is None and "filename" in reference:
        name = _plain_name(reference)
        reference = {**reference, **protocol_options(name, graph.registry)}
    return await open_options(graph, reference, inherited)


def _plain_name(options: Mapping[str, Any]) -> str:
    name = options["filename"]
    if not isinstance(name, str):
        raise UsageError(f"A file name must be text, not '{name}'")
    if name.startswith("json:"):
        raise UsageError("A json: name cannot be given as the file name of a node's storage")
    return name


async def open_options(
    graph: Graph, options: Mapping[str, Any], inherited: Flags, *, backing: bool = True
) -> Node:
    """Open a node from nested ``options``, and its backing chain unless ``backing`` is False."""
    _check_nesting(options)
    if inherited.nesting >= _MAX_NESTING:
        raise PolicyError(f"Images nest more than {_MAX_NESTING} levels of formats inside formats")
    node = await _open_one(graph, options, inherited)
    if backing:
        try:
            await _open_chain(graph, node)
        except BaseException:
            await graph.release(node)
            raise
    return node


def _check_nesting(options: Mapping[str, Any]) -> None:
    pending: list[tuple[Mapping[str, Any], int]] = [(options, 0)]
    while pending:
        members, depth = pending.pop()
        if depth > _MAX_NESTING:
            raise UsageError(f"Options nest more than {_MAX_NESTING} levels of nodes")
        pending += [(m, depth + 1) for m in members.values() if isinstance(m, Mapping)]


async def _open_one(graph: Graph, options: Mapping[str, Any], inherited: Flags) -> Node:
    """Open one node and its storage, without its backing chain."""
    options = {**options}
    storage: Node | None = None
    was_held = False
    name = options.get("driver")
    if name is None and "filename" in options:
        options = _named_image(graph, options)
        name = options.get("driver")
    if name is None:
        storage, name, was_held = await _probe(graph, options, inherited)
        options["driver"] = name
    try:
        driver = graph.registry.load(str(name))
        if "filename" in options and not issubclass(driver, ProtocolDriver):
            options = _with_storage(graph, options)
        if storage is not None:
            options["file"] = storage.name
        decoded = decode(driver.Options, options)
        node = Node(graph, graph.new_name(decoded.node_name), flags_of(decoded, inherited), decoded)
        node.probed = storage is not None
        node.driver = driver(node)
        _check_policy(graph, node, decoded)
        graph.nodes[node.name] = node
        await _open_driver(node)
        await _check_size(graph, node)
    except BaseException:
        if storage is not None:
            storage.held = was_held
            await graph.release(storage)
        raise
    if storage is not None:
        storage.held = was_held
    return node


def _named_image(graph: Graph, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` of an image without a driver, their file name replaced by what it stands for."""
    name = options["filename"]
    if not isinstance(name, str) or not name.startswith("json:"):
        return _with_storage(graph, options)
    rest = {key: value for key, value in options.items() if key != "filename"}
    meant = image_options(name, graph.registry)
    twice = sorted(rest.keys() & meant.keys())
    if twice:
        raise UsageError(f"Option '{twice[0]}' is given twice, once in '{name}'")
    return {**meant, **rest}


def _with_storage(graph: Graph, options: dict[str, Any]) -> dict[str, Any]:
    """``driver=qcow2,filename=x`` is short for a file child of that name."""
    if "file" in options:
        raise UsageError("Give an image either a filename or a file, not both")
    rest = {key: value for key, value in options.items() if key != "filename"}
    return {**rest, "file": protocol_options(_plain_name(options), graph.registry)}


def _check_policy(graph: Graph, node: Node, options: NodeOptions) -> None:
    image = node.flags.named_by
    if isinstance(node.driver, FormatDriver):
        graph.policy.check_format(node.driver.NAME)
    elif image is not None and isinstance(node.driver, ProtocolDriver):
        filename = getattr(options, "filename", None)
        graph.policy.check_storage(image, node.driver.NAME, filename)


async def _check_size(graph: Graph, node: Node) -> None:
    try:
        if isinstance(node.driver, FormatDriver):
            graph.policy.check_size(node.filename, node.size)
    except PolicyError:
        await graph.release(node)
        raise


async def _open_driver(node: Node) -> None:
    try:
        await node.driver.open()
    except BaseException:
        # What the driver did not open it need not close: detach, do not call close().
        children = list(node.children.values())
        del node.graph.nodes[node.name]
        node.children.clear()
        for edge in children:
            edge.node.parents.remove(edge)
            await node.graph.release(edge.node)
        raise


async def _probe(
    graph: Graph, options: Mapping[str, Any], inherited: Flags
) -> tuple[Node, str, bool]:
    """Open the storage of an image of unknown format and guess the format from its first bytes.

    The storage is held until the format node is its parent; the last answer is what ``held`` was.
    """
    if not graph.policy.probing:
        raise PolicyError("The policy forbids guessing an image's format: name it")
    reference = options.get("file")
    if reference is None:
        raise UsageError("Must specify either driver or file")
    flags = flags_of(decode(NodeOptions, _generic(options)), inherited)
    storage = await open_reference(graph, reference, flags.inherited(Role.STORAGE))
    was_held, storage.held = storage.held, True
    try:
        head = bytearray(min(PROBE_SIZE, storage.size))
        from blocklayer.graph import io

        await io.read_into(storage, 0, memoryview(head))
    except BaseException:
        storage.held = was_held
        await graph.release(storage)
        raise
    return storage, graph.registry.probe(bytes(head), storage.filename), was_held


def _generic(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {"node-name", "read-only", "auto-read-only", "force-share", "discard"}
    known |= {"detect-zeroes", "cache", "active"}
    return {name: value for name, value in options.items() if name in known}


def flags_of(options: NodeOptions, inherited: Flags) -> Flags:
    """The generic options in force: what is given, else what the parent hands down.

    Raises UsageError if they do not go together.
    """

    def chosen(given: Any, otherwise: Any) -> Any:
        return otherwise if given is UNSET else given

    unmap = inherited.discard_unmap
    flags = Flags(
        read_only=chosen(options.read_only, inherited.read_only),
        auto_read_only=chosen(options.auto_read_only, inherited.auto_read_only),
        direct=chosen(options.cache.direct, inherited.direct),
        no_flush=chosen(options.cache.no_flush, inherited.no_flush),
        force_share=chosen(options.force_share, inherited.force_share),
        discard_unmap=unmap if options.discard is UNSET else options.discard == "unmap",
        detect_zeroes=chosen(options.detect_zeroes, inherited.detect_zeroes),
        repair=inherited.repair,
        one_pass=inherited.one_pass,
        named_by=inherited.named_by,
        inactive=inherited.inactive if options.active is UNSET else not options.active,
        metadata_only=inherited.metadata_only,
        nesting=inherited.nesting,
    )
    if flags.force_share and not flags.read_only:
        raise UsageError("force-share=on can only be used with read-only images")
    if flags.detect_zeroes == "unmap" and not flags.discard_unmap:
        raise UsageError("setting detect-zeroes to unmap is not allowed without discard=unmap")
    return flags


async def _open_chain(graph: Graph, top: Node) -> None:
    """Open the backing nodes of ``top``, one below the other."""
    seen = {_identity(top)} - {None}
    layer, depth = top, 1
    while True:
        below = await _open_backing(graph, layer, seen)
        if below is None:
            return
        depth += 1
        try:
            graph.policy.check_depth(top.filename, depth)
            identity = _identity(below)
            _check_loop(identity, seen, below.filename)
            seen.add(identity)
            graph.attach(layer, "backing", below, Role.BACKING)
        except BaseException:
            await graph.release(below)
            raise
        if "backing" in below.children:
            # An existing node given by name: its chain stands already.
            return
        layer = below


def _check_loop(identity: object | None, seen: set[object | None], name: object) -> None:
    if identity is not None and identity in seen:
        raise FormatError(f"Backing file '{name}' creates an infinite loop.")


def _identity(node: Node) -> object | None:
    driver = storage_of(node).driver
    return driver.identity() if isinstance(driver, ProtocolDriver) else None


def _identity_of(graph: Graph, storage: object) -> object | None:
    """The identity of storage that is not open yet, as far as its options tell it."""
    if not isinstance(storage, Mapping) or "driver" not in storage:
        return None
    driver = graph.registry.load(str(storage["driver"]))
    return driver.identity_of(storage) if issubclass(driver, ProtocolDriver) else None


async def _open_backing(graph: Graph, node: Node, seen: set[object | None]) -> Node | None:
    """Open the node below ``node``, from its options or from what its image says; without chain.

    ``seen`` are the identities of the layers above.
    """
    driver = node.driver
    if not isinstance(driver, FormatDriver) or not driver.supports_backing:
        return None
    given = getattr(node.options, "backing", UNSET)
    if given is None or given == "":
        return None
    if isinstance(given, str):
        return graph.find(given)
    options: dict[str, Any] = {} if given is UNSET else {**given}
    flags = node.wanted.inherited(Role.BACKING)
    if "file" not in options and "filename" not in options:
        reference = driver.backing_reference
        if reference is None:
            if options:
                raise UsageError(f"'{node.filename}' has no backing file to give options for")
            return None
        options = _named_backing(graph, node, reference.filename, reference.format, options)
        flags.named_by = node.filename
        # Before it is opened: its lock would be in our own way, and that would be the message.
        _check_loop(_identity_of(graph, options.get("file")), seen, reference.filename)
    try:
        return await _open_one(graph, options, flags)
    except BlockError as error:
        raise error.reworded(f"Could not open backing file: {error}") from error


def data_file_options(node: Node, name: str) -> dict[str, Any]:
    """Options for the storage of the data file ``name`` that ``node``'s image names.

    The name is a path, whatever it looks like: an image cannot make us speak a protocol with it,
    or choose options. A relative one starts at the current folder, as in QEMU.
    """
    node.graph.policy.check(node.filename, "data file", name, local=True)
    return path_options(name)


def _named_backing(
    graph: Graph, node: Node, name: str, format: str | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """Options for the backing file that ``node``'s image names."""
    image = node.filename
    full = name if name.startswith("json:") else resolve_relative(storage_of(node).filename, name)
    local = not full.startswith("json:") and scheme_of(full) in (None, "file")
    graph.policy.check(image, "backing file", full.removeprefix("file:"), local=local)
    wanted = str(extra["driver"]) if "driver" in extra else format
    if wanted is None and not graph.policy.probing:
        raise PolicyError(f"'{image}' does not name its backing file's format, and guessing is off")
    return {**image_options(full, graph.registry, wanted), **extra}
