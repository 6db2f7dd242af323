"""The server: character devices, the monitors on them, and what all monitors share.

1. A monitor's device is its own from the first connection to the last; each connection is a
   conversation of its own, beginning with a greeting.
2. A connection that fails, or a bug in one, ends that connection; the next one is taken, and other
   monitors do not notice.
3. ``close`` lets commands under way end, and waits a bounded time for clients to take replies.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from blocklayer.errors import BlockError
from blocklayer.graph.events import EVENTS, Event
from blocklayer.qmp.chardev_options import ChardevBackend, MonitorOptions
from blocklayer.qmp.chardevs import Chardev, make_chardev
from blocklayer.qmp.commands import COMMANDS
from blocklayer.qmp.descriptors import DescriptorSets
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.events import EventHub
from blocklayer.qmp.human import HumanCommandTable
from blocklayer.qmp.human_commands import HUMAN_COMMANDS
from blocklayer.qmp.human_monitor import HumanMonitor
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import CommandTable
from blocklayer.qmp.session import Session
from blocklayer.qmp.streams import ByteStream

_RETRY_S = 1.0
"""Pause after a connection could not be taken (out of descriptors, say)."""


class Server:
    """Everything that speaks QMP, around one ``daemon``. Make it inside the event loop."""

    def __init__(
        self,
        daemon: Any = None,
        *,
        name: str | None = None,
        commands: CommandTable = COMMANDS,
        event_types: tuple[type[Event], ...] = EVENTS,
        human_commands: HumanCommandTable = HUMAN_COMMANDS,
        clock: Any = None,
    ) -> None:
        self.daemon = daemon
        self.name = name
        self.commands = commands
        self.event_types = event_types
        self.human_commands = human_commands
        self.events = EventHub(clock or asyncio.get_running_loop())
        self.chardevs: dict[str, Chardev] = {}
        self.descriptor_sets = DescriptorSets()
        self.sessions: set[Session] = set()
        self.after_command: Callable[[], None] = lambda: None
        """Called after every command that went well, before its reply."""
        self.keeps_state = False
        self.stopping = asyncio.Event()
        """Set when a client asked to quit; whoever runs the server then closes it."""
        self._tasks: set[asyncio.Task[None]] = set()
        if daemon is not None:
            daemon.graph.listeners.append(self.events.emit)

    def quit(self) -> None:
        """Ask for the end."""
        self.stopping.set()

    async def add_chardev(
        self, id: str, backend: ChardevBackend, names: Mapping[str, int] | None = None
    ) -> Chardev:
        """Open a character device. Raises CommandError and what opening raises."""
        if id in self.chardevs:
            raise CommandError(f"Chardev with id '{id}' already exists")
        chardev = make_chardev(id, backend)
        # Its name is taken at once: opening may wait, and another client may ask meanwhile.
        self.chardevs[id] = chardev
        try:
            await chardev.open(names or {})
        except BaseException:
            del self.chardevs[id]
            await chardev.close()
            raise
        return chardev

    async def remove_chardev(self, id: str) -> None:
        """Close a character device that nobody uses. Raises CommandError."""
        chardev = self.chardevs.get(id)
        if chardev is None:
            raise CommandError(f"Chardev '{id}' not found")
        if chardev.user is not None:
            raise CommandError(f"Chardev '{id}' is busy")
        del self.chardevs[id]
        await chardev.close()

    async def change_chardev(
        self, id: str, backend: ChardevBackend, names: Mapping[str, int] | None = None
    ) -> Chardev:
        """Open ``backend`` in the place of a device; on error the old one stays."""
        old = self.chardevs.get(id)
        if old is None:
            raise CommandError(f"Chardev '{id}' does not exist")
        if old.user is not None:
            raise CommandError("Chardev user does not support chardev hotswap")
        new = make_chardev(id, backend)
        try:
            await new.open(names or {})
        except BaseException:
            await new.close()
            raise
        self.chardevs[id] = new
        await old.close()
        return new

    def add_monitor(self, options: MonitorOptions) -> None:
        """Begin to serve the clients of a character device. Raises CommandError."""
        chardev = self.chardevs.get(options.chardev)
        if chardev is None:
            raise CommandError(f'chardev "{options.chardev}" not found')
        if chardev.user is not None:
            raise CommandError(f"chardev '{options.chardev}' is already in use")
        if options.pretty and options.mode == "readline":
            raise CommandError("'pretty' is not compatible with HMP monitors")
        chardev.user = options.id or f"monitor on {chardev.label}"

        def make(stream: ByteStream) -> Session:
            if options.mode == "readline":
                return HumanMonitor(self, stream)
            return Monitor(self, stream, pretty=options.pretty)

        task = asyncio.get_running_loop().create_task(self._attend(chardev, make))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def serve(self, session: Session) -> None:
        """Serve one connection to its end."""
        self.sessions.add(session)
        try:
            await session.run()
        finally:
            self.sessions.discard(session)

    async def _attend(self, chardev: Chardev, make: Callable[[ByteStream], Session]) -> None:
        while True:
            try:
                stream = await chardev.connection()
            except (OSError, BlockError):
                traceback.print_exc()
                await asyncio.sleep(_RETRY_S)
                continue
            if stream is None:
                return
            try:
                await self.serve(make(stream))
            except Exception:
                traceback.print_exc()
            chardev.disconnected()

    async def close(self) -> None:
        """End all conversations and close all devices."""
        if self.daemon is not None:
            self.daemon.graph.listeners.remove(self.events.emit)
        self.events.close()
        await asyncio.gather(*(session.flush() for session in self.sessions))
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for chardev in self.chardevs.values():
            await chardev.close()
        self.chardevs.clear()
        self.descriptor_sets.close()
