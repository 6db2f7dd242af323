"""Creating VMDK disks of five kinds: in one sparse file, in one flat one, or in pieces of 2 GiB.

1. What can be refused is refused before a file is made; if one of several cannot be made, those
   before it are removed.
"""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

from msgspec import Meta

from blocklayer.codec.vmdk.descriptor import ExtentLine, format_descriptor
from blocklayer.codec.vmdk.sparse import (
    DESCRIPTOR_OFFSET,
    DESCRIPTOR_SIZE,
    MAX_TABLES,
    Layout,
    directory,
    new_header,
)
from blocklayer.drivers.tables import TableCache
from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.filename import protocol_options
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_options
from blocklayer.graph.options import CreateOptions, decode
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import GIB, SECTOR, align_up, div_up

_PIECE: Final = 2 * GIB
_TOOLS_VERSION: Final = "2147483647"
_DEFAULT = "monolithicSparse"


class VmdkCreateOptions(CreateOptions):
    """``-o`` of ``qemu-img create -f vmdk``."""

    adapter_type: Annotated[
        Literal["ide", "buslogic", "lsilogic", "legacyESX"] | None,
        Meta(
            description="Virtual adapter type, can be one of ide (default), lsilogic, buslogic or "
            "legacyESX"
        ),
    ] = None
    backing_file: Annotated[str | None, Meta(description="File name of a base image")] = None
    backing_fmt: Annotated[str | None, Meta(description="Must be 'vmdk' if present")] = None
    compat6: Annotated[bool, Meta(description="VMDK version 6 image")] = False
    hwversion: Annotated[str, Meta(description="VMDK hardware version")] = "undefined"
    toolsversion: Annotated[str | None, Meta(description="VMware guest tools version")] = None
    subformat: Annotated[
        Literal[
            "monolithicSparse",
            "monolithicFlat",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
            "streamOptimized",
        ]
        | None,
        Meta(
            description="VMDK flat extent format, can be one of {monolithicSparse (default) | "
            "monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} "
        ),
    ] = None
    zeroed_grain: Annotated[
        bool | None,
        Meta(description="Enable efficient zero writes using the zeroed-grain GTE feature"),
    ] = None


async def write_disk(
    graph: Graph, target: Node, options: VmdkCreateOptions, parent_cid: int
) -> None:
    """Write the disk; ``target`` is its descriptor or its only file."""
    subformat = options.subformat or _DEFAULT
    flat = subformat.endswith("Flat")
    if flat and options.backing_file:
        raise UsageError("Flat image can't have backing file")
    if flat and options.zeroed_grain:
        raise UsageError("Flat image can't enable zeroed grain")
    size = align_up(options.size, SECTOR)
    check_size(size)
    if subformat in ("monolithicSparse", "streamOptimized"):
        name = os.path.basename(target.filename)
        text = descriptor(options, [ExtentLine("RW", size // SECTOR, "SPARSE", name)], parent_cid)
        if len(text) > DESCRIPTOR_SIZE:
            raise UsageError("The backing file name is too long for a VMDK descriptor")
        await _write_sparse(target, size, options, text)
        return
    lines = _plan(target, size, split=subformat.startswith("twoGb"), flat=flat)
    text = descriptor(options, lines, parent_cid)
    await _write_extents(graph, target, lines, options)
    await io.truncate(target, len(text))
    await io.write(target, 0, text)


def check_size(size: int) -> None:
    """Raise UsageError if no disk can have ``size``."""
    if Layout(size // SECTOR).table_count > MAX_TABLES:
        raise UsageError("The image size is too large for file format 'vmdk': at most 128 TiB")


def _plan(target: Node, size: int, *, split: bool, flat: bool) -> list[ExtentLine]:
    """The extents of a disk in several files, named after its descriptor."""
    name = target.filename
    if name.startswith("json:"):
        raise UsageError("A VMDK in several files needs a plain file name")
    base, suffix = os.path.splitext(os.path.basename(name))
    kind = "FLAT" if flat else "SPARSE"
    if not split:
        return [ExtentLine("RW", size // SECTOR, kind, f"{base}-flat{suffix}")] if size else []
    letter = "f" if flat else "s"
    return [
        ExtentLine(
            "RW",
            min(_PIECE, size - index * _PIECE) // SECTOR,
            kind,
            f"{base}-{letter}{index + 1:03}{suffix}",
        )
        for index in range(div_up(size, _PIECE))
    ]


def descriptor(options: VmdkCreateOptions, lines: list[ExtentLine], parent_cid: int) -> bytes:
    """The descriptor of a disk made with ``options``. Raises UsageError."""
    if options.compat6 and options.hwversion != "undefined":
        raise UsageError("compat6 cannot be enabled with hwversion set")
    hardware = "6" if options.compat6 else "4"
    if options.hwversion != "undefined":
        hardware = options.hwversion
    return format_descriptor(
        cid=int.from_bytes(os.urandom(4), "little") & 0xFFFFFFFE,
        parent_cid=parent_cid,
        create_type=options.subformat or _DEFAULT,
        parent=options.backing_file,
        extents=lines,
        hardware_version=hardware,
        adapter_type=options.adapter_type or "ide",
        tools_version=options.toolsversion or _TOOLS_VERSION,
    )


async def _write_extents(
    graph: Graph, target: Node, lines: list[ExtentLine], options: VmdkCreateOptions
) -> None:
    folder, made = os.path.dirname(target.filename), []
    try:
        for line in lines:
            path = os.path.join(folder, line.filename)
            existed = os.path.lexists(path)
            await _write_extent(graph, path, line, options)
            if not existed:
                made.append(path)
    except BaseException:
        for path in made:
            os.unlink(path)
        raise


async def _write_extent(
    graph: Graph, path: str, line: ExtentLine, options: VmdkCreateOptions
) -> None:
    name = protocol_options(path if "/" in path else f"./{path}", graph.registry)
    protocol = graph.registry.load_protocol(str(name["driver"]))
    if protocol.CreateOptions is None:
        raise UsageError(f"Protocol driver '{protocol.NAME}' does not support image creation")
    size = line.sectors * SECTOR
    flat = line.type == "FLAT"
    created = decode(protocol.CreateOptions, {"size": size if flat else 0})
    await protocol.create(graph, path, created)
    if flat:
        return
    node = await open_options(graph, name, Flags(read_only=False))
    try:
        taken = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        root = Root(node, "image creation", taken, Permission.CONSISTENT_READ)
    except BaseException:
        await graph.release(node)
        raise
    try:
        await _write_sparse(node, size, options, b"")
    finally:
        await root.close()


async def _write_sparse(node: Node, size: int, options: VmdkCreateOptions, text: bytes) -> None:
    """An empty sparse extent: tables, then the descriptor, then the header that makes it one."""
    layout = Layout(size // SECTOR)
    await io.truncate(node, layout.end * SECTOR)
    encode = TableCache(node, "I", "little").encode
    for place in (layout.redundant, layout.directory):
        await io.write(node, place * SECTOR, encode(directory(layout, place)))
    await io.write(node, DESCRIPTOR_OFFSET, text.ljust(DESCRIPTOR_SIZE, b"\0"))
    header = new_header(
        layout,
        compressed=options.subformat == "streamOptimized",
        zeroed=bool(options.zeroed_grain),
    )
    await io.write(node, 0, header.pack())
