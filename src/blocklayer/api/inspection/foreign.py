"""Inspecting the formats that this package opens beside qcow2: vmdk, vhdx, vpc, vdi.

1. Each inspector fills the report as far as the headers are sound, and raises FormatError or
   UnsupportedError where they end being so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.codec import vdi, vpc
from blocklayer.codec.vmdk import descriptor as text
from blocklayer.codec.vmdk import sparse
from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.units import SECTOR

if TYPE_CHECKING:
    from blocklayer.api.inspection.reader import Reader
    from blocklayer.api.inspection.report import Inspection

_OWN_EXTENT = ("monolithicSparse", "streamOptimized")
"""Kinds of disks that are one file, whatever name their descriptor has for it."""


def inspect_vmdk(report: Inspection, reader: Reader) -> None:
    """A sparse extent with its descriptor inside, or a descriptor alone."""
    head = reader.read(0, SECTOR)
    if head.startswith(b"COWD"):
        raise UnsupportedError("COWD extents of ESX are not supported")
    if not head.startswith(sparse.MAGIC):
        if reader.size > text.MAX_SIZE:
            raise FormatError("A VMDK descriptor of more than 1 MiB")
        _describe(report, reader.read(0, reader.size), embedded=False)
        return
    header = sparse.decode_header(head)
    report.virtual_size, report.cluster_size = header.size, header.grain_size
    if header.directory_offset == sparse.AT_END:
        _compare_footer(report, header, reader)
    if not header.descriptor_offset:
        raise FormatError("The extent has no descriptor: it is a part of another disk")
    place, size = header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR
    if size > text.MAX_SIZE or place + size > reader.size:
        raise FormatError(f"The descriptor at {place:#x}, {size:#x} bytes, is out of place")
    _describe(report, reader.read(place, size), embedded=True)


def _compare_footer(report: Inspection, header: sparse.Header, reader: Reader) -> None:
    footer = sparse.footer_header(reader.read(reader.size - sparse.FOOTER_SIZE, sparse.FOOTER_SIZE))
    # What is in force is the footer; who looks at the header alone sees another disk.
    for field in ("version", "capacity", "granularity", "descriptor_offset", "descriptor_size"):
        if getattr(header, field) != getattr(footer, field):
            said = f"{getattr(header, field)} in the header, {getattr(footer, field)} in the footer"
            report.add("footer-mismatch", f"The {field.replace('_', ' ')} is {said}.")


def _describe(report: Inspection, data: bytes, *, embedded: bool) -> None:
    described = text.parse_descriptor(data)
    report.variant = described.create_type or None
    own = embedded and described.create_type in _OWN_EXTENT and len(described.extents) == 1
    for extent in described.extents:
        if not extent.filename or (own and "/" not in extent.filename):
            continue
        report.refer("extent", extent.filename, extent.type)
        report.add("extent-file", f"The disk is made of the file '{extent.filename}'.")
    if described.parent is not None or described.parent_cid != text.NO_PARENT:
        if described.parent is not None:
            report.refer("backing-file", described.parent, "vmdk")
        report.add("backing-file", f"The image has the parent '{described.parent or 'unnamed'}'.")
    if not embedded:
        report.virtual_size = sum(extent.sectors for extent in described.extents) * SECTOR


def inspect_vhdx(report: Inspection, reader: Reader) -> None:
    """Headers, region table, metadata."""
    from blocklayer.codec.vhdx import structure

    pair = [
        structure.decode_header(reader.read(at, structure.HEADER_SIZE))
        for at in structure.HEADER_OFFSETS
    ]
    header = pair[structure.current_header(*pair)]
    assert header is not None
    structure.judge_header(header, reader.size)
    if header.log_guid != structure.NO_GUID:
        report.add("log-pending", "The image has a log that must be replayed before it is read.")
    tables = [reader.read(at, structure.REGION_SIZE) for at in structure.REGION_OFFSETS]
    sound = [table for table in tables if structure.regions_sound(table)]
    if not sound:
        raise FormatError("No valid VHDX region table found")
    regions = structure.decode_regions(sound[0], header, reader.size)
    start = regions.metadata_offset
    table = reader.read(start, structure.METADATA_TABLE_SIZE)
    length = structure.metadata_length(table, regions.metadata_length)
    metadata = structure.decode_metadata(reader.read(start, length))
    report.virtual_size, report.cluster_size = metadata.size, metadata.block_size
    report.variant = "fixed" if metadata.leave_blocks_allocated else "dynamic"
    if metadata.has_parent:
        report.variant = "differencing"
        report.add("backing-file", "The image has a parent disk.")


_VPC_TYPES = {
    vpc.TYPE_FIXED: "fixed",
    vpc.TYPE_DYNAMIC: "dynamic",
    vpc.TYPE_DIFFERENCING: "differencing",
}


def inspect_vpc(report: Inspection, reader: Reader) -> None:
    """The footer or its copy, the dynamic header, and the parent's names."""
    first = reader.read(0, SECTOR)
    last = reader.read(reader.size - SECTOR, SECTOR)
    footer = vpc.decode_footer(first if first.startswith(vpc.COOKIE) else last)
    report.virtual_size = footer.size
    report.variant = _VPC_TYPES[footer.disk_type]
    if first.startswith(vpc.COOKIE) and last.startswith(vpc.COOKIE):
        other = vpc.decode_footer(last)
        if (other.size, other.disk_type) != (footer.size, footer.disk_type):
            report.add("footer-mismatch", "The footer and its copy are of different disks.")
    if footer.disk_type == vpc.TYPE_FIXED:
        return
    data = reader.read(footer.data_offset, vpc.DynamicHeader.SIZE)
    header = vpc.decode_dynamic(data, footer)
    report.cluster_size = header.block_size
    if header.table_end > reader.size:
        report.add("past-end", f"The block table ends at {header.table_end:#x}, past the end.")
    if footer.disk_type != vpc.TYPE_DIFFERENCING:
        return
    names = [vpc.file_name(header.parent_name)]
    for locator in header.locators:
        path = reader.read(locator.data_offset, locator.data_length)
        names.append(vpc.locator_path(locator.code, path) or "")
    for name in dict.fromkeys(filter(None, names)):
        report.refer("backing-file", name, "vpc")
    report.add("backing-file", "The image has a parent disk.")


def inspect_vdi(report: Inspection, reader: Reader) -> None:
    """The header."""
    header = vdi.decode_header(reader.read(0, vdi.Header.SIZE))
    report.virtual_size, report.cluster_size = header.size, header.block_size
    report.variant = "static" if header.image_type == vdi.TYPE_STATIC else "dynamic"
    end = header.offset_bmap + 4 * header.blocks_in_image
    if end > reader.size:
        report.add("past-end", f"The block map ends at {end:#x}, past the end of the file.")
