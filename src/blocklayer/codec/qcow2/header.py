"""The qcow2 header: the image's first cluster, between bytes and one mutable value.

Public:
    probe_cluster_bits(data) -> int               how much of the file is the first cluster
    decode_header(first_cluster) -> ImageHeader   structure only; `validation.validate` judges it
    ImageHeader(...)                              the fixed fields, `additional`, `extensions`,
                                                  `backing_file`
      .encode() -> bytes                          the whole first cluster
      .extension(type) -> bytes | None, .set_extension(type, data | None)
      .backing_format, .data_file                 str | None, readable and assignable
      .compression_type, .header_length, .cluster_size, .extended_l2,
      .has_data_file, .data_file_raw
      .set_feature_names(), .feature_names(kind) -> dict[bit, name]
    Extension(type, data); feature_name_table() -> bytes; known_features(kind) -> dict[bit, name]
    MAGIC, the feature bits INCOMPATIBLE_* COMPATIBLE_* AUTOCLEAR_*, and EXTENSION_*

1. decode then encode gives the same bytes for every header QEMU writes: fields and extensions
   this package does not know are kept verbatim and in order.
2. `encode` gives exactly one cluster or raises UsageError; it never writes a header that does
   not fit.
3. No length or offset read from the image is used before it is compared with the bytes at hand.
"""

from __future__ import annotations

from typing import Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError, UsageError
from blocklayer.record import U32, U64, Record

MAGIC: Final = 0x514649FB

INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_DATA_FILE_RAW: Final = 1 << 1

COMPRESSION_DEFLATE: Final = 0
COMPRESSION_ZSTD: Final = 1

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_DATA_FILE: Final = 0x44415441
EXTENSION_FULL_DISK_ENCRYPTION: Final = 0x0537BE77
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875
_EXTENSION_END: Final = 0

# The order in which QEMU writes the extensions it knows; unknown ones follow.
_EXTENSION_ORDER: Final = (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FULL_DISK_ENCRYPTION,
    EXTENSION_FEATURE_NAMES,
    EXTENSION_BITMAPS,
)

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_BACKING_FILE_SIZE: Final = 1023
# A cluster of 2 MiB has room for a quarter of a million empty ones; nobody writes even ten.
MAX_EXTENSIONS: Final = 1024

# In larger clusters only: with smaller ones the table would leave no room for a backing file name.
_FEATURE_NAMES_MIN_CLUSTER_SIZE: Final = 8192

FEATURE_INCOMPATIBLE: Final = 0
FEATURE_COMPATIBLE: Final = 1
FEATURE_AUTOCLEAR: Final = 2

_FEATURE_ROW_SIZE: Final = 48
_FEATURE_NAMES: Final = {
    (FEATURE_INCOMPATIBLE, 0): "dirty bit",
    (FEATURE_INCOMPATIBLE, 1): "corrupt bit",
    (FEATURE_INCOMPATIBLE, 2): "external data file",
    (FEATURE_INCOMPATIBLE, 3): "compression type",
    (FEATURE_INCOMPATIBLE, 4): "extended L2 entries",
    (FEATURE_COMPATIBLE, 0): "lazy refcounts",
    (FEATURE_AUTOCLEAR, 0): "bitmaps",
    (FEATURE_AUTOCLEAR, 1): "raw external data",
}


class _FixedFields(Record, byte_order=">"):
    """The header of version 2; version 3 begins with it."""

    magic: U32
    version: U32
    backing_file_offset: U64
    backing_file_size: U32
    cluster_bits: U32
    size: U64
    crypt_method: U32
    l1_size: U32
    l1_table_offset: U64
    refcount_table_offset: U64
    refcount_table_clusters: U32
    nb_snapshots: U32
    snapshots_offset: U64


class _FixedFieldsV3(Record, byte_order=">"):
    """What version 3 adds at byte 72."""

    incompatible_features: U64
    compatible_features: U64
    autoclear_features: U64
    refcount_order: U32
    header_length: U32


class _ExtensionHead(Record, byte_order=">"):
    type: U32
    length: U32


HEADER_LENGTH_V2: Final = _FixedFields.SIZE
HEADER_LENGTH_V3: Final = HEADER_LENGTH_V2 + _FixedFieldsV3.SIZE
# Compression type and its padding, as QEMU has written since version 5.1.
_ADDITIONAL_FIELDS_SIZE: Final = 8


class Extension(msgspec.Struct, frozen=True):
    """One header extension, its data without padding."""

    type: int
    data: bytes


class ImageHeader(msgspec.Struct, kw_only=True):
    """Everything the first cluster says. Field names are the specification's."""

    version: int = 3
    cluster_bits: int = 16
    size: int
    crypt_method: int = CRYPT_NONE
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    # Bytes 104 up to header_length, verbatim; the first is the compression type. Version 3 only.
    additional: bytes = bytes(_ADDITIONAL_FIELDS_SIZE)
    extensions: list[Extension] = []
    # "" when the header points at a name of no length, which is as good as none.
    backing_file: str | None = None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        return bool(self.incompatible_features & INCOMPATIBLE_DATA_FILE)

    @property
    def data_file_raw(self) -> bool:
        return bool(self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)

    @property
    def header_length(self) -> int:
        return HEADER_LENGTH_V2 if self.version == 2 else HEADER_LENGTH_V3 + len(self.additional)

    @property
    def compression_type(self) -> int:
        """COMPRESSION_DEFLATE where the field is not present."""
        return self.additional[0] if self.version > 2 and self.additional else COMPRESSION_DEFLATE

    @compression_type.setter
    def compression_type(self, value: int) -> None:
        """Sets the field and the feature bit that must go with it."""
        rest = self.additional[1:] or bytes(_ADDITIONAL_FIELDS_SIZE - 1)
        self.additional = bytes([value]) + rest
        self.incompatible_features &= ~INCOMPATIBLE_COMPRESSION
        if value != COMPRESSION_DEFLATE:
            self.incompatible_features |= INCOMPATIBLE_COMPRESSION

    @property
    def backing_format(self) -> str | None:
        return _text_or_none(self.extension(EXTENSION_BACKING_FORMAT))

    @backing_format.setter
    def backing_format(self, name: str | None) -> None:
        self.set_extension(EXTENSION_BACKING_FORMAT, _bytes_or_none(name))

    @property
    def data_file(self) -> str | None:
        return _text_or_none(self.extension(EXTENSION_DATA_FILE))

    @data_file.setter
    def data_file(self, name: str | None) -> None:
        self.set_extension(EXTENSION_DATA_FILE, _bytes_or_none(name))

    def extension(self, extension_type: int) -> bytes | None:
        """The data of the first extension of this type."""
        for extension in self.extensions:
            if extension.type == extension_type:
                return extension.data
        return None

    def extension_offset(self, extension_type: int) -> int:
        """Where `encode` puts the data of the first extension of this type, which is there."""
        offset = self.header_length + _ExtensionHead.SIZE
        for extension in self.extensions:
            if extension.type == extension_type:
                return offset
            offset += _ExtensionHead.SIZE + len(extension.data) + (-len(extension.data) % 8)
        raise KeyError(extension_type)

    def set_extension(self, extension_type: int, data: bytes | None) -> None:
        """Replace in place, insert where QEMU would write it, or (None) remove."""
        replacement = [] if data is None else [Extension(extension_type, data)]
        rank = _extension_rank(extension_type)
        for index, extension in enumerate(self.extensions):
            if extension.type == extension_type:
                self.extensions[index : index + 1] = replacement
                return
        position = sum(_extension_rank(extension.type) <= rank for extension in self.extensions)
        self.extensions[position:position] = replacement

    def set_feature_names(self) -> None:
        """Add or refresh the feature name table where a new image of this geometry has one."""
        if self.version > 2 and self.cluster_size >= _FEATURE_NAMES_MIN_CLUSTER_SIZE:
            self.set_extension(EXTENSION_FEATURE_NAMES, feature_name_table())
        else:
            self.set_extension(EXTENSION_FEATURE_NAMES, None)

    def feature_names(self, kind: int) -> dict[int, str]:
        """Names by bit for one kind of feature: ours, and over them the image's own."""
        names = known_features(kind)
        table = self.extension(EXTENSION_FEATURE_NAMES) or b""
        for start in range(0, len(table) - _FEATURE_ROW_SIZE + 1, _FEATURE_ROW_SIZE):
            if table[start] == kind and table[start + 1] < 64:
                name = table[start + 2 : start + _FEATURE_ROW_SIZE].split(b"\0", 1)[0]
                names[table[start + 1]] = name.decode("utf-8", "replace")
        return names

    def encode(self) -> bytes:
        """The whole first cluster; UsageError when it does not hold all of the header."""
        tail = bytearray()
        for extension in self.extensions:
            tail += _ExtensionHead(extension.type, len(extension.data)).pack()
            tail += extension.data + bytes(-len(extension.data) % 8)
        tail += _ExtensionHead(_EXTENSION_END, 0).pack()
        name = b"" if self.backing_file is None else _encode_text(self.backing_file)
        if len(name) > MAX_BACKING_FILE_SIZE:
            raise UsageError(
                f"backing file name of {len(name)} bytes is longer than {MAX_BACKING_FILE_SIZE}"
            )
        name_offset = self.header_length + len(tail)
        length = name_offset + len(name)
        if length > self.cluster_size:
            raise UsageError(
                f"qcow2 header needs {length} bytes (backing file name {len(name)}) and does not "
                f"fit in the first cluster of {self.cluster_size} bytes; use a larger "
                "cluster_size or a shorter backing file name"
            )
        head = self._encode_fixed(0 if self.backing_file is None else name_offset, len(name))
        return (head + tail + name).ljust(self.cluster_size, b"\0")

    def _encode_fixed(self, backing_file_offset: int, backing_file_size: int) -> bytes:
        fixed = _FixedFields(
            magic=MAGIC,
            version=self.version,
            backing_file_offset=backing_file_offset,
            backing_file_size=backing_file_size,
            cluster_bits=self.cluster_bits,
            size=self.size,
            crypt_method=self.crypt_method,
            l1_size=self.l1_size,
            l1_table_offset=self.l1_table_offset,
            refcount_table_offset=self.refcount_table_offset,
            refcount_table_clusters=self.refcount_table_clusters,
            nb_snapshots=self.nb_snapshots,
            snapshots_offset=self.snapshots_offset,
        ).pack()
        if self.version == 2:
            return fixed
        return (
            fixed
            + _FixedFieldsV3(
                incompatible_features=self.incompatible_features,
                compatible_features=self.compatible_features,
                autoclear_features=self.autoclear_features,
                refcount_order=self.refcount_order,
                header_length=self.header_length,
            ).pack()
            + self.additional
        )


def known_features(kind: int) -> dict[int, str]:
    """Names by bit of the features of one kind that this package knows."""
    return {bit: name for (row_kind, bit), name in _FEATURE_NAMES.items() if row_kind == kind}


def feature_name_table() -> bytes:
    """The data of the feature name table extension: a row for every bit this package knows."""
    return b"".join(
        bytes(key) + name.encode().ljust(_FEATURE_ROW_SIZE - 2, b"\0")
        for key, name in _FEATURE_NAMES.items()
    )


def probe_cluster_bits(data: bytes | bytearray | memoryview) -> int:
    """Cluster bits of a qcow2 image that begins with `data` (at least 72 bytes).

    FormatError when this is no qcow2 image, UnsupportedError for another version.
    """
    return _decode_fixed(data).cluster_bits


def decode_header(first_cluster: bytes | bytearray | memoryview) -> ImageHeader:
    """The header in the image's first cluster.

    Less than a cluster is enough when the file ends inside it; bytes past the cluster are not
    looked at. FormatError when the structure does not hold together.
    """
    fixed = _decode_fixed(first_cluster)
    data = bytes(first_cluster[: 1 << fixed.cluster_bits])
    if fixed.version == 2:
        extra = _FixedFieldsV3(0, 0, 0, 4, HEADER_LENGTH_V2)
    else:
        extra = _FixedFieldsV3.unpack(data, HEADER_LENGTH_V2)
        _check_header_length(extra.header_length, len(data))
    name, extensions_end = _decode_backing_file(fixed, data)
    return ImageHeader(
        version=fixed.version,
        cluster_bits=fixed.cluster_bits,
        size=fixed.size,
        crypt_method=fixed.crypt_method,
        l1_size=fixed.l1_size,
        l1_table_offset=fixed.l1_table_offset,
        refcount_table_offset=fixed.refcount_table_offset,
        refcount_table_clusters=fixed.refcount_table_clusters,
        nb_snapshots=fixed.nb_snapshots,
        snapshots_offset=fixed.snapshots_offset,
        incompatible_features=extra.incompatible_features,
        compatible_features=extra.compatible_features,
        autoclear_features=extra.autoclear_features,
        refcount_order=extra.refcount_order,
        additional=data[HEADER_LENGTH_V3 : extra.header_length],
        extensions=_decode_extensions(data[:extensions_end], extra.header_length),
        backing_file=name,
    )


def _decode_fixed(data: bytes | bytearray | memoryview) -> _FixedFields:
    if bytes(data[:4]) != MAGIC.to_bytes(4, "big"):
        raise FormatError("Image is not in qcow2 format")
    fixed = _FixedFields.unpack(data)
    if fixed.version not in (2, 3):
        raise UnsupportedError(f"Unsupported qcow2 version {fixed.version}")
    if not MIN_CLUSTER_BITS <= fixed.cluster_bits <= MAX_CLUSTER_BITS:
        raise FormatError(
            f"Unsupported cluster size: cluster_bits is {fixed.cluster_bits}, not "
            f"{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )
    return fixed


def _check_header_length(header_length: int, available: int) -> None:
    if header_length < HEADER_LENGTH_V3:
        raise FormatError(f"qcow2 header too short: header_length is {header_length}, not 104")
    if header_length % 8:
        raise FormatError(f"qcow2 header_length {header_length} is not a multiple of 8")
    if header_length > available:
        raise FormatError(f"qcow2 header exceeds cluster size: header_length is {header_length}")


def _decode_backing_file(fixed: _FixedFields, data: bytes) -> tuple[str | None, int]:
    """The backing file name, and where the area of the extensions ends."""
    offset, size = fixed.backing_file_offset, fixed.backing_file_size
    if offset == 0:
        return None, len(data)
    if offset > len(data):
        raise FormatError(f"Invalid backing file offset {offset:#x}: outside the first cluster")
    if size > min(MAX_BACKING_FILE_SIZE, len(data) - offset):
        raise FormatError(f"Backing file name too long: backing_file_size is {size}")
    return _decode_text(data[offset : offset + size]), offset


def _decode_extensions(data: bytes, offset: int) -> list[Extension]:
    extensions: list[Extension] = []
    while offset + _ExtensionHead.SIZE <= len(data):
        head = _ExtensionHead.unpack(data, offset)
        if head.type == _EXTENSION_END:
            break
        start = offset + _ExtensionHead.SIZE
        if head.length > len(data) - start:
            raise FormatError(
                f"Header extension too large: type {head.type:#010x} at offset {offset:#x} "
                f"has length {head.length}"
            )
        if len(extensions) == MAX_EXTENSIONS:
            raise FormatError(f"more than {MAX_EXTENSIONS} header extensions at offset {offset:#x}")
        extensions.append(Extension(head.type, data[start : start + head.length]))
        offset = start + head.length + (-head.length % 8)
    return extensions


def _extension_rank(extension_type: int) -> int:
    if extension_type in _EXTENSION_ORDER:
        return _EXTENSION_ORDER.index(extension_type)
    return len(_EXTENSION_ORDER)


def _encode_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode_text(data: bytes) -> str:
    """File names are bytes to the host; those that are no UTF-8 survive the round trip."""
    return data.decode("utf-8", "surrogateescape")


def _text_or_none(data: bytes | None) -> str | None:
    return None if data is None else _decode_text(data)


def _bytes_or_none(text: str | None) -> bytes | None:
    return None if text is None else _encode_text(text)
