"""Inspecting formats that are seldom met: qcow, qed, parallels, dmg, bochs, cloop, luks.

1. Only what tells size and references is read, and is compared with the file before it is followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from blocklayer.codec import bochs, cloop, dmg, parallels, qcow, qed
from blocklayer.errors import FormatError
from blocklayer.record import U16, U32, Record
from blocklayer.units import SECTOR

if TYPE_CHECKING:
    from blocklayer.api.inspection.reader import Reader
    from blocklayer.api.inspection.report import Inspection


class _Luks(Record, byte_order=">"):
    magic: Annotated[bytes, "6s"]
    version: U16
    cipher: Annotated[bytes, "32s"]
    mode: Annotated[bytes, "32s"]
    hash: Annotated[bytes, "32s"]
    payload_sector: U32


def inspect_qcow(report: Inspection, reader: Reader) -> None:
    """QEMU's first format."""
    report.variant = "version 1"
    header = qcow.decode_header(reader.read(0, qcow.Header.SIZE), reader.size)
    report.virtual_size, report.cluster_size = header.size, header.cluster_size
    if header.crypt_method != qcow.CRYPT_NONE:
        report.encryption = "aes"
        report.add("encrypted", "The image is encrypted (aes).")
    if header.backing_file_offset:
        _backing(report, reader, header.backing_file_offset, header.backing_file_size)


def inspect_qed(report: Inspection, reader: Reader) -> None:
    """QEMU's enhanced disk."""
    data = reader.read(0, qed.Header.SIZE)
    features = qed.Header.unpack(data).features
    if features & ~qed.FEATURES:
        report.add("unknown-incompatible", f"Unknown features {features & ~qed.FEATURES:#x}.")
        return
    header = qed.decode_header(data, reader.size)
    report.virtual_size, report.cluster_size = header.image_size, header.cluster_size
    if header.has_backing:
        place, size = header.backing_filename_offset, header.backing_filename_size
        raw = bool(header.features & qed.FEATURE_BACKING_RAW)
        _backing(report, reader, place, size, "raw" if raw else None)


def _backing(
    report: Inspection, reader: Reader, offset: int, size: int, format: str | None = None
) -> None:
    if offset + size > reader.size:
        raise FormatError(f"The backing file name at {offset:#x}, {size} bytes, is out of place")
    name = reader.read(offset, size).decode("utf-8", "surrogateescape")
    report.refer("backing-file", name, format)
    report.add("backing-file", f"The image has the backing file '{name}'.")
    if format is None:
        report.add("backing-format-missing", "The format of the backing file is not stored.")


def inspect_parallels(report: Inspection, reader: Reader) -> None:
    """Parallels' expanding disks."""
    header = parallels.decode_header(reader.read(0, parallels.Header.SIZE))
    report.virtual_size, report.cluster_size = header.size, header.cluster_size
    if header.table_end > reader.size:
        report.add("past-end", f"The table ends at {header.table_end:#x}, past the end.")


def inspect_dmg(report: Inspection, reader: Reader) -> None:
    """Apple's disk images."""
    tail = min(reader.size, dmg.TAIL_SIZE)
    trailer = dmg.decode_trailer(reader.read(reader.size - tail, tail), reader.size)
    report.virtual_size = trailer.sectors * SECTOR


def inspect_bochs(report: Inspection, reader: Reader) -> None:
    """Bochs' growing disks."""
    disk = bochs.decode_header(reader.read(0, bochs.HEADER_SIZE))
    report.virtual_size = disk.size
    if disk.data_offset > reader.size:
        report.add("past-end", f"The catalog ends at {disk.data_offset:#x}, past the end.")


def inspect_cloop(report: Inspection, reader: Reader) -> None:
    """Compressed loop devices."""
    header = cloop.decode_header(reader.read(0, cloop.HEADER_OFFSET + cloop.Header.SIZE))
    report.virtual_size = header.size


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
