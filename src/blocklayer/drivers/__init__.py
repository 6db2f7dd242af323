"""All drivers on one screen: name, where it is, and what tells its images or names apart.

Drivers of other packages need no line here: they are found by the entry point group
``blocklayer.drivers``, whose names are driver names.
"""

from __future__ import annotations

from typing import Final

from blocklayer.graph.registry import Entry, Registry

_HERE = "blocklayer.drivers"

DRIVERS: Final = {
    "file": Entry(f"{_HERE}.file:FileDriver", protocol=True),
    "host_device": Entry(f"{_HERE}.host_device:HostDeviceDriver", protocol=True),
    "null-co": Entry(f"{_HERE}.null:NullDriver", protocol=True, schemes=("null-co",)),
    "null-aio": Entry(f"{_HERE}.null:NullAioDriver", protocol=True, schemes=("null-aio",)),
    "nbd": Entry(
        f"{_HERE}.nbd.driver:NbdDriver",
        protocol=True,
        schemes=("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix"),
    ),
    "memory": Entry(f"{_HERE}.memory:MemoryDriver", protocol=True),
    "raw": Entry(f"{_HERE}.raw:RawDriver"),
    "qcow2": Entry(f"{_HERE}.qcow2.driver:Qcow2Driver", magics=((0, b"QFI\xfb"),)),
    "luks": Entry(f"{_HERE}.crypto.luks:LuksDriver", magics=((0, b"LUKS\xba\xbe"),)),
    "qed": Entry(f"{_HERE}.qed.driver:QedDriver", magics=((0, b"QED\0"),)),
    "qcow": Entry(f"{_HERE}.qcow.driver:QcowDriver", magics=((0, b"QFI\xfb\0\0\0\1"),)),
    "vdi": Entry(f"{_HERE}.vdi:VdiDriver", magics=((0x40, b"\x7f\x10\xda\xbe"),)),
    "vhdx": Entry(f"{_HERE}.vhdx.driver:VhdxDriver", magics=((0, b"vhdxfile"),)),
    "vmdk": Entry(
        f"{_HERE}.vmdk.driver:VmdkDriver",
        magics=((0, b"KDMV"), (0, b"#"), (0, b"version="), (0, b"\n"), (0, b" ")),
    ),
    "vpc": Entry(f"{_HERE}.vpc:VpcDriver", magics=((0, b"conectix"),)),
    "parallels": Entry(
        f"{_HERE}.parallels.driver:ParallelsDriver",
        magics=((0, b"WithoutFreeSpace"), (0, b"WithouFreSpacExt")),
    ),
    "bochs": Entry(f"{_HERE}.bochs:BochsDriver", magics=((0, b"Bochs Virtual HD Image"),)),
    "cloop": Entry(f"{_HERE}.cloop:CloopDriver", magics=((0, b"#!/bin/sh\n#V2.0 Format\n"),)),
    "dmg": Entry(f"{_HERE}.dmg:DmgDriver", suffixes=(".dmg",)),
    "mirror_top": Entry(f"{_HERE}.job_filters:MirrorTopDriver", internal=True),
    "commit_top": Entry(f"{_HERE}.job_filters:CommitTopDriver", internal=True),
    "copy-on-read": Entry(f"{_HERE}.copy_on_read:CopyOnReadDriver"),
    "copy-before-write": Entry(f"{_HERE}.copy_before_write:CopyBeforeWriteDriver"),
    "throttle": Entry(f"{_HERE}.throttle:ThrottleDriver"),
    "blkdebug": Entry(f"{_HERE}.blkdebug:BlkdebugDriver"),
    "blkverify": Entry(f"{_HERE}.blkverify:BlkverifyDriver"),
    "preallocate": Entry(f"{_HERE}.preallocate:PreallocateDriver"),
    "quorum": Entry(f"{_HERE}.quorum:QuorumDriver"),
    "compress": Entry(f"{_HERE}.compress:CompressDriver"),
    "snapshot-access": Entry(f"{_HERE}.snapshot_access:SnapshotAccessDriver", protocol=True),
}

REGISTRY: Final = Registry(DRIVERS)
