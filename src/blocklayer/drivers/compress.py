"""`compress`: a filter that stores what is written compressed, whole clusters at least.

1. Parts of clusters at the ends of a write are stored as they are.
"""

from __future__ import annotations

from blocklayer.errors import UsageError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer, FormatDriver
from blocklayer.graph.filter import FilterDriver
from blocklayer.units import align_down, align_up


class CompressDriver(FilterDriver):
    """The filter."""

    NAME = "compress"
    sees_writes = True

    async def open(self) -> None:
        """Open the child, an image of a format that compresses."""
        await super().open()
        self._format()

    def _format(self) -> FormatDriver:
        driver = self.child.driver
        while isinstance(driver, FilterDriver):
            driver = driver.child.driver
        if not isinstance(driver, FormatDriver) or type(driver).pack is FormatDriver.pack:
            raise UsageError(f"Compression is not supported for underlying format: {driver.NAME}")
        return driver

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Whole clusters compressed, the rest plain."""
        view, end = memoryview(data), offset + len(data)
        unit = self._format().allocation_unit
        start = min(align_up(offset, unit), end)
        stop = end if end == self.size else max(align_down(end, unit), start)
        if start > offset:
            await io.write(self.child, offset, view[: start - offset])
        # One cluster at a time: others may write in between.
        for at in range(start, stop, unit):
            part = view[at - offset : min(at + unit, stop) - offset]
            await io.write_compressed(self.child, at, part)
        if stop < end:
            await io.write(self.child, stop, view[stop - offset :])
