"""Disks as streams of bytes: a new image in chunks, for HTTP and object stores; nothing is stored.

1. From its making to its end, the disk cannot be written by anybody: a disk that is open for
   writing cannot be streamed.
2. Chunks come in order, each once; the stream closes itself after the last.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any

from blocklayer.api.disk import Disk
from blocklayer.errors import UsageError
from blocklayer.graph.create import prepare
from blocklayer.graph.driver import Buffer
from blocklayer.graph.graph import Graph
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.graph.streams import ImageStream
from blocklayer.jobs.streaming import Streaming, StreamOptions
from blocklayer.units import SECTOR, align_up

STREAM_NAME = "-"


class Stream:
    """A new image as chunks of bytes: ``async for chunk in stream``. Made by ``stream``."""

    def __init__(self, root: Root, image: ImageStream, options: StreamOptions) -> None:
        self._root: Root | None = root
        self._image = image
        self._streaming = Streaming([root], image, options)
        self._chunks: AsyncGenerator[Buffer, None] | None = None

    @property
    def size(self) -> int | None:
        """Bytes of all chunks together (HTTP's Content-Length); None for vmdk, where only the end
        tells."""
        return self._image.length

    async def plan(self) -> None:
        """Find out what is to be given; with compression this reads the disk."""
        await self._streaming.plan()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        if self._chunks is not None or self._root is None:
            raise UsageError("A stream can be read once")
        self._chunks = self._streaming.chunks()
        try:
            async for chunk in self._chunks:
                yield bytes(chunk)
        finally:
            await self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the disk, wherever the stream is."""
        root, self._root = self._root, None
        if self._chunks is not None:
            await self._chunks.aclose()
        if root is not None:
            await root.close()


async def image_stream(
    graph: Graph,
    format: str,
    values: dict[str, Any],
    size: int,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    compress: bool = False,
    compression_level: int | None = None,
) -> ImageStream:
    """A new image of ``size`` bytes to be streamed; ``values`` go by the names of ``-o``.

    Raises UsageError, or UnsupportedError where ``format`` or an option rules a stream out.
    """
    options, storage = await prepare(
        graph, STREAM_NAME, format, values, size, backing, backing_format, True
    )
    if storage:
        raise UsageError(f"Option '{next(iter(storage))}' has no meaning for a stream")
    driver = graph.registry.load_format(format)
    if compression_level is not None and not compress:
        raise UsageError("A compression level has no effect without compression")
    return driver.stream(options, compress=compress, level=compression_level)


async def stream(
    disk: Disk,
    format: str = "qcow2",
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    compress: bool = False,
    compression_level: int | None = None,
    sparse_size: int | None = None,
    **options: Any,
) -> Stream:
    """What ``disk`` shows, as the bytes of a new image of ``format`` (raw, qcow2, vmdk).

    ``options`` go by the names of ``-o``. With ``backing``, an image that shows what those below
    the disk's top layer show, the new one holds the top layer only. ``sparse_size`` (bytes) lets
    the disk be read first, to leave out zeros that its metadata does not know of; 0 leaves nothing
    out. Raises BlockError before the first chunk for what can be known before.
    """
    image = await image_stream(
        disk.graph,
        format,
        options,
        align_up(disk.size, SECTOR),
        backing=backing,
        backing_format=backing_format,
        compress=compress,
        compression_level=compression_level,
    )
    taken = Permission.CONSISTENT_READ
    root = Root(disk.root.node, "the stream", taken, taken | Permission.WRITE_UNCHANGED)
    overlay = backing is not None or bool(options.get("backing_file"))
    copy = StreamOptions(sparse_size=sparse_size, top_only=overlay)
    made = Stream(root, image, copy)
    try:
        await made.plan()
    except BaseException:
        await made.close()
        raise
    return made
