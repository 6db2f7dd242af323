"""What is read of an image when it is opened: the header and the snapshot table.

Public:
    read_header(storage) -> ImageHeader      decoded and validated
    load_snapshots(image)                    fills ``image.snapshots``

1. Errors name the image. Nothing is followed before the codec has judged it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.header import ImageHeader, decode_header, probe_cluster_bits
from blocklayer.codec.qcow2.snapshots import decode_table, table_size_bound, validate_snapshot
from blocklayer.codec.qcow2.validation import validate
from blocklayer.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from blocklayer.drivers.qcow2.image import Image
    from blocklayer.drivers.qcow2.storage import Storage

_HEADER_PROBE_SIZE: Final = 112


async def read_header(storage: Storage) -> ImageHeader:
    """The header of the image in ``storage``."""
    head = await storage.read(0, _HEADER_PROBE_SIZE)
    try:
        bits = probe_cluster_bits(head)
        header = decode_header(await storage.read(0, 1 << bits))
        validate(header)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"Could not open '{storage.node.filename}': {error}") from None
    return header


async def load_snapshots(image: Image) -> None:
    """Read the snapshot table, if there is one."""
    count, start = image.header.nb_snapshots, image.header.snapshots_offset
    if not count:
        return
    length = min(table_size_bound(count), max(0, image.storage.size - start))
    try:
        image.snapshots, _ = decode_table(await image.storage.read(start, length), count)
        for snapshot in image.snapshots:
            validate_snapshot(snapshot, image.geometry)
    except FormatError as error:
        raise FormatError(
            f"Could not read the snapshots of '{image.node.filename}': {error}"
        ) from None
