"""What ``info`` shows of a qcow2 image, in QEMU's words and order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.drivers.crypto.options import LuksInfo
from blocklayer.drivers.qcow2.bitmaps import Qcow2BitmapInfo
from blocklayer.drivers.qcow2.encryption import AesInfo
from blocklayer.graph.driver import SnapshotInfo

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.snapshots import Snapshot
    from blocklayer.drivers.qcow2.image import Image


class Qcow2Info(msgspec.Struct, rename="kebab", omit_defaults=True, kw_only=True):
    """The format specific information that ``info`` shows."""

    compat: str
    compression_type: str
    lazy_refcounts: bool | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None
    refcount_bits: int
    data_file: str | None = None
    encrypt: LuksInfo | AesInfo | None = None
    data_file_raw: bool | None = None
    corrupt: bool | None = None
    extended_l2: bool | None = None


def specific_info(image: Image, bitmaps: list[Qcow2BitmapInfo]) -> Qcow2Info:
    """All of it, for an open image that keeps ``bitmaps``."""
    header = image.header
    zstd = header.compression_type == qcow2_header.COMPRESSION_ZSTD
    info = Qcow2Info(
        compat="1.1" if header.version == 3 else "0.10",
        compression_type="zstd" if zstd else "zlib",
        refcount_bits=image.geometry.refcount_bits,
        encrypt=None if image.encryption is None else image.encryption.info(),
    )
    if header.has_data_file:
        info.data_file = header.data_file or None
        info.data_file_raw = header.data_file_raw
    if header.version == 3:
        lazy = header.compatible_features & qcow2_header.COMPATIBLE_LAZY_REFCOUNTS
        corrupt = header.incompatible_features & qcow2_header.INCOMPATIBLE_CORRUPT
        info.lazy_refcounts = bool(lazy)
        info.bitmaps = bitmaps or None
        info.corrupt = bool(corrupt)
        info.extended_l2 = header.extended_l2
    return info


def snapshot_info(snapshot: Snapshot) -> SnapshotInfo:
    """One internal snapshot."""
    clock_s, clock_ns = divmod(snapshot.vm_clock_ns, 1_000_000_000)
    return SnapshotInfo(
        id=snapshot.id,
        name=snapshot.name,
        vm_state_size=snapshot.vm_state_size,
        date_sec=snapshot.date_s,
        date_nsec=snapshot.date_ns,
        vm_clock_sec=clock_s,
        vm_clock_nsec=clock_ns,
        icount=snapshot.icount,
    )
