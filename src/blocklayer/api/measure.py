"""How much storage a new image would take: typed results for ``measure``.

1. Nothing is made, and no file but the source's chain is opened: a backing file among the options
   is a name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from blocklayer.api.disk import Disk
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.driver import BitmapShape, Measured, Measurement
from blocklayer.graph.extent import Kind
from blocklayer.graph.node import Node
from blocklayer.graph.options import CreateOptions, decode
from blocklayer.graph.resolve import runs

__all__ = ["Measurement", "decode_options", "measure"]


async def measure(
    format: str, options: CreateOptions, *, size: int = 0, source: Disk | None = None
) -> Measurement:
    """The size of a new image of ``format``, empty with ``size`` or holding what ``source`` does.

    Raises UsageError, UnsupportedError where the format cannot tell, or what reading ``source``'s
    metadata raises.
    """
    driver = REGISTRY.load(format)
    if source is None:
        return await driver.measure(options, size, None)
    node = source.root.node
    measured = Measured(_data(node), _bitmaps(node))
    return await driver.measure(options, node.size, measured)


def decode_options(format: str, values: Mapping[str, Any]) -> CreateOptions:
    """The options, named as in ``-o``, for a new image of ``format``.

    Raises UsageError, or UnsupportedError where images of ``format`` cannot be made.
    """
    declared = REGISTRY.load(format).CreateOptions
    if declared is None:
        raise UnsupportedError(f"Format driver '{format}' does not support image creation")
    for name in values:
        if name not in declared.__struct_encode_fields__:
            raise UsageError(f"Invalid parameter '{name}'")
    return decode(declared, values)


def _bitmaps(node: Node) -> list[BitmapShape] | None:
    if not node.driver.stores_bitmaps:
        return None
    found = [bitmap for bitmap in node.dirty_bitmaps.values() if bitmap.persistent]
    return [BitmapShape(bitmap.name or "", bitmap.granularity) for bitmap in found]


async def _data(node: Node) -> AsyncIterator[tuple[int, int]]:
    """What of ``node`` and the layers below does not read as zeros."""
    async for run in runs(node, 0, node.size):
        if run.kind is not Kind.ZERO:
            yield run.offset, run.length
