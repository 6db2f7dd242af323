"""The session of `blk io`: the image that is open, requests under way, and opening images.

1. At most one image is open. Closing it, and reopening, waits for its requests first.
2. Reopening closes and opens: if the new options do not fit, the image is open with the old ones.
3. The overlay of ``-s`` is a temporary file whose name is gone before the first command runs, so
   nothing of it stays behind however the program ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from blocklayer.api.disk import CACHE_MODES
from blocklayer.cli import console
from blocklayer.cli.common import warn_if_guessed
from blocklayer.cli.objects import new_graph
from blocklayer.errors import BlockError, UsageError
from blocklayer.graph.filename import image_options
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image, open_options
from blocklayer.graph.options import unflatten
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.graph.temporary import temporary_storage

AIO_MODES = ("threads", "native", "io_uring")
DISCARD_MODES = {"ignore": False, "off": False, "unmap": True, "on": True}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """How an image is to be opened."""

    name: str | None = None
    format: str | None = None
    options: Mapping[str, str] = {}
    """Dotted keys, on top of what ``name`` stands for."""
    read_only: bool = False
    snapshot: bool = False
    copy_on_read: bool = False
    force_share: bool = False
    cache: str = "writethrough"
    discard: str = "unmap"
    aio: str = "threads"

    def check(self) -> None:
        """Raise UsageError for modes that do not exist."""
        if self.cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {self.cache}")
        if self.discard not in DISCARD_MODES:
            raise UsageError(f"Invalid discard option: {self.discard}")
        if self.aio not in AIO_MODES:
            raise UsageError(f"Invalid aio option: {self.aio}")

    @property
    def title(self) -> str:
        """The image in "can't open device a.raw"."""
        return "" if self.name is None else f" device {self.name}"

    def flags(self, *, read_only: bool) -> Flags:
        """The generic options of the node."""
        _, direct, no_flush = CACHE_MODES[self.cache]
        return Flags(
            read_only=read_only,
            direct=direct,
            no_flush=no_flush,
            force_share=self.force_share,
            discard_unmap=DISCARD_MODES[self.discard],
        )


class Image:
    """An open image. ``node`` is what the user named, or the overlay; requests go to ``root``."""

    node: Node
    root: Root

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.graph = new_graph()
        self._overlay: Node | None = None

    async def open(self) -> None:
        """Open it. On error nothing stays open, but for the storage of an overlay."""
        wanted = self.wanted
        if wanted.copy_on_read and wanted.read_only:
            raise UsageError("Can't use copy-on-read on read-only device")
        if wanted.aio == "native" and not CACHE_MODES[wanted.cache][1]:
            raise UsageError(
                "aio=native was specified, but it requires cache.direct=on, "
                "which was not specified."
            )
        try:
            top = await self._open_named()
            if wanted.snapshot:
                top = await self._open_overlay(top)
            self.node = top
            if wanted.copy_on_read:
                top = await open_options(
                    self.graph, {"driver": "copy-on-read", "file": top.name}, top.flags
                )
            taken = int(Permission.CONSISTENT_READ)
            if not top.read_only:
                taken |= Permission.WRITE | Permission.RESIZE
            write_through = CACHE_MODES[wanted.cache][0]
            self.root = Root(top, console.program, taken, write_through=write_through)
        except BaseException:
            await self._release_all()
            raise

    async def _release_all(self) -> None:
        for node in list(self.graph.nodes.values()):
            await self.graph.release(node)

    async def _open_named(self) -> Node:
        wanted = self.wanted
        flags = wanted.flags(read_only=wanted.read_only or wanted.snapshot)
        given = unflatten(wanted.options)
        if wanted.name is None:
            return await open_image(self.graph, given, flags=flags)
        format = given.pop("driver", wanted.format)
        if not given:
            return await open_image(self.graph, wanted.name, format=format, flags=flags)
        named = image_options(wanted.name, self.graph.registry, format)
        return await open_image(self.graph, _merged(named, given), flags=flags)

    async def _open_overlay(self, base: Node) -> Node:
        wanted = self.wanted
        if self._overlay is None:
            self._overlay = await self._make_overlay(base.size)
        return await open_options(
            self.graph,
            {"driver": "qcow2", "file": self._overlay.name, "backing": base.name},
            wanted.flags(read_only=wanted.read_only),
        )

    async def _make_overlay(self, size: int) -> Node:
        storage = await temporary_storage(self.graph, size)
        # Outlives the node above it, which reopening closes.
        storage.held = True
        return storage

    async def close(self) -> None:
        """Close it, but for the storage of an overlay: it can be opened again."""
        await self.root.close()

    async def forget_overlay(self) -> None:
        """Drop the overlay and what was written to it."""
        overlay, self._overlay = self._overlay, None
        if overlay is not None:
            overlay.held = False
            await self.graph.release(overlay)


def _merged(named: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``named`` with the members of ``given`` put in; none may be there already."""
    merged = {**named}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif key in merged:
            raise UsageError("Can't specify 'file' and 'filename' options at the same time")
        else:
            merged[key] = value
    return merged


class Session:
    """What commands work on."""

    def __init__(self, *, misaligned: bool = False) -> None:
        self.misaligned = misaligned
        self.image: Image | None = None
        self.finished = False
        self.pending: set[asyncio.Task[None]] = set()

    @property
    def root(self) -> Root:
        """The way to the open image; commands that use it declare ``needs_image``."""
        assert self.image is not None
        return self.image.root

    @property
    def node(self) -> Node:
        """The node that the user means, below any filter that ``-C`` added."""
        assert self.image is not None
        return self.image.node

    def buffer(self, length: int) -> memoryview:
        """A buffer for data; with ``-m`` it starts at an odd address, as O_DIRECT does not like."""
        if self.misaligned:
            return memoryview(bytearray(length + 1))[1:]
        return memoryview(bytearray(length))

    def start(self, request: Coroutine[Any, Any, None]) -> None:
        """Carry out ``request`` beside what follows."""
        self.pending.add(asyncio.get_running_loop().create_task(request))

    async def drain(self) -> None:
        """Wait for all requests that were started."""
        while self.pending:
            done, self.pending = self.pending, set()
            await asyncio.gather(*done)

    async def open(self, wanted: Wanted) -> None:
        """Open an image. Raises BlockError that says what could not be opened."""
        if self.image is not None:
            raise UsageError("file open already, try 'help close'")
        wanted.check()
        image = Image(wanted)
        try:
            await image.open()
        except BlockError as error:
            await image.forget_overlay()
            raise error.reworded(f"can't open{wanted.title}: {error}") from error
        self.image = image
        if not image.node.read_only and wanted.name is not None:
            warn_if_guessed(image.node, wanted.name)

    async def reopen(self, wanted: Wanted) -> None:
        """Open the same image as ``wanted``; on error it is open as before."""
        image = self.image
        assert image is not None
        await self.drain()
        before, self.image = image.wanted, None
        await image.close()
        try:
            image.wanted = wanted
            await image.open()
        except BlockError:
            image.wanted = before
            await image.open()
            raise
        finally:
            if image.graph.roots:
                self.image = image

    async def close(self) -> None:
        """Close the image, if one is open, after all requests are done."""
        try:
            await self.drain()
        finally:
            image, self.image = self.image, None
            if image is not None:
                await image.close()
                await image.forget_overlay()
