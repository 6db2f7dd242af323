"""`blk daemon`: the live block layer as a program (used like qemu-storage-daemon).

1. Options are carried out one by one (``setting_up``); the first error ends the program with
   nothing left behind.
2. SIGTERM, SIGINT, SIGHUP and ``quit`` end it in order: jobs are cancelled, caches and bitmaps are
   stored, and the exit code is 0 unless something could not be stored.
3. With ``--daemonize`` the first process ends when everything is set up, or has failed.
"""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec

from blocklayer.cli.background import PidFile, detach, in_background
from blocklayer.cli.daemon import setting_up
from blocklayer.cli.options import Command, CommandLineError, Option

if TYPE_CHECKING:
    pass


NO_TEXTS: list[str] = msgspec.field(default_factory=list)


_EMULATOR = "Options of the emulator"


class Daemon(Command):
    """Run the live block layer (used like qemu-storage-daemon)

    Disks are named, opened and changed while they are used; clients speak QMP to it.
    """

    EXAMPLE = (
        "--blockdev driver=file,filename=a.raw,node-name=a "
        "--chardev socket,id=m,path=q.sock,server=on,wait=off --monitor m",
        "open a disk and listen for clients of QMP",
    )

    ONE_DASH = True

    blockdev: Annotated[
        list[str], Option("open a node; options as text or JSON", value="OPTIONS")
    ] = NO_TEXTS
    chardev: Annotated[
        list[str], Option("add a character device, which a monitor can use", value="OPTIONS")
    ] = NO_TEXTS
    monitor: Annotated[
        list[str],
        Option(
            "serve QMP on a character device ([chardev=]ID[,pretty=on]), or the human monitor "
            "on a device of its own (stdio, unix:PATH,server=on,wait=off)",
            value="OPTIONS",
        ),
    ] = NO_TEXTS
    nbd_server: Annotated[list[str], Option("start an NBD server", value="OPTIONS")] = NO_TEXTS
    export: Annotated[
        list[str], Option("export a node ([type=]nbd,id=ID,node-name=NODE…)", value="OPTIONS")
    ] = NO_TEXTS
    object: Annotated[
        list[str], Option("add an object (secret, throttle-group…)", value="OPTIONS")
    ] = NO_TEXTS
    state: Annotated[
        str | None,
        Option("keep the nodes in a file, and open again what it says", value="FILE"),
    ] = None
    pidfile: Annotated[
        str | None, Option("write the process id to a file when ready", value="FILE")
    ] = None
    daemonize: Annotated[bool, Option("go to the background when ready")] = False
    drive: Annotated[
        list[str],
        Option(
            "open an image as a drive (file=NAME,if=virtio,…)", value="OPTIONS", group=_EMULATOR
        ),
    ] = NO_TEXTS
    device: Annotated[
        list[str],
        Option(
            "plug a device in (virtio-blk-pci,drive=NODE,id=ID…)", value="OPTIONS", group=_EMULATOR
        ),
    ] = NO_TEXTS
    qmp: Annotated[
        list[str],
        Option(
            "serve QMP on a device (unix:PATH,server=on,wait=off)", value="DEVICE", group=_EMULATOR
        ),
    ] = NO_TEXTS
    qmp_pretty: Annotated[
        list[str], Option("the same, with JSON over several lines", value="DEVICE", group=_EMULATOR)
    ] = NO_TEXTS
    mon: Annotated[
        list[str],
        Option(
            "serve a monitor on a character device ([chardev=]ID,mode=readline)",
            value="OPTIONS",
            group=_EMULATOR,
        ),
    ] = NO_TEXTS
    add_fd: Annotated[
        list[str],
        Option(
            "put an inherited descriptor into a set (fd=N,set=M)", value="OPTIONS", group=_EMULATOR
        ),
    ] = NO_TEXTS
    snapshot: Annotated[bool, Option("throw away what is written to drives", group=_EMULATOR)] = (
        False
    )
    name: Annotated[str | None, Option("what query-name answers", value="NAME")] = None

    def run_alone(self) -> int:
        """Serve until told to end."""
        if self.operands:
            raise CommandLineError(f"Unexpected argument: {self.operands[0]}")
        return in_background(partial(_in_loop, self)) if self.daemonize else _in_loop(self)


def _in_loop(command: Daemon, ready: int | None = None) -> int:
    with asyncio.Runner() as runner:
        return runner.run(_serve(command, ready))


async def _serve(command: Daemon, ready: int | None) -> int:
    # Declares its command of the human monitor.
    from blocklayer.cli.daemon import disk_io  # noqa: F401
    from blocklayer.daemon.daemon import Daemon as LiveDaemon
    from blocklayer.qmp.server import Server

    async with LiveDaemon() as daemon:
        server = Server(daemon, name=command.name)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, server.quit)
        try:
            await setting_up.set_up(server, command.uses)
            pid = PidFile(command.pidfile) if command.pidfile is not None else None
            try:
                if ready is not None:
                    detach(ready)
                await server.stopping.wait()
            finally:
                if pid is not None:
                    pid.remove()
        finally:
            await server.close()
    return 0
