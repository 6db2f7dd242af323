"""Checking QED images: every cluster of the file in use once, every entry within the file.

1. A repair drops entries that name no place in the file; what they named reads as absent then.
   Clusters used twice are reported only: which of the two is right, nobody knows.
2. Nothing is repaired in what is only suspected: a table met twice is not followed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.codec.qed import UNALLOCATED, ZERO
from blocklayer.drivers.blocks import MAX_MESSAGES
from blocklayer.drivers.two_level import PAGE_ENTRIES
from blocklayer.errors import UnsupportedError
from blocklayer.graph.checking import CheckResult
from blocklayer.units import div_up

if TYPE_CHECKING:
    from blocklayer.drivers.qed.driver import QedDriver

_MAX_CLUSTERS: Final = 1 << 30
"""Clusters of a file that a check keeps a bit for each of: 128 MiB."""


class _Walk:
    def __init__(self, driver: QedDriver, *, repair: bool) -> None:
        self.driver = driver
        self.repair = repair
        self.result = CheckResult(messages=[])
        self._unit = driver.header.cluster_size
        self.clusters = driver.node.children["file"].node.size // self._unit
        if self.clusters > _MAX_CLUSTERS:
            raise UnsupportedError(
                f"'{driver.node.filename}' is too large to be checked: it has {self.clusters} "
                "clusters"
            )
        self._used = bytearray(div_up(self.clusters + 1, 8))
        self.in_use = 0
        self._previous = 0

    def report(self, message: str, count: int = 1, *, fixed: bool = False) -> None:
        """Note ``count`` things that are wrong, and mended if ``fixed``."""
        self.result.corruptions += count
        self.result.corruptions_fixed += count if fixed else 0
        if len(self.result.messages) < MAX_MESSAGES:
            verb = "Repairing" if fixed else "ERROR"
            self.result.messages.append(f"{verb} {message}")

    def use(self, place: int, size: int) -> int:
        """Mark clusters as used; the answer is how many of them were used before."""
        twice = 0
        for cluster in range(place // self._unit, (place + size) // self._unit):
            if cluster > self.clusters:
                break
            bit = 1 << (cluster & 7)
            if self._used[cluster >> 3] & bit:
                twice += 1
            else:
                self._used[cluster >> 3] |= bit
                self.in_use += cluster < self.clusters
        return twice

    async def table(self, place: int, index: int) -> None:
        """Look at every entry of an L2 table."""
        driver = self.driver
        tables = driver.tables
        for first in range(0, tables.l2_entries, PAGE_ENTRIES):
            part = await tables.l2_page(place, first)
            if part.uniform and part.entries[0] in (UNALLOCATED, ZERO):
                continue
            for at, entry in enumerate(part.entries):
                if entry in (UNALLOCATED, ZERO):
                    continue
                self.result.allocated_clusters += 1
                if self._previous and entry != self._previous + self._unit:
                    self.result.fragmented_clusters += 1
                self._previous = entry
                cluster = index * tables.l2_entries + first + at
                problem = driver.cluster_problem(entry)
                if problem is not None:
                    self.report(f"cluster {cluster} at {entry:#x} {problem}", fixed=self.repair)
                    if self.repair:
                        part.set(at, UNALLOCATED)
                elif self.use(entry, self._unit):
                    self.report(f"cluster {cluster} at {entry:#x} is used twice")


async def check(driver: QedDriver, repair: frozenset[str]) -> CheckResult:
    """Follow all tables from the L1 table on."""
    await driver.tables.write_back()
    header, tables = driver.header, driver.tables
    walk = _Walk(driver, repair="errors" in repair)
    result = walk.result
    result.total_clusters = div_up(header.image_size, header.cluster_size)
    walk.use(0, header.data_offset)
    walk.use(header.l1_table_offset, header.table_bytes)
    for first in range(0, tables.l1_entries, PAGE_ENTRIES):
        part = await tables.l1_page(first)
        if part.uniform and not part.entries[0]:
            continue
        for index, place in enumerate(part.entries[:], first):
            if not place:
                continue
            problem = driver.table_problem(place)
            if problem is not None:
                walk.report(f"L2 table {index} at {place:#x} {problem}", fixed=walk.repair)
                if walk.repair:
                    await tables.set_l1(index, 0)
                continue
            twice = walk.use(place, header.table_bytes)
            if twice:
                walk.report(f"L2 table {index} at {place:#x} is used twice", twice)
                continue
            await walk.table(place, index)
    result.leaks = walk.clusters - walk.in_use
    if result.corruptions_fixed:
        driver.node.mapping_changed()
        await driver.flush()
    return result
