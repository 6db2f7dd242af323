"""Making qcow2 images: where the first structures go, written so that none looks half-made.

Public:
    Qcow2CreateOptions      the options, by the names of ``-o``
    new_header(options, layout) -> ImageHeader
    create(graph, target, options)              all of it, laid out by ``layout``

1. The header comes last, in one write, after all else is on stable storage: a crash before leaves a
   file that no reader takes for an image.
2. A data file is complete before the header names it. One that did not exist is removed again when
   creation fails.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from msgspec import Meta

from blocklayer.codec.luks import new_header as new_luks_header
from blocklayer.codec.qcow2.entries import COPIED, ZERO, store_table
from blocklayer.codec.qcow2.geometry import Geometry
from blocklayer.codec.qcow2.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_ZSTD,
    CRYPT_LUKS,
    EXTENSION_FULL_DISK_ENCRYPTION,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
    MAX_BACKING_FILE_SIZE,
    ImageHeader,
)
from blocklayer.codec.qcow2.subclusters import ALLOCATED, store_l2_table
from blocklayer.codec.qcow2.validation import encode_full_disk_encryption
from blocklayer.drivers.crypto.options import (
    CipherName,
    HashName,
    IterationTime,
    IvGeneratorName,
    IvHashName,
    ModeName,
    VolumeOptions,
)
from blocklayer.drivers.qcow2.layout import Layout, plan, refcount_pieces
from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.options import CreateOptions, Size
from blocklayer.units import KIB, MIB, SECTOR, align_up, is_power_of_two

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

_MIN_CLUSTER_SIZE: Final = 512
_MAX_CLUSTER_SIZE: Final = 2 * MIB
_MIN_EXTENDED_L2_CLUSTER: Final = 16 * KIB
_MAX_REFCOUNT_BITS: Final = 64
_CHUNK: Final = MIB
_VERSIONS: Final = {None: 3, "0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


_ENCRYPT_NAMES: Final = {
    "encrypt_format": "encrypt.format",
    "encrypt_key_secret": "encrypt.key-secret",
    "encrypt_cipher_alg": "encrypt.cipher-alg",
    "encrypt_cipher_mode": "encrypt.cipher-mode",
    "encrypt_ivgen_alg": "encrypt.ivgen-alg",
    "encrypt_ivgen_hash_alg": "encrypt.ivgen-hash-alg",
    "encrypt_hash_alg": "encrypt.hash-alg",
    "encrypt_iter_time": "encrypt.iter-time",
}


class Qcow2CreateOptions(CreateOptions, kw_only=True, rename=_ENCRYPT_NAMES):
    """What a new qcow2 image can be told."""

    BEFORE_SIZE: ClassVar = frozenset(
        ("cluster_size", "extended_l2", "preallocation", "compression_type", "encryption")
    ) | frozenset(_ENCRYPT_NAMES.values())

    encryption: Annotated[
        bool | None,
        Meta(description="Encrypt the image with format 'aes' (read only by now: refused)"),
    ] = None
    encrypt_format: Annotated[
        Literal["aes", "luks"] | None,
        Meta(description="Encrypt the image, format choices: 'luks' ('aes' can only be read)"),
    ] = None
    encrypt_key_secret: Annotated[
        str | None, Meta(description="ID of secret providing qcow AES key or LUKS passphrase")
    ] = None
    encrypt_cipher_alg: CipherName = None
    encrypt_cipher_mode: ModeName = None
    encrypt_ivgen_alg: IvGeneratorName = None
    encrypt_ivgen_hash_alg: IvHashName = None
    encrypt_hash_alg: HashName = None
    encrypt_iter_time: IterationTime = None
    cluster_size: Annotated[Size, Meta(description="qcow2 cluster size")] = 64 * KIB
    extended_l2: Annotated[bool, Meta(description="Extended L2 tables")] = False
    preallocation: Annotated[
        Literal["off", "metadata", "falloc", "full"] | None,
        Meta(description="Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ] = None
    compression_type: Annotated[
        Literal["zlib", "zstd"],
        Meta(description="Compression method used for image cluster compression"),
    ] = "zlib"
    compat: Annotated[
        Literal["0.10", "1.1", "v2", "v3"] | None,
        Meta(description="Compatibility level (v2 [0.10] or v3 [1.1])"),
    ] = None
    backing_file: Annotated[str | None, Meta(description="File name of a base image")] = None
    backing_fmt: Annotated[str | None, Meta(description="Image format of the base image")] = None
    data_file: Annotated[str | None, Meta(description="File name of an external data file")] = None
    data_file_raw: Annotated[
        bool | None,
        Meta(description="The external data file must stay valid as a raw image"),
    ] = None
    lazy_refcounts: Annotated[bool, Meta(description="Postpone refcount updates")] = False
    refcount_bits: Annotated[int, Meta(description="Width of a reference count entry in bits")] = 16

    @property
    def version(self) -> int:
        """The header version that ``compat`` stands for."""
        return _VERSIONS[self.compat]

    @property
    def geometry(self) -> Geometry:
        """The sizes that follow; valid options only."""
        return Geometry.make(
            self.cluster_size.bit_length() - 1,
            version=self.version,
            refcount_order=self.refcount_bits.bit_length() - 1,
            extended_l2=self.extended_l2,
            data_file=self.data_file is not None,
        )

    @property
    def mapped(self) -> bool:
        """Whether every cluster has its place from the start; a raw data file is the whole disk."""
        return self.preallocation not in (None, "off") or bool(self.data_file_raw)

    @property
    def volume(self) -> VolumeOptions:
        """How data is to be encrypted, if it is."""
        return VolumeOptions(
            cipher_alg=self.encrypt_cipher_alg,
            cipher_mode=self.encrypt_cipher_mode,
            ivgen_alg=self.encrypt_ivgen_alg,
            ivgen_hash_alg=self.encrypt_ivgen_hash_alg,
            hash_alg=self.encrypt_hash_alg,
            iter_time=self.encrypt_iter_time,
        )

    @property
    def encryption_header_size(self) -> int:
        """Bytes of the LUKS header and its slots; 0 in an image that is not encrypted."""
        if self.encrypt_format is None:
            return 0
        volume = self.volume
        header = new_luks_header(
            volume.spec, volume.hash_name, uuid="", digest_salt=b"", detached=False
        )
        return header.payload_offset

    def secrets(self) -> list[str]:
        """The passphrase's."""
        return [self.encrypt_key_secret] if self.encrypt_key_secret else []

    def validate(self) -> None:
        """Raise UsageError unless an image can be made like this."""
        self.validate_units()
        self._validate_encryption()
        if self.version < 3:
            self._validate_version_2()
        self._validate_data_file()
        self._validate_backing()
        if align_up(self.size, SECTOR) > self.geometry.max_size:
            raise UsageError(
                "The image size is too large for file format 'qcow2' "
                "(try using a larger cluster size)"
            )

    def validate_units(self) -> None:
        """Raise UsageError unless clusters and refcounts can have these sizes."""
        if not (
            is_power_of_two(self.cluster_size)
            and _MIN_CLUSTER_SIZE <= self.cluster_size <= _MAX_CLUSTER_SIZE
        ):
            raise UsageError(
                f"Cluster size must be a power of two between {_MIN_CLUSTER_SIZE} and "
                f"{_MAX_CLUSTER_SIZE // KIB}k"
            )
        if self.extended_l2 and self.version >= 3 and self.cluster_size < _MIN_EXTENDED_L2_CLUSTER:
            raise UsageError(
                "Extended L2 entries are only supported with cluster sizes of at least "
                f"{_MIN_EXTENDED_L2_CLUSTER} bytes"
            )
        if not is_power_of_two(self.refcount_bits) or self.refcount_bits > _MAX_REFCOUNT_BITS:
            raise UsageError(
                "Refcount width must be a power of two and may not exceed "
                f"{_MAX_REFCOUNT_BITS} bits"
            )

    def _validate_encryption(self) -> None:
        if self.encryption or self.encrypt_format == "aes":
            raise UnsupportedError(
                "Images with the old AES encryption can only be read: use encrypt.format=luks"
            )
        if self.encrypt_format is None:
            given = [
                option for name, option in _ENCRYPT_NAMES.items() if getattr(self, name) is not None
            ]
            if given:
                raise UsageError("Parameter 'encrypt.format' is missing")
            return
        if self.encrypt_key_secret is None:
            raise UsageError("Parameter 'encrypt.key-secret' is required for cipher")
        _ = self.volume.spec, self.volume.time_ms
        if self.version < 3 and self.preallocation not in (None, "off"):
            # Without zero clusters the guest would see what the space decrypts to.
            raise UsageError(
                "Preallocation of encrypted images is only supported with compatibility level 1.1 "
                "and above (use version=v3 or greater)"
            )

    def _validate_version_2(self) -> None:
        newer = "compatibility level 1.1 and above (use version=v3 or greater)"
        if self.extended_l2:
            raise UsageError(f"Extended L2 entries are only supported with {newer}")
        if self.refcount_bits != 16:
            raise UsageError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use version=v3 or greater)"
            )
        if self.lazy_refcounts:
            raise UsageError(f"Lazy refcounts only supported with {newer}")
        if self.compression_type != "zlib":
            raise UsageError(f"Non-zlib compression type is only supported with {newer}")

    def _validate_data_file(self) -> None:
        if self.data_file is None:
            if self.data_file_raw:
                raise UsageError("data-file-raw requires data-file")
            return
        if not self.data_file:
            raise UsageError("Expected data file name, got empty string")
        if self.version < 3:
            raise UsageError(
                "External data files are only supported with compatibility level 1.1 and above "
                "(use version=v3 or greater)"
            )
        if self.data_file_raw and self.backing_file:
            raise UsageError("Backing file and data-file-raw cannot be used at the same time")
        if self.data_file_raw and self.encrypt_format is not None:
            raise UsageError(
                "The data file of an encrypted image holds cipher text: it cannot be data-file-raw"
            )
        self._validate_header()

    def _validate_backing(self) -> None:
        if self.backing_file == "":
            raise UsageError("Expected backing file name, got empty string")
        if self.backing_file is None:
            if self.backing_fmt:
                raise UsageError("Backing format cannot be used without backing file")
            return
        if self.preallocation not in (None, "off") and not self.extended_l2:
            raise UsageError(
                "Backing file and preallocation can only be used at the same time if "
                "extended_l2 is on"
            )
        if len(self.backing_file.encode("utf-8", "surrogateescape")) > MAX_BACKING_FILE_SIZE:
            raise UsageError(
                f"Backing file name '{self.backing_file[:64]}…' is longer than "
                f"{MAX_BACKING_FILE_SIZE} bytes"
            )
        self._validate_header()

    def _validate_header(self) -> None:
        """Raise unless all names fit into it; nothing of the layout changes its length."""
        new_header(self, plan(self.geometry, 0, crypto=self.encryption_header_size)).encode()


def new_header(options: Qcow2CreateOptions, layout: Layout) -> ImageHeader:
    """The header of a new image."""
    header = ImageHeader(
        version=options.version,
        cluster_bits=layout.geometry.cluster_bits,
        size=layout.size,
        l1_size=layout.l1_size,
        l1_table_offset=layout.l1_offset,
        refcount_table_offset=layout.table_offset,
        refcount_table_clusters=layout.table_clusters,
        incompatible_features=INCOMPATIBLE_EXTENDED_L2 if options.extended_l2 else 0,
        compatible_features=COMPATIBLE_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        refcount_order=layout.geometry.refcount_order,
        backing_file=options.backing_file,
    )
    if options.data_file is not None:
        header.incompatible_features |= INCOMPATIBLE_DATA_FILE
        header.data_file = options.data_file
        if options.data_file_raw:
            header.autoclear_features |= AUTOCLEAR_DATA_FILE_RAW
    if options.compression_type == "zstd":
        header.compression_type = COMPRESSION_ZSTD
    if options.backing_file is not None and options.backing_fmt is not None:
        header.backing_format = options.backing_fmt
    if layout.crypto_size:
        header.crypt_method = CRYPT_LUKS
        area = encode_full_disk_encryption(layout.crypto_offset, layout.crypto_size)
        header.set_extension(EXTENSION_FULL_DISK_ENCRYPTION, area)
    header.set_feature_names()
    return header


async def create(graph: Graph, target: Node, options: Qcow2CreateOptions) -> None:
    """Write a new image to ``target``, an open writable protocol node."""
    options.validate()
    size, crypto = align_up(options.size, SECTOR), options.encryption_header_size
    layout = plan(options.geometry, size, mapped=options.mapped, crypto=crypto)
    if options.data_file is None:
        await _write_image(graph, target, options, layout, options.preallocation)
        return
    from blocklayer.drivers.qcow2.create_data_file import created_data_file

    async with created_data_file(graph, target, options, size):
        await _write_image(graph, target, options, layout, None)


async def _write_image(
    graph: Graph,
    target: Node,
    options: Qcow2CreateOptions,
    layout: Layout,
    preallocation: str | None,
) -> None:
    header = new_header(options, layout).encode()
    await _make_room(target, layout, preallocation)
    for offset, data in refcount_pieces(layout):
        await io.write(target, offset, data)
    if options.mapped:
        # Of a preallocated cluster no subcluster has data: what is below shows through. A raw data
        # file is all data.
        await _write_mapping(target, layout, ALLOCATED if options.data_file_raw else 0)
    if layout.crypto_size:
        await _write_key_slots(graph, target, layout, options)
    await io.flush(target)
    await io.write(target, 0, header[: layout.file_size])
    await io.flush(target)


async def _write_key_slots(
    graph: Graph, target: Node, layout: Layout, options: Qcow2CreateOptions
) -> None:
    from blocklayer.drivers.crypto.keys import KeySlots, make_header
    from blocklayer.drivers.crypto.storage import NodeStorage

    assert options.encrypt_key_secret is not None
    volume = options.volume
    await KeySlots.format(
        NodeStorage(target),
        graph.policy,
        make_header(volume.spec, volume.hash_name),
        graph.objects.secret(options.encrypt_key_secret).passphrase,
        volume.time_ms,
        start=layout.crypto_offset,
    )


async def _make_room(target: Node, layout: Layout, preallocation: str | None) -> None:
    """Let all of the layout exist in ``target`` and read as zeros."""
    if target.size == 0:
        allocated = preallocation if preallocation in ("falloc", "full") else "off"
        await io.truncate(target, layout.file_size, preallocation=allocated)
        return
    # A device holds what it held before, perhaps an image: end that first.
    await io.write_zeroes(target, 0, layout.geometry.cluster_size)
    await io.flush(target)
    unmap = preallocation not in ("falloc", "full")
    await io.write_zeroes(target, 0, layout.file_size, unmap=unmap)


async def _write_mapping(target: Node, layout: Layout, bitmap: int) -> None:
    """L1 and L2 tables that map every guest cluster to the data clusters, in order.

    ``bitmap`` goes beside every extended entry.
    """
    if not layout.l1_size:
        return
    geometry = layout.geometry
    # In cipher text the zeros of unwritten space are garbage: such clusters say that they are zero.
    zero = layout.crypto_size and not geometry.extended_l2
    flags = COPIED | ZERO if zero else COPIED
    l1 = _run(layout.l2_offset, layout.l1_size, geometry.cluster_size)
    await io.write(target, layout.l1_offset, store_table(l1))
    at_once = max(1, _CHUNK >> geometry.cluster_bits) * geometry.l2_entries
    for start in range(0, layout.data_clusters, at_once):
        count = min(at_once, layout.data_clusters - start)
        entries = _run(
            layout.data_offset + (start << geometry.cluster_bits),
            count,
            geometry.cluster_size,
            flags,
        )
        offset = layout.l2_offset + start * geometry.l2_entry_size
        bitmaps = array("Q", (bitmap,)) * count if geometry.extended_l2 else None
        await io.write(target, offset, store_l2_table(entries, bitmaps))


def _run(offset: int, count: int, cluster_size: int, flags: int = COPIED) -> array[int]:
    """Entries for ``count`` contiguous clusters, each used once."""
    start = flags | offset
    return array("Q", range(start, start + count * cluster_size, cluster_size))
