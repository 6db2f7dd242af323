"""Checking Parallels images: every cluster within the file, and none used twice.

1. A repair drops entries that name no place in the file, and gives the second user of a cluster a
   copy of its own. Both are on stable storage before the mark of use goes.
2. What lies behind the last cluster is cut off only when ``leaks`` are to be mended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from blocklayer.codec import parallels
from blocklayer.drivers.blocks import MAX_MESSAGES
from blocklayer.drivers.parallels.driver import PAGE_WORDS
from blocklayer.drivers.tables import Space
from blocklayer.graph import io
from blocklayer.graph.checking import CheckResult
from blocklayer.units import SECTOR, align_up, div_up

if TYPE_CHECKING:
    from blocklayer.drivers.parallels.driver import ParallelsDriver


class _Table(msgspec.Struct):
    """What the table names."""

    allocated: int = 0
    fragmented: int = 0
    outside: list[int] = []
    """Table entries whose cluster is not in the file."""
    twice: list[int] = []
    """Those whose cluster another entry names, or reaches into, already."""
    end: int = 0
    """Where the last cluster ends."""


async def _look(driver: ParallelsDriver) -> _Table:
    import numpy

    header, unit = driver.header, driver.header.cluster_size
    numbers, parts = [numpy.zeros(0, "u8")], [numpy.zeros(0, "u8")]
    for first in range(0, header.bat_entries, PAGE_WORDS):
        part, _ = await driver.page(first)
        if part.uniform and not part.entries[0]:
            continue
        words = numpy.array(part.entries, dtype="u8")
        used = numpy.flatnonzero(words).astype("u8")
        numbers.append(used + numpy.uint64(first))
        parts.append(words[used] * numpy.uint64(header.entry_size))
    entries, places = numpy.concatenate(numbers), numpy.concatenate(parts)
    apart = (places[1:] != places[:-1] + unit) & (entries[1:] == entries[:-1] + 1)
    found = _Table(allocated=len(places), fragmented=int(apart.sum()))
    size = driver.node.children["file"].node.size
    outside = (places < header.data_offset) | (places >= size)
    found.outside = entries[outside].tolist()
    entries, places = entries[~outside], places[~outside]
    # The first entry of the table that names a cluster keeps it.
    order = numpy.argsort(places, kind="stable")
    close = numpy.flatnonzero(numpy.diff(places[order]) < unit) + 1
    found.twice = sorted(entries[order][close].tolist())
    found.end = int(places.max()) + unit if len(places) else header.data_offset
    return found


class _Report:
    def __init__(self, repair: frozenset[str]) -> None:
        self.result = CheckResult(messages=[])
        self._repair = repair

    def note(self, message: str, kind: str = "errors") -> None:
        """Note one corruption; leaks are counted by the caller."""
        fixed = kind in self._repair
        if kind == "errors":
            self.result.corruptions += 1
            self.result.corruptions_fixed += fixed
        if len(self.result.messages) < MAX_MESSAGES:
            self.result.messages.append(f"{'Repairing' if fixed else 'ERROR'} {message}")


async def check(driver: ParallelsDriver, repair: frozenset[str]) -> CheckResult:
    """Look at the header and at every entry of the table; mend what ``repair`` names."""
    await driver.write_back()
    header, storage = driver.header, driver.node.children["file"].node
    report, was_in_use = _Report(repair), driver.was_in_use
    result = report.result
    if was_in_use:
        report.note("image was not closed correctly")
    if not header.data_off_valid:
        report.note("data_off field has incorrect value")
        if "errors" in repair:
            await driver.write_field(parallels.DATA_OFF_OFFSET, 4, header.expected_data_off)
            header.data_off = header.expected_data_off
    found = await _look(driver)
    result.total_clusters = header.bat_entries
    result.allocated_clusters, result.fragmented_clusters = found.allocated, found.fragmented
    for number in found.outside:
        report.note(f"cluster {number} is outside image")
    for number in found.twice:
        report.note(f"duplicate offset in BAT entry {number}")
    result.image_end_offset = found.end
    if "errors" in repair:
        result.image_end_offset = await _mend(driver, found)
    leaked = align_up(max(0, storage.size - result.image_end_offset), SECTOR)
    if leaked:
        report.note(f"space leaked at the end of the image {leaked}", "leaks")
        result.leaks = div_up(leaked, header.cluster_size)
    if repair:
        await driver.flush()
    if leaked and "leaks" in repair:
        await io.truncate(storage, result.image_end_offset, shrink=True)
        result.leaks_fixed = result.leaks
        driver.reset_clusters()
    if "errors" in repair and (was_in_use or result.corruptions_fixed):
        await driver.unmark()
    return result


async def _mend(driver: ParallelsDriver, found: _Table) -> int:
    """Drop entries that name nothing, and copy clusters for second users; the new end."""
    header, storage = driver.header, driver.node.children["file"].node
    unit, end = header.cluster_size, found.end
    for number in found.outside:
        part, first = await driver.page(number)
        part.set(number - first, 0)
    if found.twice:
        space = Space(storage, max(end, align_up(storage.size, SECTOR)))
        phase = (space.end - header.data_offset) % unit
        space.end += (unit - phase) % unit
        for number in found.twice:
            part, first = await driver.page(number)
            old = part.entries[number - first] * header.entry_size
            place, _ = await space.take(unit)
            length = min(unit, storage.size - old)
            await _copy(driver, old, place, length)
            await space.settle()
            part, first = await driver.page(number)
            part.set(number - first, place // header.entry_size)
        end = space.end
    if found.outside or found.twice:
        driver.reset_clusters()
        driver.node.mapping_changed()
    return end


async def _copy(driver: ParallelsDriver, old: int, place: int, length: int) -> None:
    storage = driver.node.children["file"].node
    for at in range(0, length, 1 << 20):
        data = await io.read(storage, old + at, min(1 << 20, length - at))
        await io.write(storage, place + at, data)
