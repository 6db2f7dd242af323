"""Inspecting qcow2: the header, its features and names, and a sample of the tables.

1. A header that does not hold together ends the inspection with what was found before it.
2. Of the tables only the first parts are looked at: enough to meet an image that was made to expand
   without end, not to check one.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2 import header as qcow2
from blocklayer.codec.qcow2.entries import (
    COMPRESSED,
    OFFSET_MASK,
    decode_compressed,
    load_table,
)
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import ImageHeader
from blocklayer.codec.qcow2.validation import validate
from blocklayer.errors import UnsupportedError
from blocklayer.units import KIB, MIB

if TYPE_CHECKING:
    from blocklayer.api.inspection.reader import Reader
    from blocklayer.api.inspection.report import Inspection

from blocklayer.api.inspection.report import Features

_L1_SAMPLE: Final = 256 * KIB
_L2_SAMPLE: Final = 2 * MIB
_EXPANSION_MAX: Final = 200
"""Times that a sample of compressed clusters may grow; data that are not mostly zeros do not."""
_EXPANSION_LEAST: Final = 16 * MIB
_CRYPT: Final = {qcow2.CRYPT_AES: "aes", qcow2.CRYPT_LUKS: "luks"}
_EXTENSIONS: Final = {
    qcow2.EXTENSION_BACKING_FORMAT,
    qcow2.EXTENSION_DATA_FILE,
    qcow2.EXTENSION_FULL_DISK_ENCRYPTION,
    qcow2.EXTENSION_FEATURE_NAMES,
    qcow2.EXTENSION_BITMAPS,
}


def inspect_qcow2(report: Inspection, reader: Reader) -> None:
    """Fill ``report``. Raises FormatError or UnsupportedError where the header is not sound."""
    bits = qcow2.probe_cluster_bits(reader.read(0, 112))
    header = qcow2.decode_header(reader.read(0, 1 << bits))
    report.variant = f"version {header.version}"
    report.virtual_size = header.size
    report.cluster_size = header.cluster_size
    _features(report, header)
    _references(report, header)
    _states(report, header)
    try:
        validate(header)
    except UnsupportedError as error:
        if not report.has("unknown-incompatible"):
            report.add("unsupported", f"{error}.")
        return
    _tables(report, reader, header)


def _features(report: Inspection, header: ImageHeader) -> None:
    features = report.features = Features()
    for kind, bits, into, id in (
        (qcow2.FEATURE_INCOMPATIBLE, header.incompatible_features, features.incompatible,
         "unknown-incompatible"),
        (qcow2.FEATURE_COMPATIBLE, header.compatible_features, features.compatible,
         "unknown-compatible"),
        (qcow2.FEATURE_AUTOCLEAR, header.autoclear_features, features.autoclear,
         "unknown-autoclear"),
    ):  # fmt: skip
        names, known = header.feature_names(kind), qcow2.known_features(kind)
        for bit in range(64):
            if not bits >> bit & 1:
                continue
            name = known.get(bit) or names.get(bit) or f"bit {bit}"
            into.append(name)
            if bit not in known:
                word = id.removeprefix("unknown-")
                report.add(id, f"Bit {bit} of the {word} features is set ('{name}'): unknown.")
    for extension in header.extensions:
        if extension.type not in _EXTENSIONS:
            report.add("unknown-extension", f"Header extension {extension.type:#010x} is unknown.")


def _references(report: Inspection, header: ImageHeader) -> None:
    if header.backing_file:
        report.refer("backing-file", header.backing_file, header.backing_format or None)
        report.add("backing-file", f"The image has the backing file '{header.backing_file}'.")
        if not header.backing_format:
            report.add("backing-format-missing", "The format of the backing file is not stored.")
    name = header.data_file
    if name is not None:
        report.refer("data-file", name, "raw")
    if name is not None or header.has_data_file:
        where = f"'{name}'" if name is not None else "a file that it does not name"
        report.add("data-file", f"The image keeps its data in {where}.")


def _states(report: Inspection, header: ImageHeader) -> None:
    if header.crypt_method:
        report.encryption = _CRYPT.get(header.crypt_method, f"method {header.crypt_method}")
        report.add("encrypted", f"The image is encrypted ({report.encryption}).")
    if header.incompatible_features & qcow2.INCOMPATIBLE_DIRTY:
        report.add("dirty", "The image is marked dirty.")
    if header.incompatible_features & qcow2.INCOMPATIBLE_CORRUPT:
        report.add("corrupt", "The image is marked corrupt.")
    if header.nb_snapshots:
        report.add("internal-snapshots", f"It holds {header.nb_snapshots} internal snapshots.")


def _tables(report: Inspection, reader: Reader, header: ImageHeader) -> None:
    geometry = Geometry.of(header)
    ends = {
        "L1 table": header.l1_table_offset + 8 * header.l1_size,
        "refcount table": header.refcount_table_offset + header.cluster_size,
        "snapshot table": header.snapshots_offset if header.nb_snapshots else 0,
    }
    for name, end in ends.items():
        if end > reader.size:
            report.add("past-end", f"The {name} ends at {end:#x}, past the end of the file.")
    l1_size = min(8 * header.l1_size, _L1_SAMPLE)
    data = reader.read(header.l1_table_offset, l1_size)
    entries = load_table(data[: len(data) // 8 * 8])
    places = [entry & OFFSET_MASK for entry in entries if entry & OFFSET_MASK]
    if len(set(places)) < len(places):
        report.add("shared-tables", "Entries of the L1 table name the same L2 table.")
    if any(place >= reader.size for place in places):
        report.add("past-end", "An L2 table is past the end of the file.")
    if not geometry.data_file:
        _clusters(report, reader, geometry, places)


def _clusters(report: Inspection, reader: Reader, geometry: Geometry, places: list[int]) -> None:
    """What the first L2 tables map."""
    seen: set[int] = set()
    shared = beyond = False
    expanded, packed = 0, [1 << 63, 0]
    for place in places[: max(1, _L2_SAMPLE // geometry.cluster_size)]:
        data = reader.read(place, geometry.cluster_size)
        for entry in _words(data, geometry.l2_entry_size):
            if entry & COMPRESSED:
                host, length = decode_compressed(entry, geometry)
                expanded += geometry.cluster_size
                packed = [min(packed[0], host), max(packed[1], host + length)]
            else:
                host = entry & OFFSET_MASK
            if not host:
                continue
            shared = shared or host in seen
            beyond = beyond or host >= reader.size
            seen.add(host)
    if shared:
        report.add("shared-clusters", "Entries of the L2 tables name the same cluster of the file.")
    if beyond:
        report.add("past-end", "A cluster of data is past the end of the file.")
    # Lengths are rounded up to sectors, many clusters to one: only all together tell the size.
    stored = packed[1] - packed[0]
    if expanded >= _EXPANSION_LEAST and expanded > stored * _EXPANSION_MAX:
        report.add(
            "compression-bomb",
            f"The first compressed clusters take {stored} bytes and expand to {expanded}.",
        )


def _words(data: bytes, size: int) -> array[int]:
    """The first word of each entry of ``size`` bytes."""
    return load_table(data[: len(data) // 8 * 8])[:: size // 8]
