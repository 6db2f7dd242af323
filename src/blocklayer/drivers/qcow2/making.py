"""What the qcow2 driver does before there is an image: make a file or a stream, and measure.

1. Nothing here needs an open image, and each part is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocklayer.drivers.qcow2.create import Qcow2CreateOptions
from blocklayer.graph.driver import FormatDriver, Measured, Measurement
from blocklayer.graph.options import CreateOptions as AnyCreateOptions

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node
    from blocklayer.graph.streams import ImageStream


class Qcow2Maker(FormatDriver):
    """The driver's class methods for new images."""

    NAME: ClassVar[str] = "qcow2"
    CreateOptions = Qcow2CreateOptions

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: AnyCreateOptions) -> None:
        """Write a new image to ``target``."""
        from blocklayer.drivers.qcow2.create import create

        assert isinstance(options, Qcow2CreateOptions)
        await create(graph, target, options)

    @classmethod
    async def measure(
        cls, options: AnyCreateOptions, size: int, source: Measured | None
    ) -> Measurement:
        """Metadata for the whole disk, and the clusters that ``source`` has data in."""
        from blocklayer.drivers.qcow2.measure import measure

        assert isinstance(options, Qcow2CreateOptions)
        return await measure(options, size, source)

    @classmethod
    def stream(cls, options: AnyCreateOptions, *, compress: bool, level: int | None) -> ImageStream:
        """Tables before data."""
        from blocklayer.drivers.qcow2.stream import Qcow2Stream

        assert isinstance(options, Qcow2CreateOptions)
        return Qcow2Stream(options, compress=compress, level=level)
