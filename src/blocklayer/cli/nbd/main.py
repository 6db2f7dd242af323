"""`blk nbd`: the command line, and what of it does not go together.

1. Everything that can be refused without touching an image or a socket is refused first.
2. With ``--fork`` the first process ends when clients may come, or when it failed.
"""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Final

import msgspec

from blocklayer.cli.options import Command, CommandLineError, Option
from blocklayer.codec.addresses import AnyAddress, InetSocketAddress, UnixSocketAddress
from blocklayer.codec.nbd.constants import DEFAULT_PORT
from blocklayer.errors import UsageError
from blocklayer.units import parse_size

Names = list[str]
"""One for each use of an option; ``list`` is an option itself below."""
NO_TEXTS: Names = msgspec.field(default_factory=list)
PLACE: Final = "Where it is served"
PART: Final = "What is served"
IMAGE: Final = "How the image is opened"
_MAX_COUNT: Final = 2**31 - 1


class Nbd(Command):
    """Serve an image by NBD (used like qemu-nbd)

    It ends when the last client has left, unless told to stay (-t).
    """

    OPERANDS = (("[FILENAME]", "image file name (or specification with --image-opts)"),)
    EXAMPLE = ("-t -k disk.sock -f qcow2 disk.qcow2", "serves until it is stopped")

    port: Annotated[str | None, Option("port (default 10809)", "p", "PORT", group=PLACE)] = None
    bind: Annotated[
        str | None, Option("address (default 0.0.0.0)", "b", "ADDRESS", group=PLACE)
    ] = None
    socket: Annotated[
        str | None, Option("path of a Unix socket, in place of a port", "k", "PATH", group=PLACE)
    ] = None
    shared: Annotated[
        str, Option("serve so many clients at once (default 1), 0: any number", "e", "NUM")
    ] = "1"
    persistent: Annotated[bool, Option("stay when the last client has left", "t")] = False
    handshake_limit: Annotated[
        str, Option("drop clients that do not get ready in time (default 10, 0: never)",
                    value="SECONDS")
    ] = "10"  # fmt: skip
    export_name: Annotated[
        str, Option("name of the export (default empty)", "x", "NAME", group=PART)
    ] = ""
    description: Annotated[
        str, Option("what clients are told about it", "D", "TEXT", group=PART)
    ] = ""
    offset: Annotated[str, Option("leave out the image's start", "o", "OFFSET", group=PART)] = "0"
    allocation_depth: Annotated[
        bool, Option("tell which layer of the chain holds what", "A", group=PART)
    ] = False
    bitmap: Annotated[
        Names,
        Option("tell what a dirty bitmap of the chain says (repeatable)", "B", "NAME", group=PART),
    ] = NO_TEXTS
    format: Annotated[
        str | None, Option("format of the image, else it is guessed", "f", "FMT", group=IMAGE)
    ] = None
    image_opts: Annotated[
        bool, Option("FILENAME is a list of options, driver=…,file.filename=…", group=IMAGE)
    ] = False
    read_only: Annotated[bool, Option("take no writes", "r", group=IMAGE)] = False
    snapshot: Annotated[
        bool, Option("write to an overlay that is thrown away at the end", "s", group=IMAGE)
    ] = False
    load_snapshot: Annotated[
        str | None,
        Option(
            "serve this internal snapshot, read-only: snapshot.id=ID,snapshot.name=NAME, or "
            "either alone", "l", "SNAPSHOT", group=IMAGE,
        ),
    ] = None  # fmt: skip
    nocache: Annotated[bool, Option("short for --cache=none", "n", group=IMAGE)] = False
    cache: Annotated[
        str | None, Option("cache mode (default writeback)", value="MODE", group=IMAGE)
    ] = None
    aio: Annotated[
        str | None,
        Option("threads, native or io_uring; served alike in all", value="MODE", group=IMAGE),
    ] = None
    discard: Annotated[
        str, Option("ignore (default) or unmap what is discarded", value="MODE", group=IMAGE)
    ] = "ignore"
    detect_zeroes: Annotated[
        str, Option("off (default), on or unmap", value="MODE", group=IMAGE)
    ] = "off"
    list: Annotated[bool, Option("list what another server exports", "L")] = False
    tls_creds: Annotated[str | None, Option("encrypt, by an object tls-creds-x509", value="ID")] = (
        None
    )
    tls_authz: Annotated[
        str | None, Option("let in only whom an object authz-… allows", value="ID")
    ] = None
    tls_hostname: Annotated[
        str | None, Option("the server's name, for --list", value="HOSTNAME")
    ] = None
    fork: Annotated[bool, Option("go to the background when ready")] = False
    pid_file: Annotated[
        str | None, Option("write the process id to a file when ready", value="PATH")
    ] = None
    verbose: Annotated[bool, Option("tell of clients that are sent away", "v")] = False

    def run_alone(self) -> int | None:
        """Serve until told to end."""
        self.check()
        if self.list:
            return None
        from blocklayer.cli.nbd.serving import serve
        from blocklayer.cli.objects import define

        define(self.object)
        if self.fork:
            from blocklayer.cli.background import in_background

            return in_background(lambda ready: asyncio.run(serve(self, ready)))
        return asyncio.run(serve(self, None))

    async def run(self) -> int:
        """List."""
        from blocklayer.cli.nbd.listing import list_exports

        return await list_exports(self)

    def check(self) -> None:
        """Raise UsageError for what cannot be."""
        if (self.nocache and self.cache is not None) or self._uses("cache") > 1:
            raise UsageError("-n and --cache can only be specified once")
        for value, choices, name in (
            (self.cache, ("none", "writeback", "writethrough", "directsync", "unsafe"), "cache"),
            (self.aio, ("threads", "native", "io_uring"), "aio"),
            (self.discard, ("ignore", "off", "unmap", "on"), "discard"),
        ):
            if value is not None and value not in choices:
                quoted = f"`{value}'" if name in ("cache", "discard") else f"'{value}'"
                raise UsageError(f"Invalid {name} mode {quoted}")
        if self.detect_zeroes not in ("off", "on", "unmap"):
            raise UsageError(
                f"Failed to parse detect_zeroes mode: invalid parameter value: {self.detect_zeroes}"
            )
        if self.detect_zeroes == "unmap" and not self.unmaps:
            raise UsageError(
                "setting detect-zeroes to unmap is not allowed without setting discard operation "
                "to unmap"
            )
        for parse in (self.clients, self.handshake_seconds, self.start):
            parse()
        if self.image_opts and self.format is not None:
            raise UsageError("--image-opts and -f are mutually exclusive")
        if self.tls_authz is not None and self.tls_creds is None:
            raise UsageError("--tls-authz is not permitted without --tls-creds")
        if self.tls_hostname is not None and not self.list:
            raise UsageError("--tls-hostname is for --list")
        if self.list and self.operands:
            raise UsageError("List mode is incompatible with a file name")
        if not self.list and len(self.operands) != 1:
            raise CommandLineError("Invalid number of arguments")

    def _uses(self, name: str) -> int:
        return sum(used == name for used, _ in self.uses)

    @property
    def unmaps(self) -> bool:
        """Whether discards reach the image."""
        return self.discard in ("unmap", "on")

    def clients(self) -> int:
        """How many clients may come at once; 0: any number."""
        return _count(self.shared, f"Invalid shared device number '{self.shared}'")

    def handshake_seconds(self) -> int:
        """How long a client's handshake may take; 0: for ever."""
        limit = self.handshake_limit
        return _count(limit, f"Invalid handshake limit '{limit}'")

    def start(self) -> int:
        """Bytes of the image that are left out."""
        try:
            return parse_size(self.offset)
        except UsageError:
            raise UsageError(f"Invalid offset '{self.offset}'") from None

    def address(self) -> AnyAddress:
        """Where to listen, or what to list."""
        if self.socket is not None:
            if self.port is not None or self.bind is not None:
                raise UsageError("A socket (-k) goes with neither port nor address")
            return UnixSocketAddress(path=os.path.abspath(self.socket))
        port = str(DEFAULT_PORT) if self.port is None else self.port
        return InetSocketAddress(host=self.bind or "0.0.0.0", port=port)


def _count(text: str, complaint: str) -> int:
    if not text.isdigit() or int(text) > _MAX_COUNT:
        raise UsageError(complaint)
    return int(text)
