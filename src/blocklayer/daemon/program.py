"""The daemon as a program uses it: disks by name, and what can be done with them while in use.

    async with blocklayer.Daemon() as daemon:
        disk = await daemon.add("disk0", "disk0.qcow2")
        await disk.write(0, b"hello")
        await daemon.snapshot("disk0", overlay="o1.qcow2")
        await daemon.commit("disk0")

1. A disk's name stays with the disk: it goes on where overlays, copies and pivots take it. What
   is no longer part of it is closed.
2. Each method is a call of what QMP's commands call, and returns when it is done. Cancelling the
   task that waits calls the job off; then the disk goes on as it was.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from blocklayer.api.disk import CACHE_MODES, Disk, Image
from blocklayer.api.progress import Meter, Progress
from blocklayer.daemon import daemon as core
from blocklayer.errors import BlockError, CancelledError, UsageError
from blocklayer.graph.graph import is_well_formed_id
from blocklayer.graph.node import Flags, Node
from blocklayer.graph.open import open_image
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import parse_size

if TYPE_CHECKING:
    from blocklayer.jobs.job import Job

SyncMode = Literal["full", "top", "none"]
Report = Callable[[Progress], None]
_USE = int(Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE)
_POLL_S = 0.1


class Daemon(core.Daemon):
    """A live block layer with disks by name. Use it on one event loop only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.disks: dict[str, Disk] = {}
        """The disks that ``add`` opened, by name."""
        self._servers: dict[str, str] = {}
        """Names of NBD servers by the address they listen on."""
        self.front_ends.append(self._close_disks)

    async def add(
        self,
        name: str,
        image: Image,
        *,
        format: str | None = None,
        read_only: bool = False,
        cache: str = "writeback",
    ) -> Disk:
        """Open ``image`` with its backing chain as the disk ``name``; ``format`` None guesses it.

        The node of the image gets the same name, unless it names its own. Raises BlockError.
        """
        if name in self.disks:
            raise UsageError(f"There is a disk '{name}' already")
        if not is_well_formed_id(name):
            raise UsageError(f"Invalid disk name '{name}': a letter, then letters, digits, -._")
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache mode '{cache}': use one of {', '.join(CACHE_MODES)}")
        write_through, direct, no_flush = CACHE_MODES[cache]
        flags = Flags(read_only=read_only, direct=direct, no_flush=no_flush, discard_unmap=True)
        source = self._named(name, image, format)
        node = await open_image(self.graph, source, format=None, flags=flags)
        try:
            taken = int(Permission.CONSISTENT_READ) if read_only else _USE
            disk = Disk(Root(node, f"disk '{name}'", taken, write_through=write_through))
        except BaseException:
            await self.graph.release(node)
            raise
        self.disks[name] = disk
        return disk

    def _named(self, name: str, image: Image, format: str | None) -> dict[str, Any]:
        """Options of ``image`` with a node's name among them."""
        from blocklayer.graph.filename import image_options

        if isinstance(image, Mapping):
            options = dict(image)
            if format is not None:
                options.setdefault("driver", format)
        else:
            options = image_options(os.fspath(image), self.graph.registry, format)
        return {"node-name": name, **options}

    def disk(self, name: str) -> Disk:
        """The disk ``name``. Raises UsageError."""
        try:
            return self.disks[name]
        except KeyError:
            known = ", ".join(self.disks) or "none"
            raise UsageError(f"There is no disk '{name}' (disks: {known})") from None

    async def remove(self, name: str) -> None:
        """Write back and close the disk. Raises BlockError, and then it is closed all the same."""
        disk = self.disk(name)
        del self.disks[name]
        await disk.close()

    async def snapshot(
        self, disk: str | Mapping[str, str | os.PathLike[str]], overlay: str | None = None
    ) -> None:
        """Keep the disk as it is now: it continues in ``overlay``, a new qcow2 image above it.

        Of several disks at one instant, all or none: ``snapshot({"a": "a1.qcow2", …})``.
        """
        from blocklayer.daemon.transactions import transaction

        if isinstance(disk, str):
            if overlay is None:
                raise UsageError("Expecting the file name of the overlay")
            disk = {disk: overlay}
        actions = [
            (
                "blockdev-snapshot-sync",
                {
                    "node-name": self._node(name).name,
                    "snapshot-file": os.fspath(file),
                    "snapshot-node-name": self._free_name(f"{name}-snapshot"),
                },
            )
            for name, file in disk.items()
        ]
        await transaction(self, actions)

    async def commit(
        self,
        disk: str,
        *,
        base: str | None = None,
        top: str | None = None,
        pivot: bool = True,
        speed: int = 0,
        progress: Report | None = None,
    ) -> None:
        """Move what the layers from ``top`` (None: the active one) hold down into ``base``.

        Layers are named by node or file; base None is the lowest. Of the active layer: with
        ``pivot`` the base becomes the disk, without the disk stays on its overlay. ``speed`` in
        bytes a second, 0 is no limit.
        """
        from blocklayer.daemon.operations import BlockCommit, block_commit

        node = self._node(disk)
        arguments = BlockCommit(job_id=f"commit-{disk}", device=node.name, speed=speed)
        arguments.base_node, arguments.base = self._layer(base)
        arguments.top_node, arguments.top = self._layer(top)
        await self._finish(await block_commit(self, arguments), pivot, progress)

    async def stream(
        self, disk: str, *, base: str | None = None, speed: int = 0, progress: Report | None = None
    ) -> None:
        """Copy what the layers above ``base`` (None: all) hold up into the active one."""
        from blocklayer.daemon.operations import BlockStream, block_stream

        arguments = BlockStream(job_id=f"stream-{disk}", device=self._node(disk).name, speed=speed)
        arguments.base_node, arguments.base = self._layer(base)
        await self._finish(await block_stream(self, arguments), False, progress)

    async def mirror(
        self,
        disk: str,
        target: str | os.PathLike[str],
        *,
        sync: SyncMode = "full",
        format: str | None = None,
        pivot: bool = False,
        reuse: bool = False,
        write_blocking: bool = False,
        speed: int = 0,
        progress: Report | None = None,
        when_ready: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Copy the disk to ``target`` (a file, or an NBD URI) until both are the same.

        Then, after ``when_ready`` was awaited, ``pivot`` makes the target the disk; without it, it
        is a copy of that moment. A file is made unless ``reuse``. ``write_blocking`` stores each
        write in both at once.
        """
        from blocklayer.daemon.mirrors import DriveMirror, drive_mirror

        name = os.fspath(target)
        existing = reuse or name.startswith("nbd")
        arguments = DriveMirror(
            job_id=f"mirror-{disk}", device=self._node(disk).name, target=name, sync=sync,
            format=format or ("raw" if name.startswith("nbd") else None), speed=speed,
            mode="existing" if existing else "absolute-paths",
            copy_mode="write-blocking" if write_blocking else "background",
        )  # fmt: skip
        await self._finish(await drive_mirror(self, arguments), pivot, progress, when_ready)

    async def backup(
        self,
        disk: str,
        target: str | os.PathLike[str],
        *,
        sync: Literal["full", "top", "none", "incremental", "bitmap"] = "full",
        bitmap: str | None = None,
        checkpoint: str | None = None,
        format: str | None = None,
        reuse: bool = False,
        compress: bool = False,
        speed: int = 0,
        progress: Report | None = None,
    ) -> None:
        """Copy the disk as it is now to ``target``, while it goes on changing.

        With ``incremental`` what ``bitmap`` has recorded; it starts anew when the backup is there.
        ``checkpoint`` names a new bitmap that records from the backup's instant on.
        """
        from blocklayer.daemon.backups import DriveBackup
        from blocklayer.daemon.bitmaps import BlockDirtyBitmapAdd
        from blocklayer.daemon.transactions import transaction

        arguments = DriveBackup(
            job_id=f"backup-{disk}", device=self._node(disk).name, target=os.fspath(target),
            sync=sync, bitmap=bitmap,
            bitmap_mode="on-success" if sync == "bitmap" else None,
            format=format, compress=compress, speed=speed,
            mode="existing" if reuse else "absolute-paths", auto_dismiss=False,
        )  # fmt: skip
        actions: list[tuple[str, Any]] = [("drive-backup", arguments)]
        if checkpoint is not None:
            node = self._node(disk)
            kept = node.chain()[0].driver.NAME == "qcow2"
            added = BlockDirtyBitmapAdd(node=node.name, name=checkpoint, persistent=kept)
            actions.append(("block-dirty-bitmap-add", added))
        await transaction(self, actions)
        job = self.jobs.find(f"backup-{disk}")
        assert job is not None, "only dismissed by us"
        try:
            await self._finish(job, False, progress)
        finally:
            job.dismiss()

    async def export(self, disk: str, uri: str, *, writable: bool = True) -> None:
        """Serve the disk by NBD at ``uri``: nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH.

        Raises BlockError.
        """
        from blocklayer.codec.addresses import InetSocket, UnixSocket
        from blocklayer.daemon import exports
        from blocklayer.drivers.nbd.names import parse

        parsed = parse(uri)
        address = msgspec.convert(parsed["server"], InetSocket | UnixSocket)
        server = str(address)
        if server not in self.nbd_servers:
            await exports.nbd_server_start(self, address, server=server)
        name = parsed.get("export", disk)
        await exports.block_export_add(
            self, f"export-{disk}", self._node(disk).name, name=name, writable=writable,
            server=server,
        )  # fmt: skip

    async def unexport(self, disk: str) -> None:
        """Serve the disk no more; clients are disconnected."""
        from blocklayer.daemon import exports

        await exports.block_export_del(self, f"export-{disk}", "hard")

    async def resize(self, disk: str, size: int | str) -> None:
        """Change the disk's size, in bytes or as "20G". Raises BlockError."""
        from blocklayer.daemon import nodes

        wanted = parse_size(size) if isinstance(size, str) else size
        await nodes.resize(self, wanted, node_name=self._node(disk).name)

    def _node(self, disk: str) -> Node:
        return self.disk(disk).root.node

    def _layer(self, name: str | None) -> tuple[str | None, str | None]:
        """``name`` of a layer as a node's name or as a file's."""
        return (name, None) if name in self.graph.nodes else (None, name)

    def _free_name(self, wanted: str) -> str:
        """A node name that begins like ``wanted``."""
        number = 1
        while (name := f"{wanted[:25]}{number}") in self.graph.nodes:
            number += 1
        return name

    async def _finish(
        self,
        job: Job,
        pivot: bool,
        report: Report | None,
        when_ready: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Wait for the job's end, completing it when it is ready; raises its error."""
        meter = Meter(report) if report is not None else None
        news = asyncio.Event()

        def hear(event: object) -> None:
            news.set()

        self.graph.listeners.append(hear)
        told = False
        try:
            while not job.ended.is_set():
                news.clear()
                if meter is not None and job.total:
                    meter.update(job.done, job.total)
                if job.ready and not told:
                    told = True
                    if when_ready is not None:
                        await when_ready()
                    if pivot:
                        job.complete()
                    else:
                        job.cancel(force=False)
                ended = asyncio.ensure_future(job.ended.wait())
                heard = asyncio.ensure_future(news.wait())
                await asyncio.wait(
                    (ended, heard), timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                ended.cancel()
                heard.cancel()
        except BaseException:
            await _call_off(job)
            raise
        finally:
            self.graph.listeners.remove(hear)
        if job.error is not None:
            raise CancelledError(str(job.error)) if job.cancelled else job.error

    async def _close_disks(self) -> None:
        failure: BlockError | None = None
        await self.jobs.cancel_all()
        while self.disks:
            _, disk = self.disks.popitem()
            try:
                await disk.close()
            except BlockError as error:
                failure = failure or error
        if failure is not None:
            raise failure


async def _call_off(job: Job) -> None:
    """Cancel the job, and wait until what it holds is given back."""
    try:
        job.cancel()
    except UsageError:
        # It is ending already.
        pass
    await asyncio.shield(job.ended.wait())
