"""Human monitor commands, by way of QMP."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from blocklayer.qmp.commands.table import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.registry import Arguments


class HumanMonitorCommand(Arguments):
    """A line for the human monitor; there are no processors for ``cpu-index`` to choose from."""

    command_line: str
    cpu_index: int | UnsetType = UNSET


@COMMANDS.command("human-monitor-command")
async def human_monitor_command(monitor: Monitor, arguments: HumanMonitorCommand) -> str:
    """Carry out a line of the human monitor; what it prints."""
    return await monitor.server.human_commands.execute(monitor.server, arguments.command_line)
