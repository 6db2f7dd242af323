"""Whether a decoded qcow2 header may be opened: every limit, checked before it is used.

Public:
    validate(header) -> None       FormatError (the image is wrong) or UnsupportedError (this
                                   package cannot open it), naming the field and its value
    full_disk_encryption_area(header) -> (offset, length) | None, and encode_full_disk_encryption

1. What passes here bounds every later allocation: L1 table 32 MiB, refcount table 8 MiB,
   snapshot table 65,536 entries, bitmap directory 1024 * 65,535 bytes.
2. Everything QEMU writes passes. The dirty and the corrupt bit are states, not faults: they are
   the driver's to handle, as are bitmaps that the autoclear bit calls stale.
"""

from __future__ import annotations

from typing import Final

from blocklayer.codec.qcow2 import bitmaps
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.geometry import (
    HOST_OFFSET_BITS,
    MAX_L1_TABLE_SIZE,
    MAX_REFCOUNT_TABLE_SIZE,
    Geometry,
)
from blocklayer.codec.qcow2.header import ImageHeader
from blocklayer.codec.qcow2.snapshots import MAX_SNAPSHOTS
from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U64, Record
from blocklayer.units import MIB

_KNOWN_INCOMPATIBLE: Final = (
    qcow2_header.INCOMPATIBLE_DIRTY
    | qcow2_header.INCOMPATIBLE_CORRUPT
    | qcow2_header.INCOMPATIBLE_DATA_FILE
    | qcow2_header.INCOMPATIBLE_COMPRESSION
    | qcow2_header.INCOMPATIBLE_EXTENDED_L2
)
_MIN_CLUSTER_BITS_EXTENDED_L2: Final = 14
_MAX_REFCOUNT_ORDER: Final = 6
_MAX_BACKING_FORMAT_SIZE: Final = 15
_MAX_ENCRYPTION_HEADER_SIZE: Final = 64 * MIB
_UNIQUE_EXTENSIONS: Final = {
    qcow2_header.EXTENSION_BACKING_FORMAT: "backing file format",
    qcow2_header.EXTENSION_DATA_FILE: "external data file name",
    qcow2_header.EXTENSION_FULL_DISK_ENCRYPTION: "full disk encryption",
    qcow2_header.EXTENSION_FEATURE_NAMES: "feature name table",
    qcow2_header.EXTENSION_BITMAPS: "bitmaps",
}


class _FullDiskEncryption(Record, byte_order=">"):
    offset: U64
    length: U64


def validate(header: ImageHeader) -> None:
    """Raise unless the image can be opened, at least read-only."""
    _validate_features(header)
    _validate_geometry(header)
    _validate_tables(header)
    _validate_extensions(header)


def full_disk_encryption_area(header: ImageHeader) -> tuple[int, int] | None:
    """Offset and length of the encryption header, None in an image without one."""
    data = header.extension(qcow2_header.EXTENSION_FULL_DISK_ENCRYPTION)
    if data is None:
        return None
    if len(data) != _FullDiskEncryption.SIZE:
        raise FormatError(f"CRYPTO header extension has length {len(data)}, not 16")
    area = _FullDiskEncryption.unpack(data)
    return area.offset, area.length


def encode_full_disk_encryption(offset: int, length: int) -> bytes:
    """The data of the extension that names the encryption header."""
    return _FullDiskEncryption(offset, length).pack()


def _validate_features(header: ImageHeader) -> None:
    unknown = header.incompatible_features & ~_KNOWN_INCOMPATIBLE
    if unknown:
        raise UnsupportedError(f"Unsupported qcow2 feature(s): {_name_features(header, unknown)}")
    has_bit = bool(header.incompatible_features & qcow2_header.INCOMPATIBLE_COMPRESSION)
    if has_bit != (header.compression_type != qcow2_header.COMPRESSION_DEFLATE):
        raise FormatError(
            f"compression_type is {header.compression_type}, but the compression type "
            f"incompatible feature bit is {int(has_bit)}"
        )
    if header.compression_type > qcow2_header.COMPRESSION_ZSTD:
        raise UnsupportedError(f"unknown compression type {header.compression_type}")
    if header.autoclear_features & qcow2_header.AUTOCLEAR_DATA_FILE_RAW:
        if not header.has_data_file:
            raise FormatError("data-file-raw is set (autoclear bit 1) without a data file")
        if header.backing_file:
            raise FormatError("data-file-raw is set (autoclear bit 1) beside a backing file")


def _name_features(header: ImageHeader, bits: int) -> str:
    """The image's names for these incompatible features, and a mask of those without one."""
    names = header.feature_names(qcow2_header.FEATURE_INCOMPATIBLE)
    parts = [name for bit, name in sorted(names.items()) if bits >> bit & 1]
    nameless = bits & ~sum(1 << bit for bit in names)
    if nameless:
        parts.append(f"Unknown incompatible feature: {nameless:x}")
    return "; ".join(parts)


def _validate_geometry(header: ImageHeader) -> None:
    if header.extended_l2 and header.cluster_bits < _MIN_CLUSTER_BITS_EXTENDED_L2:
        raise FormatError(
            f"cluster_bits is {header.cluster_bits}: extended L2 entries need clusters of at "
            f"least {1 << _MIN_CLUSTER_BITS_EXTENDED_L2} bytes"
        )
    if header.refcount_order > _MAX_REFCOUNT_ORDER:
        raise FormatError(
            f"refcount_order is {header.refcount_order}: Reference count entry width too large; "
            "may not exceed 64 bits"
        )
    if header.crypt_method not in (
        qcow2_header.CRYPT_NONE,
        qcow2_header.CRYPT_AES,
        qcow2_header.CRYPT_LUKS,
    ):
        raise UnsupportedError(f"Unsupported encryption method {header.crypt_method}")


def _validate_tables(header: ImageHeader) -> None:
    geometry = Geometry.of(header)
    if header.size > geometry.max_size:
        raise FormatError(
            f"Image is too big: size {header.size} needs an L1 table of more than "
            f"{MAX_L1_TABLE_SIZE} bytes"
        )
    if header.refcount_table_clusters == 0:
        raise FormatError("Image does not contain a reference count table")
    refcount_table_size = header.refcount_table_clusters << header.cluster_bits
    if refcount_table_size > MAX_REFCOUNT_TABLE_SIZE:
        raise FormatError(
            f"Reference count table too large: refcount_table_clusters is "
            f"{header.refcount_table_clusters}"
        )
    _validate_offset(header, "refcount_table_offset", header.refcount_table_offset)
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise FormatError(f"Too many snapshots: nb_snapshots is {header.nb_snapshots}")
    _validate_offset(header, "snapshots_offset", header.snapshots_offset)
    if header.l1_size * 8 > MAX_L1_TABLE_SIZE:
        raise FormatError(f"Active L1 table too large: l1_size is {header.l1_size}")
    _validate_offset(header, "l1_table_offset", header.l1_table_offset)
    needed = geometry.l1_entries(header.size)
    if header.l1_size < needed:
        raise FormatError(
            f"L1 table is too small: l1_size is {header.l1_size}, size {header.size} needs {needed}"
        )


def _validate_offset(header: ImageHeader, field: str, offset: int) -> None:
    if offset % header.cluster_size:
        raise FormatError(f"{field} {offset:#x} is not aligned to a cluster")
    if offset >> HOST_OFFSET_BITS:
        raise FormatError(f"{field} {offset:#x} is not below {1 << HOST_OFFSET_BITS:#x}")


def _validate_extensions(header: ImageHeader) -> None:
    seen: set[int] = set()
    for extension in header.extensions:
        if extension.type in seen and extension.type in _UNIQUE_EXTENSIONS:
            name = _UNIQUE_EXTENSIONS[extension.type]
            raise FormatError(f"header extension {extension.type:#010x} ({name}) appears twice")
        seen.add(extension.type)
    backing_format = header.extension(qcow2_header.EXTENSION_BACKING_FORMAT) or b""
    if len(backing_format) > _MAX_BACKING_FORMAT_SIZE:
        raise FormatError(
            f"backing file format name of {len(backing_format)} bytes is longer than "
            f"{_MAX_BACKING_FORMAT_SIZE}"
        )
    area = full_disk_encryption_area(header)
    if (area is not None) != (header.crypt_method == qcow2_header.CRYPT_LUKS):
        raise FormatError(
            f"CRYPTO header extension is {'missing' if area is None else 'not expected'} with "
            f"crypt_method {header.crypt_method}"
        )
    if area is not None:
        _validate_offset(header, "encryption header offset", area[0])
        if not 0 < area[1] <= _MAX_ENCRYPTION_HEADER_SIZE:
            raise FormatError(f"encryption header length {area[1]:#x} is not possible")
    if not header.autoclear_features & qcow2_header.AUTOCLEAR_BITMAPS:
        return
    data = header.extension(qcow2_header.EXTENSION_BITMAPS)
    if data is None:
        raise FormatError("autoclear bit 0 (bitmaps) is set without the bitmaps extension")
    directory = bitmaps.decode_bitmaps_extension(data)
    bitmaps.validate_bitmaps_extension(directory, header.cluster_size)
