"""Creating VHDX images: log, block table, metadata, in this order behind the headers' MiB."""

from __future__ import annotations

import os
from array import array
from typing import Annotated, Literal

from msgspec import Meta

from blocklayer.codec.vhdx import structure
from blocklayer.codec.vhdx.structure import (
    ALIGNMENT,
    FILE_MAGIC,
    HEADER_OFFSETS,
    REGION_OFFSETS,
    STATE_FULLY_PRESENT,
    STATE_NOT_PRESENT,
    STATE_ZERO,
    Metadata,
    Regions,
    make_word,
)
from blocklayer.drivers.blocks import random_uuid
from blocklayer.drivers.tables import PAGE_SIZE, TableCache
from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions, Size
from blocklayer.units import MIB, SECTOR, align_up, div_up, is_power_of_two

_CREATOR = "blocklayer"
_PAGE_WORDS = PAGE_SIZE // 8


class VhdxCreateOptions(CreateOptions):
    """``-o`` of ``qemu-img create -f vhdx``."""

    size: Annotated[Size, Meta(description="Virtual disk size; max of 64TB.")] = 0
    log_size: Annotated[Size, Meta(description="Log size; min 1MB.")] = MIB
    block_size: Annotated[
        Size,
        Meta(
            description="Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image "
            "size."
        ),
    ] = 0
    subformat: Annotated[
        Literal["dynamic", "fixed"] | None,
        Meta(
            description="VHDX format type, can be either 'dynamic' or 'fixed'. Default is "
            "'dynamic'."
        ),
    ] = None
    block_state_zero: Annotated[
        bool | None,
        Meta(
            description="Force use of payload blocks of type 'ZERO'. Non-standard, but default.  "
            "Do not set to 'off' when using 'qemu-img convert' with subformat=dynamic."
        ),
    ] = None


def _plan(options: VhdxCreateOptions) -> tuple[Metadata, int]:
    """Metadata and size of the log; raises UsageError for what cannot be."""
    if options.size > structure.MAX_SIZE:
        raise UsageError("Image size too large; max of 64TB")
    if options.log_size == 0:
        raise UsageError("Log size must be a multiple of 1 MB")
    log_size = align_up(options.log_size, ALIGNMENT)
    if log_size >= structure.MAX_LOG_SIZE:
        raise UsageError("Log size must be smaller than 4 GB")
    block_size = options.block_size or structure.default_block_size(options.size)
    block_size = min(max(block_size, MIB), structure.MAX_BLOCK_SIZE)
    if not is_power_of_two(block_size):
        raise UsageError("Block size must be a power of two")
    metadata = Metadata(
        block_size=block_size,
        size=align_up(options.size, SECTOR),
        leave_blocks_allocated=options.subformat == "fixed",
        disk_id=random_uuid(),
    )
    return metadata, log_size


async def write_image(target: Node, options: VhdxCreateOptions) -> None:
    """Write a new image; the identifier that makes it one comes last."""
    metadata, log_size = _plan(options)
    table_offset = ALIGNMENT + log_size
    table_length = structure.table_length(metadata)
    regions = Regions(table_offset, table_length, table_offset + table_length, ALIGNMENT)
    start = regions.metadata_offset + regions.metadata_length
    fixed = options.subformat == "fixed"
    await io.truncate(target, start + (metadata.blocks * metadata.block_size if fixed else 0))
    await _write_table(target, metadata, regions, start if fixed else None, options)
    await io.write(target, regions.metadata_offset, structure.encode_metadata(metadata))
    for offset in REGION_OFFSETS:
        await io.write(target, offset, structure.encode_regions(regions))
    guids = os.urandom(32)
    for number, offset in enumerate(HEADER_OFFSETS, 1):
        header = structure.new_header(number, ALIGNMENT, log_size, guids)
        await io.write(target, offset, header.encode())
    await io.write(target, 0, FILE_MAGIC + _CREATOR.encode("utf-16-le"))


async def _write_table(
    target: Node,
    metadata: Metadata,
    regions: Regions,
    start: int | None,
    options: VhdxCreateOptions,
) -> None:
    """The block table: with ``start``, all blocks are there, one after another."""
    state = STATE_NOT_PRESENT if options.block_state_zero is False else STATE_ZERO
    if start is None and state == STATE_NOT_PRESENT:
        # The file is zeros as it is.
        return
    encode = TableCache(target, "Q", "little").encode
    for first in range(0, metadata.table_words, _PAGE_WORDS):
        count = min(_PAGE_WORDS, metadata.table_words - first)
        if start is None:
            words = _repeated(metadata, make_word(state), first, count)
        else:
            words = array("Q", (_stored(metadata, i, start) for i in range(first, first + count)))
        await io.write(target, regions.table_offset + 8 * first, encode(words))


def _repeated(metadata: Metadata, word: int, first: int, count: int) -> array[int]:
    """``count`` words of the table from ``first`` on: ``word`` for each block."""
    ratio = metadata.chunk_ratio
    chunk = array("Q", (word,)) * min(ratio, count + first % (ratio + 1)) + array("Q", (0,))
    skipped = first % (ratio + 1)
    return (chunk * (div_up(skipped + count, len(chunk))))[skipped : skipped + count]


def _stored(metadata: Metadata, index: int, start: int) -> int:
    """The table word at ``index`` where all blocks lie one after another from ``start`` on."""
    chunk, place = divmod(index, metadata.chunk_ratio + 1)
    if place == metadata.chunk_ratio:
        return 0
    block = chunk * metadata.chunk_ratio + place
    return make_word(STATE_FULLY_PRESENT, start + block * metadata.block_size)
