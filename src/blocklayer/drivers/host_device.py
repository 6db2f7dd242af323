"""``host_device``: block and character devices of this machine.

1. A device has the size it has: resizing to that size is all that works.
2. Zeroing and discarding are the device's own; what a character device cannot do is never asked.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, ClassVar

from blocklayer.drivers.file import FileDriver
from blocklayer.drivers.host import calls
from blocklayer.errors import StorageError, UnsupportedError, UsageError
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph


class HostDeviceDriver(FileDriver):
    """A block device, or a character device."""

    NAME = "host_device"
    CreateOptions: ClassVar[type[AnyCreateOptions] | None] = AnyCreateOptions
    zero_alignment = SECTOR
    discard_alignment = SECTOR

    def _check_kind(self, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise StorageError(
                f"'{self.NAME}' driver requires '{self._path}' to be either a character or "
                "block device",
                errno.EINVAL,
                self._path,
            )

    def _measure(self) -> int:
        return calls.device_size(self._fd)

    def identity(self) -> object:
        """The device, whichever name it has."""
        return "device", os.fstat(self._fd).st_rdev

    async def map(self, offset: int, length: int) -> Extent:
        """Devices do not tell holes from data."""
        return Extent(offset, length, Kind.DATA, offset, None, writable=True)

    def _punch(self, offset: int, length: int) -> None:
        calls.device_discard(self._fd, offset, length)

    def _free(self, offset: int, length: int) -> None:
        # What a discarded range reads as is up to the device.
        raise UnsupportedError(f"'{self._path}' cannot free a range and have it read as zeros")

    def _zero_in_place(self, offset: int, length: int) -> None:
        calls.device_zero(self._fd, offset, length)

    def _free_and_reserve(self, offset: int, length: int) -> None:
        raise UnsupportedError(f"'{self._path}' cannot zero a range quickly")

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Accept what the device holds."""
        self.node.check_writable()
        if preallocation != "off":
            raise UnsupportedError(f"Unsupported preallocation mode '{preallocation}'")
        if size > self.size:
            raise UnsupportedError(f"Cannot grow device '{self._path}' to {size} bytes")

    @classmethod
    async def create(cls, graph: Graph, filename: str, options: AnyCreateOptions) -> None:
        """Check that the device is there and large enough; its first sectors are cleared."""
        await offload(_prepare, filename, options.size)


def _prepare(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            if calls.device_size(fd) < size:
                raise UsageError(f"Device '{path}' is too small: {size} bytes are needed")
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError.from_os(error, f"Could not open '{path}'", path) from error
