"""What formats that map whole blocks to places in one file have in common.

1. Zeros go to where the data is: what is not allocated and has no backing reads as zeros already.
"""

from __future__ import annotations

import os

from blocklayer.errors import UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.child import Child
from blocklayer.graph.driver import DriverInfo, FormatDriver
from blocklayer.graph.extent import Allocation, Kind
from blocklayer.graph.node import Node
from blocklayer.graph.options import NodeOptions, Reference

MAX_MESSAGES = 1000
"""Lines that a check prints; beyond that it only counts."""


class FileOptions(NodeOptions):
    """Options of a format with one file and no backing file."""

    file: Reference | None = None


def random_uuid() -> bytes:
    """A random (version 4) UUID's 16 bytes, in network order."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)


def new_block(
    offset: int, length: int, unit: int, child: Child, place: int, *, fresh: bool
) -> Allocation:
    """The allocation of a block of ``unit`` bytes at ``place`` where the guest saw zeros so far.

    If the space is ``fresh``, reads as zeros too, there is nothing to fill around the write.
    """
    head = offset % unit
    length = min(length, unit - head)
    if fresh:
        return Allocation(offset, length, child, place + head, reads_zero=True, token=place)
    return Allocation(offset, length, child, place, head, unit - head - length, token=place)


def new_run(
    offset: int,
    length: int,
    start: int,
    size: int,
    child: Child,
    place: int,
    *,
    fresh: bool,
    bare: bool,
) -> Allocation:
    """The allocation of ``size`` bytes, whole blocks from guest ``start`` on, at ``place``.

    The space is ``fresh`` if it reads as zeros; ``bare`` if, besides, the guest reads zeros there
    so far: then there is nothing to fill around the write. The token is (place, size).
    """
    head = offset - start
    length = min(length, size - head)
    if bare:
        return Allocation(offset, length, child, place + head, reads_zero=True, token=(place, size))
    tail = size - head - length
    return Allocation(offset, length, child, place, head, tail, fresh, token=(place, size))


class BlockFormatDriver(FormatDriver):
    """Base of drivers whose ``map`` gives ZERO, UNALLOCATED, or DATA of children."""

    relocates = True

    async def open_file(self) -> Node:
        """Open the child ``file`` that the options name."""
        reference: Reference | None = getattr(self.node.options, "file", None)
        return await self.node.open_child("file", reference)

    def info(self) -> DriverInfo | None:
        """Formats without blocks have nothing to say."""
        return DriverInfo(cluster_size=self.allocation_unit if self.allocation_unit > 1 else 0)

    async def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Pass zeros on to the storage of each run that has any."""
        end = offset + length
        while offset < end:
            extent = await self.map(offset, end - offset)
            step = min(extent.length, end - offset)
            if extent.kind is Kind.DATA and extent.writable:
                assert extent.child is not None
                assert extent.host_offset is not None
                await io.write_zeroes(extent.child.node, extent.host_offset, step, unmap=unmap)
            elif extent.kind is not Kind.ZERO:
                raise UnsupportedError(f"Format '{self.NAME}' cannot zero {offset:#x} quickly")
            offset += step
