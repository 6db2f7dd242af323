"""Persistent dirty bitmaps: read when an image is opened, stored when it is closed.

1. Before an image that is open for writing takes its first change, all its bitmaps are marked as in
   use, durably (R5). Whoever finds that mark knows that the bits were not saved.
2. Bits are stored in new clusters, with a new table and directory; one write of one header sector
   then switches to them, and only after that is the old space given up (R1, R2). Bitmaps that have
   not changed keep their tables.
3. Bitmaps are vouched for by an autoclear bit. It is set only after the extension that it speaks of
   is durable, and cleared before that moves.
4. What this driver cannot use (not saved, or with extra data of a kind it does not know) stays as
   it is, marked as in use, until it is removed.
5. All methods but ``open`` and ``load`` need the image's lock.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.codec.qcow2 import bitmaps as codec
from blocklayer.codec.qcow2.bitmaps import BitmapEntry, BitmapsExtension
from blocklayer.codec.qcow2.entries import load_table, store_table
from blocklayer.codec.qcow2.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, Extension
from blocklayer.drivers.qcow2 import flushing, overlap
from blocklayer.errors import BlockError, FormatError, UnsupportedError
from blocklayer.graph import bitmaps as node_bitmaps
from blocklayer.graph.bits import Bits
from blocklayer.graph.dirty_bitmap import DirtyBitmap, length_for
from blocklayer.graph.driver import FormatDriver
from blocklayer.units import GIB, MIB, SECTOR

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image

_BATCH: Final = MIB
_MEMORY_MAX: Final = GIB
"""Bytes of bits that an image open for writing may bring along, all its bitmaps together."""


class Qcow2BitmapInfo(msgspec.Struct, frozen=True):
    """One bitmap as the image's directory has it; ``granularity`` in bytes."""

    flags: list[str]
    name: str
    granularity: int


class BitmapKeeper(FormatDriver):
    """What the graph asks of the driver about bitmaps."""

    image: Image
    stored_bitmaps: StoredBitmaps

    @property
    def stores_bitmaps(self) -> bool:
        """Version 3 has them."""
        return self.image.header.version >= 3

    def warnings(self) -> list[str]:
        """Bitmaps that a foreign writer has made worthless."""
        if not self.stored_bitmaps.stale:
            return []
        return [
            f"the bitmaps in '{self.node.filename}' cannot be used: a program without support for "
            "them has changed the image. Their space is given back by 'check -r leaks'"
        ]

    def check_bitmap_storable(self, name: str, granularity: int) -> None:
        """Images of version 3 hold bitmaps, within limits."""
        self.stored_bitmaps.check_storable(name, granularity)

    async def remove_stored_bitmap(self, name: str) -> None:
        """Take it out of the directory, and free its space."""
        async with self.image.lock:
            await self.stored_bitmaps.remove(name)


class StoredBitmaps:
    """The bitmaps that the file of one image holds."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.entries: dict[str, BitmapEntry] = {}
        """What the directory on file says, by name."""

    @property
    def stale(self) -> bool:
        """Whether there were bitmaps, and a writer which did not know them has been at work."""
        header = self._image.header
        vouched = header.autoclear_features & AUTOCLEAR_BITMAPS
        return not vouched and header.extension(EXTENSION_BITMAPS) is not None

    async def read_directory(self) -> None:
        """Learn what the file holds. Raises FormatError."""
        image, header = self._image, self._image.header
        data = header.extension(EXTENSION_BITMAPS)
        if data is None or self.stale:
            return
        try:
            extension = codec.decode_bitmaps_extension(data)
            codec.validate_bitmaps_extension(extension, header.cluster_size)
            place = extension.bitmap_directory_offset, extension.bitmap_directory_size
            directory = await image.storage.read(*place)
            entries = codec.decode_directory(directory, extension.nb_bitmaps)
            for entry in entries:
                codec.validate_entry(entry, image.geometry, header.size)
        except FormatError as error:
            raise FormatError(
                f"Could not read the bitmaps of '{image.node.filename}': {error}"
            ) from None
        self.entries = {entry.name: entry for entry in entries}
        image.bitmap_directory = place

    def attach(self) -> None:
        """Let the node have these bitmaps; bits are read later. A node that is opened anew has them
        already.
        """
        node = self._image.node
        for bitmap in node.dirty_bitmaps.values():
            bitmap.read_only = bitmap.persistent and node.flags.read_only
        for entry in self.entries.values():
            loader = partial(self._read_bits, entry, node.size)
            if entry.name in node.dirty_bitmaps:
                node.dirty_bitmaps[entry.name].reload_with(loader)
                continue
            bitmap = DirtyBitmap(
                node,
                entry.name,
                1 << entry.granularity_bits,
                enabled=entry.auto,
                persistent=True,
                loader=loader,
            )
            unknown = bool(entry.extra_data) and not entry.extra_data_compatible
            bitmap.inconsistent = entry.in_use or unknown
            bitmap.read_only = node.flags.read_only
            node_bitmaps.attach(bitmap)

    def become_read_only(self) -> None:
        """They are stored; nothing is written any more."""
        for bitmap in self._image.node.dirty_bitmaps.values():
            bitmap.read_only = bitmap.persistent

    async def become_writer(self) -> None:
        """Read all bits, and note in the file that they will change."""
        if not self.entries:
            return
        node = self._image.node
        total = sum(length_for(node.size, 1 << e.granularity_bits) for e in self.entries.values())
        if total > _MEMORY_MAX * 8:
            raise UnsupportedError(
                f"The bitmaps of '{node.filename}' would take {total >> 3} bytes of memory, more "
                f"than {_MEMORY_MAX}"
            )
        await node_bitmaps.load(node.dirty_bitmaps.values())
        async with self._image.lock:
            await self.mark_in_use()

    async def mark_in_use(self) -> None:
        """Note in the file that what it has of these bitmaps cannot be relied on."""
        await self._set_in_use(set(self.entries))

    async def _set_in_use(self, names: set[str]) -> None:
        """Let these bitmaps, and no others, be marked; each mark lies within one sector."""
        image = self._image
        entries = {
            name: msgspec.structs.replace(
                entry,
                flags=entry.flags & ~codec.FLAG_IN_USE | (codec.FLAG_IN_USE * (name in names)),
            )
            for name, entry in self.entries.items()
        }
        if entries == self.entries:
            return
        offset, length = image.bitmap_directory
        image.overlap.check(offset, length, own=overlap.BITMAP_DIRECTORY)
        await image.storage.write(offset, codec.encode_directory(entries.values()))
        await image.barrier()
        self.entries = entries

    async def _read_bits(self, entry: BitmapEntry, size: int) -> Bits:
        """What the file has of a bitmap of a disk of ``size`` bytes. Raises FormatError."""
        image, cluster_bits = self._image, self._image.geometry.cluster_bits
        bits = Bits(length_for(size, 1 << entry.granularity_bits))
        view = memoryview(bits.data)
        for index, (offset, ones) in enumerate(await self._read_table(entry)):
            part = view[index << cluster_bits : (index + 1) << cluster_bits]
            if offset >= image.storage.size:
                raise FormatError(
                    f"bitmap '{entry.name}' of '{image.node.filename}': its bits at host offset "
                    f"{offset:#x} lie past the end of the file"
                )
            if offset:
                await image.storage.read_into(offset, part)
            elif ones:
                part[:] = b"\xff" * len(part)
        view.release()
        bits.recount()
        return bits

    async def _read_table(self, entry: BitmapEntry) -> list[tuple[int, bool]]:
        image = self._image
        data = await image.storage.read(entry.bitmap_table_offset, entry.bitmap_table_size * 8)
        try:
            return [
                codec.decode_bitmap_table_entry(word, image.geometry) for word in load_table(data)
            ]
        except FormatError as error:
            raise FormatError(
                f"bitmap '{entry.name}' of '{image.node.filename}': {error}"
            ) from None

    def check_storable(self, name: str, granularity: int) -> None:
        """Raise UnsupportedError unless the file could hold one bitmap more."""
        image = self._image
        what = f"Can't make bitmap '{name}' persistent in '{image.node.filename}'"
        if image.header.version < 3:
            raise UnsupportedError(f"{what}: Cannot store dirty bitmaps in qcow2 v2 files")
        kept = [b for b in image.node.dirty_bitmaps.values() if b.persistent]
        if len(kept) >= codec.MAX_BITMAPS:
            raise UnsupportedError(f"{what}: Maximum number of persistent bitmaps is reached")
        directory = sum(_entry_size(bitmap.name or "") for bitmap in kept) + _entry_size(name)
        if directory > codec.MAX_DIRECTORY_SIZE:
            raise UnsupportedError(f"{what}: Not enough space in the bitmap directory")
        if not length_for(image.node.size, granularity):
            raise UnsupportedError(f"{what}: the disk has a size of 0 bytes")

    def info(self) -> list[Qcow2BitmapInfo]:
        """What the file says of its bitmaps."""
        names = (codec.FLAG_IN_USE, "in-use"), (codec.FLAG_AUTO, "auto")
        return [
            Qcow2BitmapInfo(
                [name for flag, name in names if entry.flags & flag],
                entry.name,
                1 << entry.granularity_bits,
            )
            for entry in self.entries.values()
        ]

    async def store(self) -> None:
        """The file is to hold what memory holds, none of it in use. All else is on file already."""
        kept = [b for b in self._image.node.dirty_bitmaps.values() if b.persistent]
        if not kept:
            if self.entries:
                await self._switch([], [])
            return
        # The original tool puts the newest of the new ones first; a copy of all keeps their order.
        kept.reverse()
        places = {name: place for place, name in enumerate(self.entries)}
        kept.sort(key=lambda bitmap: places.get(bitmap.name or "", len(places)))
        if all(bitmap.name in self.entries and not bitmap.modified for bitmap in kept):
            await self._set_in_use({b.name or "" for b in kept if b.inconsistent})
            return
        claimed: list[tuple[int, int]] = []
        try:
            entries = [await self._stored(bitmap, claimed) for bitmap in kept]
            await self._switch(entries, claimed)
        except BlockError as error:
            raise error.reworded(
                f"Lost persistent bitmaps of '{self._image.node.filename}': {error}"
            ) from error
        for bitmap in kept:
            bitmap.modified = False

    async def remove(self, name: str) -> None:
        """Take a bitmap out of the file."""
        if name in self.entries:
            left = [entry for entry in self.entries.values() if entry.name != name]
            await self._switch(left, [])

    async def _stored(self, bitmap: DirtyBitmap, claimed: list[tuple[int, int]]) -> BitmapEntry:
        """The entry for ``bitmap``, its bits and table written to space noted in ``claimed``."""
        old = self.entries.get(bitmap.name or "")
        if old is not None and bitmap.inconsistent:
            return msgspec.structs.replace(old, flags=old.flags | codec.FLAG_IN_USE)
        flags = codec.FLAG_AUTO if bitmap.enabled else 0
        if old is not None:
            flags |= old.flags & codec.FLAG_EXTRA_DATA_COMPATIBLE
            if not bitmap.modified:
                return msgspec.structs.replace(old, flags=flags)
        table = await self._write_bits(bitmap.all_bits(), claimed)
        return BitmapEntry(
            bitmap_table_offset=await self._write(store_table(table), claimed),
            bitmap_table_size=len(table),
            flags=flags,
            granularity_bits=bitmap.shift,
            name=bitmap.name or "",
            extra_data=old.extra_data if old else b"",
        )

    async def _write_bits(self, bits: Bits, claimed: list[tuple[int, int]]) -> array[int]:
        """Store bits cluster by cluster; the answer is the table of them."""
        image, size = self._image, self._image.geometry.cluster_size
        table = array("Q", bytes(8 * image.geometry.cluster_count(len(bits.data))))
        zeros, ones = bytes(size), b"\xff" * size
        waiting: list[int] = []
        for index in range(len(table)):
            part = bits.data[index * size : (index + 1) * size]
            if part == ones:
                table[index] = codec.ALL_ONES
            elif part != zeros[: len(part)]:
                waiting.append(index)
        while waiting:
            await image.prepare()
            first, count = await image.refcounts.allocator.allocate(
                min(len(waiting), max(1, _BATCH // size))
            )
            claimed.append((first, count))
            offset = first * size
            parts = [bits.data[index * size : (index + 1) * size] for index in waiting[:count]]
            for number, index in enumerate(waiting[:count]):
                table[index] = offset + number * size
            await self._fill(offset, b"".join(parts))
            del waiting[:count]
        return table

    async def _write(self, data: bytes, claimed: list[tuple[int, int]]) -> int:
        """Store ``data`` in one piece in new space: its host offset."""
        image = self._image
        await image.prepare()
        count = max(1, image.geometry.cluster_count(len(data)))
        first = await image.refcounts.allocator.allocate_exactly(count)
        claimed.append((first, count))
        await self._fill(first << image.geometry.cluster_bits, data)
        return first << image.geometry.cluster_bits

    async def _fill(self, offset: int, data: bytes) -> None:
        await self._image.storage.write(
            offset, data, bytes(-len(data) % self._image.geometry.cluster_size)
        )

    async def _switch(self, entries: list[BitmapEntry], claimed: list[tuple[int, int]]) -> None:
        """Let the header name a new directory of ``entries``, and give up what only the old names.

        ``claimed`` is what they take that is new.
        """
        image = self._image
        place, extension = (0, 0), None
        try:
            await image.prepare()
            freed = await self._unused(entries)
            if entries:
                data = codec.encode_directory(entries)
                place = await self._write(data, claimed), len(data)
                extension = BitmapsExtension(
                    nb_bitmaps=len(entries),
                    reserved=0,
                    bitmap_directory_size=len(data),
                    bitmap_directory_offset=place[0],
                ).pack()
            await flushing.write_refcounts(image)
            await image.barrier()
            await self._update_header(extension)
        except BaseException:
            await self._undo(claimed)
            raise
        old, image.bitmap_directory = image.bitmap_directory, place
        self.entries = {entry.name: entry for entry in entries}
        image.overlap.remove(overlap.BITMAP_DIRECTORY, *old)
        image.overlap.add(overlap.BITMAP_DIRECTORY, *place)
        for first, count in freed:
            await image.refcounts.release(first, count)
        await flushing.write_refcounts(image)
        await image.barrier()

    async def _undo(self, claimed: list[tuple[int, int]]) -> None:
        """After an error before the switch: what cannot be given back is leaked."""
        image = self._image
        if image.node.poisoned is not None:
            return
        with suppress(BlockError):
            for first, count in claimed:
                await image.refcounts.release(first, count)
            claimed.clear()
            await flushing.write_refcounts(image)

    async def _unused(self, entries: list[BitmapEntry]) -> list[tuple[int, int]]:
        """The (first, count) runs of clusters that the file's bitmaps take, and ``entries`` not."""
        geometry, guard = self._image.geometry, self._image.overlap
        bits, runs = geometry.cluster_bits, []
        kept = {entry.bitmap_table_offset for entry in entries}
        for entry in self.entries.values():
            if entry.bitmap_table_offset not in kept:
                table = await self._read_table(entry)
                runs += [(offset >> bits, 1) for offset, _ in table if offset]
                length = geometry.cluster_count(entry.bitmap_table_size * 8)
                runs.append((entry.bitmap_table_offset >> bits, length))
        for first, count in runs:
            # What a broken table names may be something else's.
            guard.check(first << bits, count << bits)
        if self.entries:
            offset, length = self._image.bitmap_directory
            guard.check(offset, length, own=overlap.BITMAP_DIRECTORY)
            runs.append((offset >> bits, geometry.cluster_count(length)))
        return runs

    async def _update_header(self, data: bytes | None) -> None:
        """Let the extension hold ``data``, and vouch for it; without data, have none."""
        image, header = self._image, self._image.header
        vouched = header.autoclear_features | AUTOCLEAR_BITMAPS
        unvouched = header.autoclear_features & ~AUTOCLEAR_BITMAPS
        extensions = self._extensions(data)
        if header.autoclear_features == vouched:
            place = header.extension_offset(EXTENSION_BITMAPS)
            if data is not None and place % SECTOR + len(data) <= SECTOR:
                await image.update_header(extensions=extensions)
                return
            await image.update_header(autoclear_features=unvouched)
        try:
            await image.update_header(extensions=extensions)
            if data is not None:
                await image.update_header(autoclear_features=vouched)
        except BaseException:
            # Nothing that the file has is vouched for any more: the next store writes all anew.
            self._forget()
            raise

    def _forget(self) -> None:
        self.entries = {}
        self._image.bitmap_directory = (0, 0)
        for bitmap in self._image.node.dirty_bitmaps.values():
            bitmap.modified = True

    def _extensions(self, data: bytes | None) -> list[Extension]:
        header = self._image.header
        copy = msgspec.structs.replace(header, extensions=list(header.extensions))
        copy.set_extension(EXTENSION_BITMAPS, data)
        return copy.extensions


def _entry_size(name: str) -> int:
    entry = BitmapEntry(bitmap_table_offset=0, bitmap_table_size=0, granularity_bits=0, name=name)
    return len(entry.encode())
