"""The state of a virtual machine, which some formats keep behind the disk they show.

1. Nothing of it is part of the disk: it is neither mapped nor copied, and a resize drops it.
2. Writes are made of whole allocation units, what surrounds them read before; one at a time.
3. What was never written reads as zeros.
"""

from __future__ import annotations

import errno

from blocklayer.errors import StorageError, UnsupportedError
from blocklayer.graph import io
from blocklayer.graph.driver import Buffer, FormatDriver
from blocklayer.graph.extent import Kind
from blocklayer.graph.node import Node
from blocklayer.units import MAX_SIZE, align_down, align_up


async def read(node: Node, position: int, view: memoryview) -> None:
    """Fill ``view`` from ``position`` of the VM state. Raises UnsupportedError if there is none."""
    driver = _driver(node)
    await _read(driver, await driver.prepare_vm_state(0) + position, view)


async def write(node: Node, position: int, data: Buffer) -> None:
    """Store ``data`` at ``position`` of the VM state. Raises UnsupportedError if there is none."""
    node.check_writable()
    driver, unit, end = _driver(node), _driver(node).allocation_unit, position + len(data)
    if not 0 <= position <= end <= MAX_SIZE:
        raise StorageError(
            f"No VM state of '{node.filename}' ends at {end:#x}: it would be too large", errno.EFBIG
        )
    if not data:
        return
    first = align_down(position, unit)
    units = bytearray(align_up(end, unit) - first)
    start = await driver.prepare_vm_state(end) + first
    whole = memoryview(units)
    if position > first:
        await _read(driver, start, whole[:unit])
    if end < first + len(units):
        await _read(driver, start + len(units) - unit, whole[-unit:])
    whole[position - first : end - first] = data
    await io.write_runs(node, start, whole)


async def _read(driver: FormatDriver, offset: int, view: memoryview) -> None:
    done, total = 0, len(view)
    while done < total:
        extent = await driver.map(offset + done, total - done)
        piece = view[done : done + min(extent.length, total - done)]
        if extent.kind is Kind.OPAQUE:
            await driver.read_opaque(offset + done, piece)
        elif extent.kind is Kind.DATA and extent.child and extent.host_offset is not None:
            await io.read_into(extent.child.node, extent.host_offset, piece)
        else:
            piece[:] = io.zeros(len(piece))
        done += len(piece)


def _driver(node: Node) -> FormatDriver:
    if not isinstance(node.driver, FormatDriver):
        raise UnsupportedError(f"'{node.filename}' cannot hold the state of a virtual machine")
    return node.driver
