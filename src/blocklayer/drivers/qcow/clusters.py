"""Compressed clusters of version 1 images.

1. What a cluster gives when it is unpacked is bounded before it is given room.
2. Compressed clusters begin at whole sectors: writing one touches no other.
3. The cluster that was unpacked last is kept, by its entry. Space that an entry has named is never
   used again while the image is open, except after ``forget``.
"""

from __future__ import annotations

from functools import partial

from blocklayer.codec.qcow import Header, decode_compressed
from blocklayer.drivers.qcow2.packing import unpack_cluster
from blocklayer.errors import CorruptionError
from blocklayer.graph import io
from blocklayer.graph.node import Node
from blocklayer.graph.waiting import offload


class Unpacker:
    """Reads compressed clusters of one image."""

    def __init__(self, storage: Node, header: Header) -> None:
        self._storage = storage
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._kept: tuple[int, bytes] = (0, b"")

    def forget(self) -> None:
        """Entries may name other data from now on."""
        self._kept = (0, b"")

    async def read(self, cluster: int, entry: int) -> bytes:
        """The plain bytes of a cluster, as long as clusters are."""
        kept, data = self._kept
        if kept == entry:
            return data
        place, length = decode_compressed(entry, self._bits)
        if not length or place + length > self._storage.size:
            raise CorruptionError(
                f"Compressed cluster {cluster} of '{self._storage.filename}' at {place:#x}, "
                f"{length:#x} bytes, is past the end of the file"
            )
        packed = await io.read(self._storage, place, length)
        try:
            data = await offload(partial(unpack_cluster, zstd=False), packed, self._size)
        except ValueError as error:
            raise CorruptionError(
                f"Compressed cluster {cluster} of '{self._storage.filename}' at {place:#x} cannot "
                f"be unpacked: {error}"
            ) from None
        self._kept = (entry, data)
        return data
