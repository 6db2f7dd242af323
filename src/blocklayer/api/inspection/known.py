"""Inspecting formats that are recognised and not opened: qcow, qed, parallels, dmg, luks, …

1. Only what tells size and references is read; each field is where the format's specification has
   it, and is compared with the file before it is followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from blocklayer.errors import FormatError
from blocklayer.record import U16, U32, U64, Record
from blocklayer.units import SECTOR

if TYPE_CHECKING:
    from blocklayer.api.inspection.reader import Reader
    from blocklayer.api.inspection.report import Inspection

_MAX_NAME = 1023


class _Qcow(Record, byte_order=">"):
    magic: U32
    version: U32
    backing_offset: U64
    backing_size: U32
    mtime: U32
    size: U64


class _Qed(Record, byte_order="<"):
    magic: U32
    cluster_size: U32
    table_size: U32
    header_size: U32
    features: U64
    compatible: U64
    autoclear: U64
    l1_offset: U64
    image_size: U64
    backing_offset: U32
    backing_size: U32


class _Parallels(Record, byte_order="<"):
    magic: Annotated[bytes, "16s"]
    version: U32
    heads: U32
    cylinders: U32
    tracks: U32
    entries: U32
    sectors: U64


class _Luks(Record, byte_order=">"):
    magic: Annotated[bytes, "6s"]
    version: U16
    cipher: Annotated[bytes, "32s"]
    mode: Annotated[bytes, "32s"]
    hash: Annotated[bytes, "32s"]
    payload_sector: U32


_QED_BACKING = 1
_QED_KNOWN = 7
_DMG_SECTORS = 0x1EC


def inspect_qcow(report: Inspection, reader: Reader) -> None:
    """QEMU's first format."""
    header = _Qcow.unpack(reader.read(0, _Qcow.SIZE))
    report.virtual_size, report.variant = header.size, "version 1"
    if header.backing_offset:
        _backing(report, reader, header.backing_offset, header.backing_size)


def inspect_qed(report: Inspection, reader: Reader) -> None:
    """QEMU's enhanced disk."""
    header = _Qed.unpack(reader.read(0, _Qed.SIZE))
    report.virtual_size, report.cluster_size = header.image_size, header.cluster_size
    if header.features & ~_QED_KNOWN:
        report.add("unknown-incompatible", f"Unknown features {header.features & ~_QED_KNOWN:#x}.")
    if header.features & _QED_BACKING:
        _backing(report, reader, header.backing_offset, header.backing_size)


def _backing(report: Inspection, reader: Reader, offset: int, size: int) -> None:
    if size > _MAX_NAME or offset + size > reader.size:
        raise FormatError(f"The backing file name at {offset:#x}, {size} bytes, is out of place")
    name = reader.read(offset, size).decode("utf-8", "surrogateescape")
    report.refer("backing-file", name)
    report.add("backing-file", f"The image has the backing file '{name}'.")
    report.add("backing-format-missing", "The format of the backing file is not stored.")


def inspect_parallels(report: Inspection, reader: Reader) -> None:
    """Parallels' expanding disks."""
    header = _Parallels.unpack(reader.read(0, _Parallels.SIZE))
    report.virtual_size = header.sectors * SECTOR
    report.cluster_size = header.tracks * SECTOR


def inspect_dmg(report: Inspection, reader: Reader) -> None:
    """Apple's disk images."""
    last = reader.read(reader.size - SECTOR, SECTOR)
    report.virtual_size = int.from_bytes(last[_DMG_SECTORS : _DMG_SECTORS + 8], "big") * SECTOR


def inspect_luks(report: Inspection, reader: Reader) -> None:
    """Encrypted partitions, versions 1 and 2."""
    header = _Luks.unpack(reader.read(0, _Luks.SIZE))
    report.variant, report.encryption = f"version {header.version}", "luks"
    report.add("encrypted", "The image is encrypted (luks).")
    if header.version != 1:
        return
    start = header.payload_sector * SECTOR
    if start > reader.size:
        report.add("past-end", f"The data at {start:#x} are past the end of the file.")
    report.virtual_size = max(0, reader.size - start)


def inspect_only_known(report: Inspection, reader: Reader) -> None:
    """Formats of which only the signature is known."""
