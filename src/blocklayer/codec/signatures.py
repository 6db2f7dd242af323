"""Signatures: which formats a file's first and last bytes are those of, all of them.

Public:
    find_formats(head, tail) -> list[str]   image formats, those known by their first bytes first
    find_content(head) -> list[str]         what a disk that starts with ``head`` holds
    HEAD_SIZE, TAIL_SIZE                    bytes that are looked at

Other than probing, which wants one answer, this wants every one: a file that is two things at once
is not to be trusted with either.

1. Names are those of drivers where there is one (``vpc``, ``vmdk``), else what QEMU calls the
   format.
2. Looking at the bytes is all: nothing here means that the rest of the file is sound.
"""

from __future__ import annotations

from typing import Final

from blocklayer.codec.vmdk.descriptor import is_descriptor

HEAD_SIZE: Final = 36 * 1024
TAIL_SIZE: Final = 1536

_AT_START: Final = (
    ("qed", 0, b"QED\0"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),
)
_FOOTERS: Final = (("vpc", b"conectix"), ("dmg", b"koly"))

_QCOW: Final = b"QFI\xfb"
_FOOTER_SIZE: Final = 512
_PARTITIONS_AT: Final = 446
_PARTITION_SIZE: Final = 16
_BOOT_SIGNATURE: Final = b"\x55\xaa"
_PROTECTIVE: Final = 0xEE
_VOLUME_AT: Final = 32 * 1024
_VOLUMES: Final = (b"CD001", b"NSR02", b"NSR03")


def find_formats(head: bytes, tail: bytes) -> list[str]:
    """Every image format whose signature is in place; an empty list is a raw disk."""
    found: list[str] = []
    if head.startswith(_QCOW):
        found.append("qcow" if head[4:8] == b"\0\0\0\x01" else "qcow2")
    found += [name for name, at, magic in _AT_START if head[at : at + len(magic)] == magic]
    if is_descriptor(head[:_VOLUME_AT]):
        found.append("vmdk")
    last = tail[-_FOOTER_SIZE:]
    found += [name for name, magic in _FOOTERS if last.startswith(magic)]
    return list(dict.fromkeys(found))


def find_content(head: bytes) -> list[str]:
    """``mbr``, ``gpt`` and ``iso``, as far as the disk's first bytes tell."""
    found: list[str] = []
    if head[510:512] == _BOOT_SIGNATURE and not _is_fat(head):
        ends = range(_PARTITIONS_AT, 510, _PARTITION_SIZE)
        protective = any(head[at + 4] == _PROTECTIVE for at in ends)
        found.append("gpt" if protective else "mbr")
    if head[_VOLUME_AT + 1 : _VOLUME_AT + 6] in _VOLUMES:
        found.append("iso")
    return found


def _is_fat(head: bytes) -> bool:
    """A file system's boot sector ends in the same two bytes as a partition table."""
    return head[0x10] == 2 and head[0x15] == 0xF8
