"""One export of an NBD server: a node under a name, and what clients are told of it.

1. What is said of the size is true when it is said: a grown node shows its new size to the next
   client, and takes requests for it from all.
2. A bitmap that is exported stays as it is, except that writes are recorded; on a read-only export
   it must not even record, since clients take it for a point in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from blocklayer.codec.nbd.constants import MAX_STRING, TransmissionFlag
from blocklayer.codec.nbd.records import Offer
from blocklayer.errors import LockedError, UsageError
from blocklayer.exports.export import Export
from blocklayer.exports.nbd.contexts import (
    AllocationContext,
    BitmapContext,
    Context,
    DepthContext,
)
from blocklayer.exports.translation import Translation
from blocklayer.graph import bitmaps as graph_bitmaps
from blocklayer.graph.dirty_bitmap import DirtyBitmap
from blocklayer.graph.node import Node
from blocklayer.units import SECTOR, align_down

if TYPE_CHECKING:
    from blocklayer.exports.nbd.connection import Connection


class NbdExport(Export):
    """A node for NBD clients. Make it with ``open``."""

    TYPE = "nbd"

    def __init__(
        self,
        identifier: str,
        node: Node,
        *,
        name: str | None = None,
        description: str = "",
        writable: bool = False,
        writethrough: bool = False,
        bitmaps: Sequence[DirtyBitmap] = (),
        allocation_depth: bool = False,
        translate: bool = True,
    ) -> None:
        self.name = node.name if name is None else name
        self.description = description
        for what, text in (("export name", self.name), ("description", description)):
            if len(text.encode()) > MAX_STRING:
                raise UsageError(f"{what} '{text}' too long")
        super().__init__(identifier, node, writable=writable, writethrough=writethrough)
        self.contexts: list[Context] = [AllocationContext()]
        if allocation_depth:
            self.contexts.append(DepthContext())
        self.contexts += [BitmapContext(bitmap) for bitmap in bitmaps]
        self.translation = Translation(self.root) if translate else None
        """Serves what it can without the graph; ``translate=False`` turns it off."""
        self.connections: set[Connection] = set()

    @classmethod
    async def open(
        cls,
        identifier: str,
        node: Node,
        *,
        bitmaps: Sequence[str | tuple[str, str]] = (),
        writable: bool = False,
        **options: object,
    ) -> NbdExport:
        """An export with the named bitmaps: of the node or its backing chain, or of (node, name).

        Raises BlockError, with nothing changed.
        """
        found = [_find_bitmap(node, reference, writable) for reference in bitmaps]
        await graph_bitmaps.load(found)
        return cls(identifier, node, bitmaps=found, writable=writable, **options)  # type: ignore[arg-type]

    @property
    def clients(self) -> int:
        """Connections that use it."""
        return len(self.connections)

    @property
    def size(self) -> int:
        """Bytes that clients may use: whole sectors."""
        return align_down(self.node.size, SECTOR)

    def offer(self, *, several: bool) -> Offer:
        """What clients are told; ``several``: more than one may come."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
        )
        if self.writable:
            flags |= (
                TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_FAST_ZERO
            )
        else:
            flags |= TransmissionFlag.READ_ONLY
        if several:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return Offer(
            self.name,
            self.size,
            flags,
            self.description,
            contexts=tuple(context.name for context in self.contexts),
        )

    async def close(self) -> None:
        """Drop all clients, let what they asked for end, and give the node back."""
        self.shutting_down = True
        if self.root.front_end is not None:
            # What waits for a limit is not waited for.
            self.root.front_end.end()
        for connection in list(self.connections):
            connection.drop()
        for connection in list(self.connections):
            await connection.ended.wait()
        for context in self.contexts:
            context.close()
        await super().close()


def _find_bitmap(node: Node, reference: str | tuple[str, str], writable: bool) -> DirtyBitmap:
    if isinstance(reference, tuple):
        holder = node.graph.nodes.get(reference[0])
        if holder is None:
            raise UsageError(f"Node '{reference[0]}' not found")
        bitmap = graph_bitmaps.find(holder, reference[1])
    else:
        layers = [node, *(layer for layer in node.chain() if layer is not node)]
        holders = [layer for layer in layers if reference in layer.dirty_bitmaps]
        if not holders:
            raise UsageError(f"Bitmap '{reference}' is not found")
        bitmap = holders[0].dirty_bitmaps[reference]
    bitmap.check(busy=bitmap.users > 0 and not bitmap.frozen, read_only=True)
    if not writable and bitmap.enabled and not bitmap.node.read_only:
        raise LockedError(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
    return bitmap
