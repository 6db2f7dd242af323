"""Creating images: storage first, then the format, then nothing half-made is left.

1. Everything that can be refused is refused before the target is touched.
2. A target that did not exist before is removed again when creation fails; one that existed and was
   truncated holds no header that a later open could take for an image.
3. An overlay's size, where none is given, is its backing image's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.filename import image_options, protocol_options, resolve_relative
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_image, open_options
from blocklayer.graph.options import CreateOptions, decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import MAX_SIZE

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph


async def create_image(
    graph: Graph,
    filename: str,
    format: str,
    options: Mapping[str, Any],
    *,
    size: int | None = None,
    backing: str | None = None,
    backing_format: str | None = None,
    check_backing: bool = True,
) -> CreateOptions:
    """Make a new image; the answer is every option as it took effect.

    ``options`` go by the names of ``-o``. ``check_backing`` False does not open the backing file,
    and then needs a size. Raises UsageError before the target is touched, other errors after.
    """
    decoded, storage_options = await prepare(
        graph, filename, format, options, size, backing, backing_format, check_backing
    )
    await write_image(graph, filename, format, decoded, storage_options)
    return decoded


async def write_image(
    graph: Graph,
    filename: str,
    format: str,
    options: CreateOptions,
    storage_options: Mapping[str, Any],
) -> None:
    """Make the image that ``prepare`` has worked out the options of."""
    driver = graph.registry.load_format(format)
    existed = os.path.lexists(filename)
    await _create_storage(graph, filename, storage_options)
    try:
        await _write_format(graph, filename, driver, options)
    except BaseException:
        if not existed:
            remove(filename)
        raise


async def prepare(
    graph: Graph,
    filename: str,
    format: str,
    options: Mapping[str, Any],
    size: int | None,
    backing: str | None,
    backing_format: str | None,
    check_backing: bool,
) -> tuple[CreateOptions, dict[str, Any]]:
    """Decode and complete the options of a new image, and those of its storage; touches nothing."""
    driver = graph.registry.load_format(format)
    if driver.CreateOptions is None:
        raise UsageError(f"Format driver '{format}' does not support image creation")
    values = {**options}
    if size is not None:
        values["size"] = size
    for option, given, what in (
        ("backing_file", backing, "Backing file"),
        ("backing_fmt", backing_format, "Backing format"),
    ):
        if given is not None:
            if option not in driver.CreateOptions.__struct_encode_fields__:
                raise UsageError(f"{what} not supported for file format '{format}'")
            values[option] = given
    own, below = _split(graph, filename, driver.CreateOptions, values)
    decoded = decode(driver.CreateOptions, own)
    name = getattr(decoded, "backing_file", None)
    if name:
        await _complete_from_backing(graph, filename, decoded, name, values, check_backing)
    elif "size" not in values and decoded.needs_size:
        raise UsageError("Image creation needs a size parameter")
    if decoded.size > MAX_SIZE:
        raise UsageError("Image size must be less than 8 EiB!")
    decoded.validate()
    for secret in decoded.secrets():
        # One that is missing must not cost the file that is there now.
        _ = graph.objects.secret(secret).passphrase
    return decoded, below


def _split(
    graph: Graph, filename: str, own: type[CreateOptions], values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the format's options from those that only its storage knows (``nocow``)."""
    protocol = graph.registry.load_protocol(
        str(protocol_options(filename, graph.registry)["driver"])
    )
    declared = protocol.CreateOptions
    below = set(declared.__struct_encode_fields__) if declared else set()
    below -= set(own.__struct_encode_fields__)
    for name in values:
        if name not in below and name not in own.__struct_encode_fields__:
            raise UsageError(f"Invalid parameter '{name}'")
    mine = {name: value for name, value in values.items() if name not in below}
    return mine, {name: value for name, value in values.items() if name in below}


async def _complete_from_backing(
    graph: Graph,
    filename: str,
    decoded: Any,
    name: str,
    values: Mapping[str, Any],
    check: bool,
) -> None:
    """Check that the backing image opens as the format that is named, and take its size."""
    if not decoded.backing_fmt:
        raise UsageError(
            f"Backing file specified without backing format: name it with -F "
            f"('{name}' is not opened to guess)"
        )
    graph.registry.load(decoded.backing_fmt)
    if name == filename:
        raise UsageError(
            f"Error: Trying to create an image with the same filename as the backing file '{name}'"
        )
    if not check:
        if "size" not in values:
            raise UsageError("Image creation needs a size parameter")
        return
    full = resolve_relative(filename, name)
    try:
        # Only its size is read: an image in use by others can get an overlay.
        node = await open_image(
            graph,
            full,
            format=decoded.backing_fmt,
            flags=Flags(force_share=True, metadata_only=True),
        )
        size = node.size
        await graph.release(node)
    except BlockError as error:
        raise error.reworded(f"{error}\nCould not open backing image.") from error
    if "size" not in values:
        decoded.size = size


async def _create_storage(graph: Graph, filename: str, options: Mapping[str, Any]) -> None:
    name = protocol_options(filename, graph.registry)
    protocol = graph.registry.load_protocol(str(name["driver"]))
    if protocol.CreateOptions is None:
        raise UsageError(f"Protocol driver '{protocol.NAME}' does not support image creation")
    path = name.get("filename", filename)
    await protocol.create(graph, path, decode(protocol.CreateOptions, {**options, "size": 0}))


async def _write_format(
    graph: Graph, filename: str, driver: type[FormatDriver], options: CreateOptions
) -> None:
    storage = image_options(filename, graph.registry, "raw")["file"]
    node = await open_options(graph, storage, Flags(read_only=False, discard_unmap=True))
    try:
        root = Root(
            node,
            "image creation",
            Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
            Permission.CONSISTENT_READ,
        )
    except BaseException:
        await graph.release(node)
        raise
    try:
        await driver.create(graph, node, options)
    finally:
        await root.close()


def remove(filename: str) -> None:
    """Take back a file that was made, as far as that is possible."""
    try:
        os.unlink(filename.removeprefix("file:"))
    except OSError:
        # It is the creation's own error that counts.
        return
