"""Convert: the guest's view of one or more images, written to another image of any format.

1. Several sources follow one another, each rounded up to whole sectors.
2. An overlay made to hold what the source's own top layer holds gets that, zeros as zeros; where
   that layer holds nothing, the overlay stays unallocated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

from blocklayer.errors import BlockError, UnsupportedError, UsageError
from blocklayer.graph import bitmaps
from blocklayer.graph.driver import FormatDriver
from blocklayer.graph.extent import Kind
from blocklayer.graph.filename import storage_of
from blocklayer.graph.node import Node
from blocklayer.graph.root import Root
from blocklayer.jobs.copying import Copier, CopyOptions
from blocklayer.jobs.plan import Piece, piece_of, pieces_within, source_runs
from blocklayer.units import SECTOR, align_down, align_up

COMPRESSED_AND_ENCRYPTED = "Compression and encryption not supported at the same time"


def total_size(sources: Sequence[Root]) -> int:
    """The size that a target for all of ``sources`` must have."""
    return sum(align_up(source.node.size, SECTOR) for source in sources)


def check_target(sources: Sequence[Root], target: Root, *, compress: bool) -> None:
    """Raise UsageError unless ``target`` can take ``sources``."""
    needed, size = total_size(sources), target.node.size
    if size < needed:
        raise UsageError(
            f"output file is smaller than input file: '{target.node.filename}' has {size} bytes, "
            f"{needed} are needed"
        )
    if compress and not supports_compression(type(target.node.driver)):
        raise UsageError("Compression not supported for this file format")
    known = target.node.driver.info()
    if compress and known is not None and known.encrypted:
        raise UsageError(COMPRESSED_AND_ENCRYPTED)


def supports_compression(driver: type[object]) -> bool:
    """Whether images of ``driver`` can hold compressed clusters."""
    if not issubclass(driver, FormatDriver):
        return False
    return driver.write_compressed is not FormatDriver.write_compressed


def reads_zero_when_new(target: Node, preallocation: str) -> bool:
    """Whether ``target``, just created, reads as zeros wherever nothing was written."""
    if target.backing is not None:
        return False
    if isinstance(target.driver, FormatDriver) and not target.driver.new_reads_zero:
        return False
    if storage_of(target).driver.NAME in ("file", "memory"):
        return True
    # A device keeps what it held; only space that is not mapped yet is known to be zero.
    relocates = isinstance(target.driver, FormatDriver) and target.driver.relocates
    return relocates and preallocation == "off"


def check_bitmaps(sources: Sequence[Root], *, skip_broken: bool) -> None:
    """Raise unless the bitmaps of the only source can be copied."""
    if len(sources) != 1:
        raise UsageError("Copying bitmaps only possible with single source")
    node = sources[0].node
    if not node.driver.stores_bitmaps:
        raise UnsupportedError("Source lacks bitmap support")
    for bitmap in reversed(node.dirty_bitmaps.values()):
        if bitmap.persistent and bitmap.inconsistent and not skip_broken:
            raise UsageError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'\n"
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            )


def check_bitmap_support(target: Node) -> None:
    """Raise UnsupportedError unless ``target`` can hold bitmaps."""
    if not target.driver.stores_bitmaps:
        raise UnsupportedError(f"Format driver '{target.driver.NAME}' does not support bitmaps")


async def copy_bitmaps(source: Node, target: Node, warn: Callable[[str], None]) -> None:
    """Give ``target`` the persistent bitmaps of ``source``, but for broken ones."""
    for bitmap in reversed(source.dirty_bitmaps.values()):
        name = bitmap.name or ""
        if not bitmap.persistent:
            continue
        if bitmap.inconsistent:
            warn(f"Skipping inconsistent bitmap '{name}'")
            continue
        try:
            made = bitmaps.add(
                target, name, granularity=bitmap.granularity, persistent=True, enabled=False
            )
        except BlockError as error:
            raise error.reworded(f"Failed to create bitmap {name}: {error}") from error
        try:
            await bitmap.load()
            made.merge(bitmap)
        except BlockError as error:
            raise error.reworded(f"Failed to populate bitmap {name}: {error}") from error
        if bitmap.enabled:
            made.enable()


async def convert(
    sources: Sequence[Root],
    target: Root,
    options: CopyOptions,
    *,
    top_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Copy ``sources``, one after the other, to ``target``, which is large enough.

    ``top_only``: the target's backing file stands for those of the only source, whose top layer is
    all that is copied. The answer is how many bytes of the target are done: written, or zeros.
    """
    copier = Copier(target, options, progress)
    pieces: AsyncIterator[Piece]
    if top_only:
        shown = 0 if target.node.backing is None else target.node.backing.size
        pieces = top_pieces(sources[0], shown)
        if options.compress:
            pieces = whole_units(pieces, sources[0], copier.unit)
    else:
        pieces = pieces_within(sources, 0, total_size(sources))
    await copier.copy(pieces)
    if options.compress:
        await target.write_compressed(0, b"")
    return copier.done


async def top_pieces(source: Root, shown: int) -> AsyncGenerator[Piece, None]:
    """What the top layer of ``source`` holds, over a backing file of ``shown`` bytes."""
    async for run, generation in source_runs(source, 0, source.node.size):
        if run.depth > 0 or not run.present:
            continue
        piece = piece_of(run, generation, source)
        if run.kind is Kind.ZERO and run.end > shown:
            # Past the end of the backing file there is nothing to hide with zeros.
            piece = piece.cut(run.offset, max(run.offset, shown))
        if piece.length:
            yield piece


async def whole_units(
    pieces: AsyncIterator[Piece], source: Root, unit: int
) -> AsyncGenerator[Piece, None]:
    """Fill up the units that ``pieces`` cover in part: compressed clusters are written whole."""
    done = 0
    size = source.node.size
    async for piece in pieces:
        start = max(align_down(piece.offset, unit), done)
        if done < start and done % unit:
            # The rest of the last unit, before the gap.
            end = min(align_up(done, unit), size, start)
            yield Piece(done, end - done, source, done)
            start = max(start, end)
        if start < piece.offset:
            yield Piece(start, piece.offset - start, source, start)
        yield piece
        done = piece.end
    end = min(align_up(done, unit), size)
    if done < end:
        yield Piece(done, end - done, source, done)
