"""Changing what an image is: its version, its size, the width of its refcounts.

1. Everything that can be refused is refused before anything changes. Several changes are made one
   after the other; each leaves a valid image.
2. New refcount blocks and their table are written past the end of everything, counting themselves
   and the old ones, and are durable before one sector of the header names them with their width.
   Only then are the old ones given up. A crash leaks, at most.
3. Version 2 knows no zero clusters: before the header says so they are unallocated or hold zeros.
4. Nobody else uses the image meanwhile (``Driver.amend``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec.qcow2.entries import store_table
from blocklayer.codec.qcow2.geometry import MAX_REFCOUNT_TABLE_SIZE, Geometry
from blocklayer.codec.qcow2.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_FEATURE_NAMES,
    INCOMPATIBLE_DIRTY,
)
from blocklayer.codec.qcow2.refcounts import TYPECODES, encode_block
from blocklayer.drivers.crypto.options import (
    Keyslot,
    NewSecret,
    OldSecret,
    SlotChange,
    SlotTime,
    State,
    slot_change,
)
from blocklayer.drivers.qcow2 import flushing
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.extent import Kind
from blocklayer.graph.options import AmendOptions, Size
from blocklayer.units import MIB, align_up, is_power_of_two

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.driver import Qcow2Driver
    from blocklayer.drivers.qcow2.image import Image

Progress = Callable[[int, int], None]

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_CHUNK: Final = 16 * MIB
_NEWER: Final = "compatibility level 1.1 and above (use compat=1.1 or greater)"


class Qcow2AmendOptions(
    AmendOptions,
    rename={
        "encrypt_state": "encrypt.state",
        "encrypt_new_secret": "encrypt.new-secret",
        "encrypt_old_secret": "encrypt.old-secret",
        "encrypt_keyslot": "encrypt.keyslot",
        "encrypt_iter_time": "encrypt.iter-time",
    },
):
    """What can be asked to change; not all of it can change."""

    size: Annotated[Size | UnsetType, Meta(description="Virtual disk size")] = UNSET
    compat: Annotated[
        str | UnsetType, Meta(description="Compatibility level (v2 [0.10] or v3 [1.1])")
    ] = UNSET
    backing_file: Annotated[str | UnsetType, Meta(description="File name of a base image")] = UNSET
    backing_fmt: Annotated[str | UnsetType, Meta(description="Image format of the base image")] = (
        UNSET
    )
    data_file: Annotated[
        str | UnsetType, Meta(description="File name of an external data file")
    ] = UNSET
    data_file_raw: Annotated[
        bool | UnsetType, Meta(description="The external data file must stay valid as a raw image")
    ] = UNSET
    lazy_refcounts: Annotated[bool | UnsetType, Meta(description="Postpone refcount updates")] = (
        UNSET
    )
    refcount_bits: Annotated[
        int | UnsetType, Meta(description="Width of a reference count entry in bits")
    ] = UNSET
    encrypt_state: State = UNSET
    encrypt_new_secret: NewSecret = UNSET
    encrypt_old_secret: OldSecret = UNSET
    encrypt_keyslot: Keyslot = UNSET
    encrypt_iter_time: SlotTime = UNSET

    @property
    def slot_change(self) -> SlotChange | None:
        """What is to be done to key slots; None if nothing. Raises UsageError."""
        given = (
            self.encrypt_state,
            self.encrypt_new_secret,
            self.encrypt_old_secret,
            self.encrypt_keyslot,
            self.encrypt_iter_time,
        )
        return None if all(value is UNSET for value in given) else slot_change(*given)


async def amend(
    driver: Qcow2Driver, options: Qcow2AmendOptions, progress: Progress, *, force: bool = False
) -> None:
    """Change the image of ``driver`` as ``options`` say; ``force`` may erase its last key."""
    image = driver.image
    image.node.check_writable()
    version = _check(image, options)
    change = options.slot_change
    if change is not None:
        if driver.encryption is None:
            raise UsageError("Can't amend encryption options - encryption not present")
        await driver.encryption.amend(change, force=force)
    # Nothing is left in memory, so that header and tables can be changed in the file.
    async with image.lock:
        await flushing.write_all(image)
        await image.set_dirty(False)
        if version > image.header.version:
            await image.update_header(version=version)
        if options.lazy_refcounts is not UNSET and image.header.version > 2:
            bits = image.header.compatible_features & ~COMPATIBLE_LAZY_REFCOUNTS
            if options.lazy_refcounts:
                bits |= COMPATIBLE_LAZY_REFCOUNTS
            await image.update_header(compatible_features=bits)
        await _change_data_file(image, options)
    await driver.reload()
    if options.refcount_bits is not UNSET:
        order = options.refcount_bits.bit_length() - 1
        if order != driver.image.header.refcount_order:
            await _change_refcount_width(driver, order, progress)
    if options.size is not UNSET:
        await io.truncate(driver.node, options.size, shrink=True)
    if version < driver.image.header.version:
        await _downgrade(driver, progress)


def _check(image: Image, options: Qcow2AmendOptions) -> int:
    """The version that the image is to have. Raises UsageError or UnsupportedError."""
    header = image.header
    if options.backing_file is not UNSET or options.backing_fmt is not UNSET:
        raise UsageError("Cannot amend the backing file")
    if options.data_file is not UNSET and not header.has_data_file:
        raise UsageError("data-file can only be set for images that use an external data file")
    if options.data_file_raw is True and not header.data_file_raw:
        raise UsageError("data-file-raw cannot be set on existing images")
    version = header.version
    if options.compat is not UNSET:
        if options.compat not in _VERSIONS:
            raise UsageError(f"Unknown compatibility level {options.compat}")
        version = _VERSIONS[options.compat]
    bits = options.refcount_bits
    if bits is not UNSET and (not is_power_of_two(bits) or bits > 64):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3:
        if options.lazy_refcounts is True:
            raise UsageError(f"Lazy refcounts only supported with {_NEWER}")
        if bits not in (UNSET, 16):
            raise UsageError(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)"
            )
        if bits is UNSET and image.geometry.refcount_bits != 16:
            raise UsageError("compat=0.10 requires refcount_bits=16")
    if version < header.version:
        _check_downgrade(image)
    return version


async def _change_data_file(image: Image, options: Qcow2AmendOptions) -> None:
    """The name of the data file, which is not touched, and whether it is to stay a raw image."""
    changes: dict[str, str | int | None] = {}
    if options.data_file is not UNSET:
        changes["data_file"] = options.data_file or None
    if options.data_file_raw is False:
        changes["autoclear_features"] = image.header.autoclear_features & ~AUTOCLEAR_DATA_FILE_RAW
    if changes:
        await image.update_header(**changes)


def _check_downgrade(image: Image) -> None:
    if image.header.has_data_file:
        raise UnsupportedError("Cannot downgrade an image with a data file")
    features = image.header.incompatible_features & ~INCOMPATIBLE_DIRTY
    if features:
        raise UnsupportedError(
            f"Cannot downgrade an image with incompatible features {features:#x} set"
        )
    if image.snapshots:
        raise UnsupportedError("Internal snapshots prevent downgrade of image")
    if any(bitmap.persistent for bitmap in image.node.dirty_bitmaps.values()):
        raise UnsupportedError(
            "Persistent bitmaps prevent downgrade of image: remove them with 'bitmap --remove'"
        )


async def _downgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make the image one of version 2."""
    await _expand_zeros(driver, progress)
    image = driver.image
    async with image.lock:
        await flushing.write_all(image)
        await image.set_dirty(False)
        extensions = image.header.extensions
        await image.update_header(
            version=2,
            compatible_features=0,
            autoclear_features=0,
            extensions=[one for one in extensions if one.type != EXTENSION_FEATURE_NAMES],
        )
    await driver.reload()


async def _expand_zeros(driver: Qcow2Driver, progress: Progress) -> None:
    """Let no entry have the zero flag."""
    size, cluster_size = driver.size, driver.image.geometry.cluster_size
    shows = driver.node.backing is not None or bool(driver.image.header.backing_file)
    offset = 0
    while offset < size:
        extent = await driver.mapping.map(offset, min(size - offset, _CHUNK))
        length = align_up(extent.length, cluster_size)
        if extent.kind is Kind.ZERO and shows:
            await driver.writer.write_cluster(offset, io.zeros(length))
        elif extent.kind is Kind.ZERO:
            await driver.zeroer.drop(offset, length)
        offset += length
        progress(min(offset, size), size)


class _Layout:
    """Where new refcount blocks lie, side by side from cluster ``first`` on, then their table."""

    def __init__(self, geometry: Geometry, needed: set[int], first: int) -> None:
        self.first = first
        entries = geometry.refcount_block_entries
        self.tables = 0
        while True:
            # The structure counts itself, which may take further blocks.
            end = first + len(needed) + self.tables
            more = needed | set(range(first // entries, (end - 1) // entries + 1))
            tables = geometry.cluster_count((max(more) + 1) * 8)
            if (more, tables) == (needed, self.tables):
                break
            needed, self.tables = more, tables
        self.blocks = sorted(needed)
        self.end = end


async def _change_refcount_width(driver: Qcow2Driver, order: int, progress: Progress) -> None:
    """Write all refcounts anew, entries being ``1 << order`` bits, and switch to them."""
    image = driver.image
    new = Geometry.make(image.geometry.cluster_bits, refcount_order=order)
    async with image.lock:
        needed = await _blocks_needed(image, new)
        end = max(
            align_up(image.storage.size, new.cluster_size), await image.refcounts.end_of_use()
        )
        layout = _Layout(new, needed, end >> new.cluster_bits)
        if layout.tables << new.cluster_bits > MAX_REFCOUNT_TABLE_SIZE:
            raise UnsupportedError(
                f"Cannot change the refcount width of '{image.node.filename}': its refcount table "
                "would be too large"
            )
        await _write_structure(image, new, layout, progress)
        old = _structure(image)
        await image.update_header(
            refcount_table_offset=(layout.first + len(layout.blocks)) << new.cluster_bits,
            refcount_table_clusters=layout.tables,
            refcount_order=order,
        )
    await driver.reload()
    image = driver.image
    async with image.lock:
        for first, count in old:
            await image.refcounts.release(first, count)
        await flushing.write_all(image)
        await image.set_dirty(False)


async def _blocks_needed(image: Image, new: Geometry) -> set[int]:
    """Indexes of the blocks of geometry ``new`` that count anything. Raises UnsupportedError."""
    refcounts, span = image.refcounts, image.geometry.refcount_block_entries
    step = min(span, new.refcount_block_entries)
    needed: set[int] = set()
    await refcounts.load()
    for index in range(len(refcounts.table)):
        block = await refcounts.block(index)
        if block is None:
            continue
        highest = max(block.counts)
        if highest > new.refcount_max:
            at, count = next(
                (at, count) for at, count in enumerate(block.counts) if count > new.refcount_max
            )
            offset = (index * span + at) << new.cluster_bits
            raise UnsupportedError(
                f"Cannot decrease refcount entry width to {new.refcount_bits} bits: Cluster at "
                f"offset {offset:#x} has a refcount of {count}"
            )
        needed.update(
            (index * span + start) // new.refcount_block_entries
            for start in range(0, span, step)
            if any(block.counts[start : start + step])
        )
    return needed


async def _write_structure(
    image: Image, new: Geometry, layout: _Layout, progress: Progress
) -> None:
    """Write all blocks of the layout and the table; nothing names them yet."""
    entries, bits = new.refcount_block_entries, new.cluster_bits
    table = array("Q", bytes(layout.tables << bits))
    for number, index in enumerate(layout.blocks):
        base = index * entries
        counts = await _counts(image, base, new)
        for cluster in range(max(layout.first, base), min(layout.end, base + entries)):
            counts[cluster - base] = 1
        table[index] = (layout.first + number) << bits
        await image.storage.write(table[index], encode_block(counts, new.refcount_order))
        progress(number, len(layout.blocks))
    await image.storage.write((layout.first + len(layout.blocks)) << bits, store_table(table))
    await image.barrier()


async def _counts(image: Image, first: int, new: Geometry) -> array[int]:
    """The counts of one new block's clusters, from ``first`` on, as they are now."""
    span, total = image.geometry.refcount_block_entries, new.refcount_block_entries
    counts = array(TYPECODES[new.refcount_order])
    while len(counts) < total:
        index, at = divmod(first + len(counts), span)
        length = min(span - at, total - len(counts))
        block = await image.refcounts.block(index) if index < len(image.refcounts.table) else None
        part = block.counts[at : at + length].tolist() if block else [0] * length
        counts.extend(part)
    return counts


def _structure(image: Image) -> list[tuple[int, int]]:
    """(first, count) of the clusters that the refcount table and its blocks take."""
    bits, header = image.geometry.cluster_bits, image.header
    blocks = [
        (image.refcounts.block_offset(index) >> bits, 1)
        for index, entry in enumerate(image.refcounts.table)
        if entry
    ]
    return [(header.refcount_table_offset >> bits, header.refcount_table_clusters), *blocks]
