"""`blk live SOCKET VERB`: one module a group of verbs; this table says where each is."""

from __future__ import annotations

from typing import Final

_HERE = "blocklayer.cli.live"

TITLE: Final = "operations on the disks of a running daemon"
ADDRESS: Final = "SOCKET"
"""What stands before the verb: the daemon's QMP socket, as a path or HOST:PORT."""

COMMANDS: Final = {
    "backup-begin": f"{_HERE}.backup:BackupBegin",
    "blockcommit": f"{_HERE}.commit:BlockCommit",
    "blockcopy": f"{_HERE}.copy:BlockCopy",
    "blockjob": f"{_HERE}.job:BlockJob",
    "blockpull": f"{_HERE}.pull:BlockPull",
    "blockresize": f"{_HERE}.resize:BlockResize",
    "checkpoint-create-as": f"{_HERE}.checkpoint:CheckpointCreateAs",
    "checkpoint-delete": f"{_HERE}.checkpoint:CheckpointDelete",
    "checkpoint-list": f"{_HERE}.checkpoint:CheckpointList",
    "domblkinfo": f"{_HERE}.listing:DomBlkInfo",
    "domblklist": f"{_HERE}.listing:DomBlkList",
    "domblkstat": f"{_HERE}.listing:DomBlkStat",
    "domjobabort": f"{_HERE}.domjob:DomJobAbort",
    "domjobinfo": f"{_HERE}.domjob:DomJobInfo",
    "qemu-monitor-command": f"{_HERE}.monitor:QemuMonitorCommand",
    "snapshot-create-as": f"{_HERE}.snapshot:SnapshotCreateAs",
}
