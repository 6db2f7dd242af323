"""What introspection says: whole, consistent, and what the real storage daemon says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocklayer.graph.events import EVENTS
from blocklayer.qmp.commands import COMMANDS
from blocklayer.qmp.monitor import Monitor
from blocklayer.qmp.nodes import BlockdevOptions
from blocklayer.qmp.registry import CommandTable
from blocklayer.qmp.schema import schema
from qmp.conversation import real_daemon, run, serving, talk

Entry = dict[str, Any]
ASK = {"execute": "query-qmp-schema"}

EMULATOR_ONLY = {
    "getfd", "closefd", "add-fd", "remove-fd", "query-fdsets", "query-name",
    "human-monitor-command", "DEVICE_TRAY_MOVED", "DEVICE_DELETED", "STOP", "RESUME",
    "device_add", "device_del", "eject", "blockdev-open-tray", "blockdev-close-tray",
    "blockdev-remove-medium", "blockdev-insert-medium", "blockdev-change-medium",
    "query-status", "stop", "cont", "snapshot-save", "snapshot-load", "snapshot-delete",
    "block_set_io_throttle", "block-latency-histogram-set",
}  # fmt: skip
NOT_BUILT = {"telnet", "tn3270", "websocket", "tls-creds", "tls-authz"}
"""Members of ours that real ones have: what a client gets is that they are unexpected."""
SINCE_LATER = {
    "keep-alive-count", "keep-alive-idle", "keep-alive-interval", "children", "on-cbw-error",
}  # fmt: skip
TAKES_OPTIONS = {
    "blockdev-add", "blockdev-reopen", "object-add", "blockdev-create", "x-blockdev-amend",
}  # fmt: skip
"""Their unions are those of what is built; drivers' options are looked at below."""
UNTYPED = ("format-specific.[1]", "driver-specific.[1]", "actively-synced")
"""What drivers, and some jobs, have to say of themselves is shown as it is."""

OURS = (
    ".driver.[1]: not accepted by the real one: {'memory'}",
    "..[1].memory",
    "..[1].vpc.backing",
    "..[1].qcow2.overlap-check.[1].builtin",
    "..[1].qcow2.encrypt",
    "..[1].qcow.encrypt",
    "..[1].nbd.",
)
"""Drivers and options that QEMU does not have, or whose members are not declared yet."""

NODES = CommandTable()


@NODES.command("blockdev-add")
async def blockdev_add(monitor: Monitor, arguments: BlockdevOptions) -> None:
    """Here for its arguments."""


class Types:
    """A schema to walk."""

    def __init__(self, entries: list[Entry]) -> None:
        self.by_name = {entry["name"]: entry for entry in entries}
        assert len(self.by_name) == len(entries)

    def describe(self, name: str, within: tuple[str, ...] = ()) -> Any:
        """Type `name` without the names of types; what contains itself ends in "..."."""
        entry = self.by_name[name]
        if name in within:
            return "..."
        within = (*within, name)
        match entry["meta-type"]:
            case "builtin":
                return entry["json-type"]
            case "enum":
                assert entry["values"] == [member["name"] for member in entry["members"]]
                return set(entry["values"])
            case "array":
                return [self.describe(entry["element-type"], within)]
            case "alternate":
                kinds = [self.describe(member["type"], within) for member in entry["members"]]
                return {
                    self.by_name[m["type"]]["meta-type"]: k
                    for m, k in zip(entry["members"], kinds, strict=True)
                }
            case "object":
                members = {
                    member["name"]: ("default" in member, self.describe(member["type"], within))
                    for member in entry["members"]
                }
                cases = {
                    variant["case"]: self.describe(variant["type"], within)
                    for variant in entry.get("variants", ())
                }
                return {**members, **({"": (entry["tag"], cases)} if cases else {})}
        raise AssertionError(entry)

    def walk(self) -> None:
        """Fail unless every type that is mentioned is there, and none else."""
        seen = set()
        waiting = [
            entry[part]
            for entry in self.by_name.values()
            for part in ("arg-type", "ret-type")
            if part in entry
        ]
        while waiting:
            entry = self.by_name[waiting.pop()]
            if entry["name"] in seen:
                continue
            seen.add(entry["name"])
            waiting += [m["type"] for m in entry.get("members", ()) if "type" in m]
            waiting += [v["type"] for v in entry.get("variants", ())]
            waiting += [entry["element-type"]] if "element-type" in entry else []
            if "tag" in entry:
                assert entry["tag"] in {member["name"] for member in entry["members"]}
        types = {n for n, e in self.by_name.items() if e["meta-type"] not in ("command", "event")}
        assert seen == types


def test_schema_is_whole() -> None:
    types = Types(schema(COMMANDS, EVENTS))
    types.walk()
    assert {command.name for command in COMMANDS} <= types.by_name.keys()
    assert all(command.summary for command in COMMANDS)
    Types(schema(NODES, ())).walk()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Types:
    path = tmp_path_factory.mktemp("real") / "q"
    with real_daemon(path):
        return Types(talk(path, [ASK])[0]["return"])


def differences(own: Any, real: Any, where: str, whole: bool) -> Iterator[str]:
    """Where a description is not the real one; only if it must be `whole`, what it lacks.

    Enumerations and unions may always have fewer cases.
    """
    if isinstance(own, set) and isinstance(real, set):
        if not own <= real:
            yield f"{where}: not accepted by the real one: {own - real}"
    elif isinstance(own, dict) and isinstance(real, dict):
        for name, member in own.items():
            if name in real:
                yield from differences(member, real[name], f"{where}.{name}", whole)
            elif name not in SINCE_LATER:
                yield f"{where}.{name}: the real one has none"
        if whole and not where.endswith(".[1]"):
            missing = {name for name in real if name} - own.keys() - NOT_BUILT
            if missing:
                yield f"{where}: missing: {missing}"
    elif isinstance(own, list | tuple) and type(own) is type(real) and len(own) == len(real):
        for n, (item, other) in enumerate(zip(own, real, strict=True)):
            yield from differences(item, other, f"{where}.[{n}]", whole)
    elif own != real:
        yield f"{where}: {own!r} instead of {real!r}"


@pytest.mark.oracle("qemu-storage-daemon")
def test_commands_and_events_are_qemus(theirs: Types) -> None:
    ours = Types(schema(COMMANDS, EVENTS))
    for name, entry in ours.by_name.items():
        if entry["meta-type"] not in ("command", "event") or name in EMULATOR_ONLY | TAKES_OPTIONS:
            continue
        real = theirs.by_name[name]
        assert entry.get("features") == real.get("features"), name
        assert entry.get("allow-oob") == real.get("allow-oob"), name
        for part in ("arg-type", "ret-type"):
            if name == "query-qmp-schema" or part not in real:
                continue
            own, known = ours.describe(entry[part]), theirs.describe(real[part])
            found = differences(own, known, name, whole=True)
            assert [line for line in found if not any(part in line for part in UNTYPED)] == []


@pytest.mark.oracle("qemu-storage-daemon")
def test_node_options_are_qemus(theirs: Types) -> None:
    """Every option of every driver we have is one of QEMU's, of the same type."""
    ours = Types(schema(NODES, ()))
    own = ours.describe(ours.by_name["blockdev-add"]["arg-type"])
    real = theirs.describe(theirs.by_name["blockdev-add"]["arg-type"])
    found = differences(own, real, "", whole=False)
    assert [line for line in found if not line.startswith(OURS)] == []


def test_it_comes_over_the_wire(tmp_path: Path) -> None:
    async def check() -> list[Entry]:
        async with serving(tmp_path / "q"):
            reply = await asyncio.to_thread(talk, tmp_path / "q", [ASK])
            entries: list[Entry] = reply[0]["return"]
            return entries

    assert run(check()) == schema(COMMANDS, EVENTS)
