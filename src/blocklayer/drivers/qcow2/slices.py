"""The cache of L2 tables, in slices: native arrays of entries, and which are to be written.

With extended L2 entries, each entry has its subcluster bitmap beside it, in an array of its own.

1. A slice is known by its number in the guest's address space, wherever its table lies.
2. Looking one up may read it, and drop others that are clean, but never writes: so ``map`` needs no
   lock. Slices become dirty only in ``modify``, with the image's lock held; that keeps one slice's
   room free of dirty ones, writing back if it must.
3. An object from ``get`` or ``modify`` is the current one until the caller's next await.
4. Two lookups of one slice read it once.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import COMPRESSED
from blocklayer.codec.qcow2.subclusters import load_l2_table, store_l2_table
from blocklayer.drivers.qcow2 import overlap
from blocklayer.units import KIB

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.geometry import Geometry
    from blocklayer.drivers.qcow2.image import Image


_READ_AHEAD: Final = 64 * KIB
"""Bytes of a table that are read at once when it is gone through in order."""


class Slice:
    """Consecutive entries of one L2 table."""

    __slots__ = ("_run_end", "_run_start", "bitmaps", "checked", "dirty", "entries", "used")

    def __init__(self, entries: array[int], bitmaps: array[int] | None = None) -> None:
        self.entries = entries
        self.bitmaps = bitmaps
        self.dirty = False
        self.used = True
        self.checked = 0
        """The version of the overlap checks that the entries passed."""
        self._run_start = self._run_end = 0

    @classmethod
    def empty(cls, count: int, geometry: Geometry) -> Slice:
        """``count`` entries that hold nothing."""
        return cls(*load_l2_table(bytes(count * geometry.l2_entry_size), geometry))

    def part(self, index: int, count: int) -> tuple[array[int], array[int] | None]:
        """``count`` entries from ``index`` on, and their bitmaps if there are any."""
        stop = index + count
        return self.entries[index:stop], self.bitmaps and self.bitmaps[index:stop]

    def put(self, index: int, entries: array[int], bitmaps: array[int] | None) -> None:
        """Replace the entries from ``index`` on, and their bitmaps if there are any."""
        self.entries[index : index + len(entries)] = entries
        if self.bitmaps is not None:
            assert bitmaps is not None
            self.bitmaps[index : index + len(entries)] = bitmaps
        self.checked = 0
        self._run_start = self._run_end = 0

    def ends_at(self, index: int, step: int) -> bool:
        """Whether the run ends with entry ``index``, as seen in this slice."""
        entries = self.entries
        return index + 1 < len(entries) and entries[index + 1] != entries[index] + step

    def run_end(self, index: int, step: int) -> int:
        """Where the run from ``index`` on ends: entries that grow by ``step`` each (0: equal).

        Their bitmaps are equal, too.
        """
        if self._run_start <= index < self._run_end:
            return self._run_end
        end = _run_end(self.entries, index, step)
        if self.bitmaps is not None and end > index + 1:
            end = min(end, _run_end(self.bitmaps, index, 0))
        self._run_start, self._run_end = index, end
        return end

    def compressed_end(self, index: int, limit: int) -> int:
        """Where compressed entries from ``index`` on end, ``limit`` at most."""
        entries = self.entries
        while index < limit and entries[index] & COMPRESSED:
            index += 1
        return index


_ZEROS: Final = re.compile(rb"\0*")


def _run_end(entries: array[int], start: int, step: int) -> int:
    """Widen the run in growing strides, each compared as a whole, then narrow the miss down."""
    good, total, stride = start + 1, len(entries), 1
    if not entries[start]:
        # By far the most frequent run of more than one entry, and the pattern is searched in C.
        zeros = _ZEROS.match(entries, start * entries.itemsize)
        assert zeros is not None
        return zeros.end() // entries.itemsize
    while good < total:
        bad = min(total, good + stride)
        if _goes_on(entries, start, step, good, bad):
            good = bad
            stride *= 8
            continue
        while bad - good > 1:
            middle = (good + bad) // 2
            if _goes_on(entries, start, step, good, middle):
                good = middle
            else:
                bad = middle
        return good
    return total


def _goes_on(entries: array[int], start: int, step: int, begin: int, end: int) -> bool:
    """Whether ``entries[begin:end]`` go on from ``entries[start]``, ``step`` more each."""
    first = entries[start] - start * step
    # The last entry betrays nearly every run that ends before it.
    if entries[end - 1] != first + (end - 1) * step:
        return False
    if step:
        wanted = array("Q", range(first + begin * step, first + end * step, step))
    else:
        wanted = array("Q", (first,)) * (end - begin)
    return entries[begin:end] == wanted


class SliceCache:
    """Slices of the active L2 tables, at most ``settings.slices_max``."""

    def __init__(self, image: Image) -> None:
        self._image = image
        geometry, settings = image.geometry, image.settings
        self.entries = settings.slice_size // geometry.l2_entry_size
        """Entries of one slice."""
        self.bits = self.entries.bit_length() - 1
        self.mask = self.entries - 1
        self._per_table_bits = geometry.l2_bits - self.bits
        self._max = settings.slices_max
        self._ahead = max(1, min(self._max // 4, _READ_AHEAD // settings.slice_size))
        self.slices: dict[int, Slice] = {}
        self._dirty: set[int] = set()
        self._loading: dict[int, asyncio.Event] = {}

    @property
    def dirty(self) -> bool:
        """Whether any slice waits to be written."""
        return bool(self._dirty)

    def _place(self, key: int) -> int:
        """Host offset of slice ``key``, 0 if its table does not exist."""
        table = self._image.l2_table(key >> self._per_table_bits)
        if not table:
            return 0
        number = key & ((1 << self._per_table_bits) - 1)
        return table + number * self._image.settings.slice_size

    async def get(self, key: int) -> Slice | None:
        """The slice; None if its table does not exist."""
        while True:
            found = self.slices.get(key)
            if found is not None:
                found.used = True
                return found
            loading = self._loading.get(key)
            if loading is not None:
                await loading.wait()
                continue
            place = self._place(key)
            if not place:
                return None
            await self._load(key, place)

    async def _load(self, key: int, place: int) -> None:
        keys = self._worth_loading(key)
        event = asyncio.Event()
        self._loading.update(dict.fromkeys(keys, event))
        size = self._image.settings.slice_size
        try:
            data = memoryview(await self._image.storage.read(place, len(keys) * size))
            # The table may have been given up, or copied elsewhere, while we read it.
            if self._place(key) == place:
                for number, each in enumerate(keys):
                    table = load_l2_table(data[number * size :][:size], self._image.geometry)
                    self._insert(each, Slice(*table))
        finally:
            for each in keys:
                del self._loading[each]
            event.set()

    def _worth_loading(self, key: int) -> range:
        """``key``, and what follows it in its table if the slice before it was of use."""
        last = key + 1
        if key - 1 in self.slices:
            in_table = (1 << self._per_table_bits) - (key & ((1 << self._per_table_bits) - 1))
            limit = key + min(in_table, self._ahead)
            while last < limit and last not in self.slices and last not in self._loading:
                last += 1
        return range(key, last)

    def _insert(self, key: int, loaded: Slice) -> None:
        if len(self.slices) >= self._max:
            self._drop_one()
        self.slices[key] = loaded

    def _drop_one(self) -> None:
        """Drop a clean slice: the first that was not used since it was last passed over."""
        for _ in range(2 * len(self.slices)):
            key, candidate = next(iter(self.slices.items()))
            if not candidate.used and not candidate.dirty:
                del self.slices[key]
                return
            candidate.used = False
            self.slices[key] = self.slices.pop(key)

    async def modify(self, key: int) -> Slice:
        """The slice, to be changed at once; its table exists. Needs the image's lock."""
        while True:
            found = await self.get(key)
            assert found is not None
            if found.dirty or len(self._dirty) < self._max - 1:
                break
            from blocklayer.drivers.qcow2.flushing import write_mapping

            await write_mapping(self._image)
            if key in self.slices:
                break
        found = self.slices[key]
        found.dirty = True
        self._dirty.add(key)
        return found

    async def write(self) -> None:
        """Write all dirty slices, neighbours together. What they point at must be durable."""
        image = self._image
        size = image.settings.slice_size
        keys = sorted(self._dirty)
        while keys:
            group = [keys.pop(0)]
            start = self._place(group[0])
            while keys and self._place(keys[0]) == start + len(group) * size:
                group.append(keys.pop(0))
            image.overlap.check(start, len(group) * size, own=overlap.ACTIVE_L2)
            found = [self.slices[key] for key in group]
            data = [store_l2_table(each.entries, each.bitmaps) for each in found]
            await image.storage.write(start, *data)
            for key in group:
                self.slices[key].dirty = False
            self._dirty.difference_update(group)

    def forget(self, l1_index: int) -> None:
        """The table of ``l1_index`` is gone."""
        first = l1_index << self._per_table_bits
        last = first + (1 << self._per_table_bits)
        if last - first > len(self.slices):
            gone = [key for key in self.slices if first <= key < last]
        else:
            gone = [key for key in range(first, last) if key in self.slices]
        for key in gone:
            del self.slices[key]
        self._dirty.difference_update(gone)

    def drop_unused(self) -> None:
        """Drop clean slices that nobody asked for since the last call."""
        for key, candidate in list(self.slices.items()):
            if not candidate.used and not candidate.dirty:
                del self.slices[key]
            candidate.used = False

    def clear(self) -> None:
        """Forget everything, also what was not written."""
        self.slices.clear()
        self._dirty.clear()
