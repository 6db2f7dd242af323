"""Streams of VMDK disks: ``codec.vmdk.stream`` fed with a copy's data.

1. Grains are compressed once, and those of zeros left out as they are met; how long the stream is
   shows at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blocklayer.codec.vmdk.descriptor import NO_PARENT, ExtentLine
from blocklayer.codec.vmdk.sparse import GRAIN_SIZE
from blocklayer.codec.vmdk.stream import StreamWriter
from blocklayer.drivers.vmdk.compressed import pack_grain_data
from blocklayer.drivers.vmdk.create import VmdkCreateOptions, check_size, descriptor
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.driver import Buffer
from blocklayer.graph.streams import ImageStream, Packed, unstreamable
from blocklayer.units import SECTOR

_STREAMED = frozenset(("size", "adapter_type", "compat6", "hwversion", "toolsversion", "subformat"))
_NAME = "disk.vmdk"
"""What the descriptor calls the file. A stream has no name, and readers ignore this one."""


class VmdkStream(ImageStream):
    """A disk made with ``options``; subformat=streamOptimized is the default here."""

    unit = GRAIN_SIZE
    packs = True
    skips_zeros = True

    def __init__(self, options: VmdkCreateOptions, level: int | None) -> None:
        super().__init__(options.size)
        if level is not None:
            raise UsageError("Compression levels are not offered for format 'vmdk'")
        options.subformat = options.subformat or "streamOptimized"
        if options.subformat != "streamOptimized":
            raise UnsupportedError(
                f"A vmdk image with subformat={options.subformat} cannot be written as a stream: "
                "use subformat=streamOptimized"
            )
        named = unstreamable(options, _STREAMED)
        if named:
            raise UnsupportedError(f"A vmdk image with {named} cannot be written as a stream")
        check_size(self.size)
        sectors = self.size // SECTOR
        lines = [ExtentLine("RW", sectors, "SPARSE", _NAME)]
        self._writer = StreamWriter(sectors, descriptor(options, lines, NO_PARENT))

    def pack(self, data: memoryview) -> bytes | None:
        """One grain compressed."""
        return pack_grain_data(data, GRAIN_SIZE)

    def head(self) -> Iterator[bytes]:
        """Header and descriptor."""
        yield self._writer.begin()

    def put(self, start: int, view: memoryview, packed: Packed) -> Iterable[Buffer]:
        """Grains from ``start`` on."""
        return [
            self._writer.grain(offset // GRAIN_SIZE, packed[offset])
            for offset in range(start, start + len(view), GRAIN_SIZE)
        ]

    def tail(self) -> bytes:
        """The last tables, and the footer that leads to them."""
        return self._writer.finish()
