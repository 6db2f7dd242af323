"""``check``: recount all references to host clusters, compare, report as QEMU does, and repair.

Public:
    check(driver, repair) -> CheckResult   one pass; ``repair`` is a subset of {"leaks", "errors"}
    look(driver, storage, repair)          the same on other storage: for a rehearsal
    rebuild_refcounts(driver)              what opening a dirty image for writing needs

What the driver offers: ``settle`` before the pass (all metadata is then in the file) and ``reload``
after one that changed the file (caches are dropped; header, L1 table and snapshots read anew).

1. A pass that does not repair writes nothing.
2. A repaired image is only called clean by another pass: callers check again, without repair, when
   something was fixed.
3. The dirty and corrupt bits go last, when what they warned of is gone from stable storage.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.header import (
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    decode_header,
    probe_cluster_bits,
)
from blocklayer.codec.qcow2.refcounts import decode_block, encode_block
from blocklayer.codec.qcow2.validation import validate
from blocklayer.drivers.qcow2.check_data_file import note_end
from blocklayer.drivers.qcow2.check_image import CheckedImage, StoredRefcounts
from blocklayer.drivers.qcow2.check_walk import Walk
from blocklayer.drivers.qcow2.recount import WINDOW, WINDOW_BITS
from blocklayer.drivers.qcow2.storage import Storage
from blocklayer.errors import BlockError, CorruptionError

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.driver import Qcow2Driver
    from blocklayer.graph.checking import CheckResult

_HEADER_PROBE_SIZE = 112
_MAX_UNREADABLE_LISTED = 10_000


async def check(driver: Qcow2Driver, repair: frozenset[str]) -> CheckResult:
    """Look at all metadata, and repair what ``repair`` names."""
    if repair:
        driver.node.check_writable()
    if not driver.node.read_only and driver.node.poisoned is None:
        await driver.flush_all()
    image = await _open(Storage(driver.node.children["file"]), repair)
    try:
        await _pass(image, driver)
    finally:
        if image.changed:
            await image.storage.flush()
            await driver.reload()
    return image.result


async def look(driver: Qcow2Driver, storage: Storage, repair: frozenset[str]) -> CheckResult:
    """``check`` of the metadata that ``storage`` shows; the driver's own state stays as it is."""
    image = await _open(storage, repair)
    await _pass(image, driver)
    return image.result


async def rebuild_refcounts(driver: Qcow2Driver) -> None:
    """Make refcounts right in an image whose dirty bit says that they are not, and clear the bit.

    Raises CorruptionError if more than refcounts is wrong.
    """
    result = await check(driver, frozenset(("leaks", "errors")))
    if result.check_errors or result.corruptions:
        first = next((line for line in result.messages if line.startswith("ERROR")), "")
        raise CorruptionError(
            f"Could not repair dirty image '{driver.node.filename}' ({first or 'see check'}); "
            "try 'check -r all'"
        )


async def _open(storage: Storage, repair: frozenset[str]) -> CheckedImage:
    bits = probe_cluster_bits(await storage.read(0, _HEADER_PROBE_SIZE))
    header = decode_header(await storage.read(0, 1 << bits))
    validate(header)
    return CheckedImage(storage, header, repair)


async def _pass(image: CheckedImage, driver: Qcow2Driver) -> None:
    await _compare(image)
    if image.geometry.data_file:
        note_end(image, driver.image.data.size)


async def _compare(image: CheckedImage) -> None:
    stored = StoredRefcounts(image)
    await stored.load()
    walk = Walk(image)
    await walk.run(stored)
    if image.result.check_errors:
        return
    comparison = Comparison(image, stored)
    await comparison.run()
    if not image.repair:
        comparison.count()
        if image.flags_suspect:
            await _check_copied(image, stored, fix=False)
        return
    from blocklayer.drivers.qcow2.repair import repair_refcounts

    if comparison.rebuild and "errors" not in image.repair:
        comparison.count()
        image.failure("ERROR need to rebuild refcount structures")
        return
    await repair_refcounts(image, stored, walk, comparison)
    if image.flags_suspect:
        await _check_copied(image, stored, fix="errors" in image.repair or image.sound)
    await _mark_sound(image)


async def _check_copied(image: CheckedImage, stored: StoredRefcounts, *, fix: bool) -> None:
    from blocklayer.drivers.qcow2.check_copied import check_copied

    await check_copied(image, stored, fix=fix)


async def _mark_sound(image: CheckedImage) -> None:
    """Take back the warnings in the header, if nothing is left of what they warn of."""
    bits = image.header.incompatible_features
    warnings = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT
    if image.sound and bits & warnings:
        await image.set_incompatible_features(bits & ~warnings)


class Comparison:
    """Refcounts in the file against references counted."""

    def __init__(self, image: CheckedImage, stored: StoredRefcounts) -> None:
        self.image = image
        self.stored = stored
        self.too_low = 0
        self.too_high = 0
        self._overflowing: set[int] = set()
        self.rebuild = image.structure_broken
        """The refcount structure is broken, or misses clusters altogether."""

    async def run(self) -> None:
        """Report every difference, and find where the image ends."""
        image = self.image
        self._reaches(1, True)
        self._note_overflows()
        async for cluster, refcount, reference in self.differences():
            if refcount < reference:
                self.too_low += 1
                self.rebuild |= refcount == 0
                image.note(f"ERROR cluster {cluster} refcount={refcount} reference={reference}")
            else:
                self.too_high += 1
                image.note(f"Leaked cluster {cluster} refcount={refcount} reference={reference}")

    def count(self) -> None:
        """Enter the differences as found, not repaired."""
        self.image.result.corruptions += self.too_low
        self.image.result.leaks += self.too_high

    async def differences(self) -> AsyncIterator[tuple[int, int, int]]:
        """(cluster, refcount, reference) where the two differ; notes the image's end in passing."""
        image, geometry = self.image, self.image.geometry
        end = max(image.file_clusters, image.recount.end)
        step = min(WINDOW, geometry.refcount_block_entries)
        span = max(WINDOW, geometry.refcount_block_entries)
        suspect = self._overflowing | image.outside.windows.keys()
        for start in self._spans(span, end):
            for index in await self._windows(start, min(start + span, end)):
                first = index << WINDOW_BITS
                counts = image.recount.counts(index)
                sound = not image.recount.contradicts(index)
                for cluster in range(first, min(first + WINDOW, end), step):
                    part = counts and counts[cluster - first : cluster - first + step]
                    raw = await self._raw(cluster, min(step, end - cluster))
                    if raw is None:
                        sound = False
                    elif part is not None and self._same(raw, part):
                        self._reaches(cluster + len(part.rstrip(b"\0")), bool(part.strip(b"\0")))
                    else:
                        for found in self._unlike(cluster, raw, end):
                            sound = False
                            yield found
                if sound and index not in suspect:
                    image.sound_windows.add(index)
                else:
                    image.flags_suspect = True

    def _unlike(self, cluster: int, raw: bytes, end: int) -> Iterator[tuple[int, int, int]]:
        """The differences between packed refcounts and what was counted from ``cluster`` on."""
        image, geometry = self.image, self.image.geometry
        for one, refcount in enumerate(decode_block(raw, geometry.refcount_order), cluster):
            # Narrow entries come in whole bytes, the last of which may reach too far.
            if one == end:
                break
            reference = min(image.recount.get(one), geometry.refcount_max)
            self._reaches(one + 1, bool(refcount or reference))
            if refcount != reference:
                yield one, refcount, reference

    def _spans(self, span: int, end: int) -> list[int]:
        """Where there is anything to compare: starts of spans, in order."""
        entries = self.image.geometry.refcount_block_entries
        found = {(index << WINDOW_BITS) // span for index in self.image.recount.windows}
        found.update(
            index * entries // span
            for index, entry in enumerate(self.stored.table)
            if entry and index * entries < end
        )
        return [number * span for number in sorted(found)]

    async def _windows(self, start: int, stop: int) -> Sequence[int]:
        """The windows to compare in a span: all, unless its one block is empty."""
        windows = range(start >> WINDOW_BITS, (stop - 1 >> WINDOW_BITS) + 1)
        entries = self.image.geometry.refcount_block_entries
        if entries <= WINDOW:
            return windows
        try:
            block = await self.stored.block(start // entries)
        except BlockError:
            self._unreadable(start, stop - start)
            return ()
        if block is None or block == bytes(len(block)):
            return [index for index in windows if index in self.image.recount.windows]
        return windows

    def _unreadable(self, cluster: int, count: int) -> None:
        listed = min(count, _MAX_UNREADABLE_LISTED)
        for unread in range(cluster, cluster + listed):
            self.image.failure(f"Can't get refcount for cluster {unread}: Input/output error")
        self.image.result.check_errors += count - listed

    async def _raw(self, cluster: int, count: int) -> bytes | None:
        """Packed refcounts, None if they cannot be read (which is noted)."""
        bits = self.image.geometry.refcount_bits
        length = -(-count * bits // 8)
        try:
            raw = await self.stored.part(cluster, length * 8 // bits)
        except BlockError:
            self._unreadable(cluster, count)
            return None
        return bytes(length) if raw is None else raw

    def _same(self, raw: bytes, counts: bytes) -> bool:
        """Whether packed refcounts equal counts; those past the end of ``raw`` must be none."""
        geometry = self.image.geometry
        width = geometry.refcount_bits // 8
        if width:
            expected = bytearray(len(counts) * width)
            expected[width - 1 :: width] = counts
        else:
            try:
                expected = bytearray(encode_block(array("B", counts), geometry.refcount_order))
            except OverflowError:
                return False
        return raw == expected[: len(raw)]

    def _note_overflows(self) -> None:
        """Report the clusters with more references than the width of refcounts can tell."""
        image, limit = self.image, self.image.geometry.refcount_max
        for cluster, references in image.recount.above(limit):
            self._overflowing.add(cluster >> WINDOW_BITS)
            for _ in range(references - limit):
                image.corruption(
                    f": overflow cluster offset={cluster << image.geometry.cluster_bits:#x}\n"
                    "Use qemu-img amend to increase the refcount entry width or qemu-img convert "
                    "to create a clean copy if the image cannot be opened for writing"
                )

    def _reaches(self, end: int, used: bool) -> None:
        if used:
            result, bits = self.image.result, self.image.geometry.cluster_bits
            result.image_end_offset = max(result.image_end_offset, end << bits)
