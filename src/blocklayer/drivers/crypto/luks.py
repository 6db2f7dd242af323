"""``luks``: a disk encrypted as LUKS version 1 has it, its header in front of it or in ``header``.

1. All guest bytes are encrypted, zeros too: sectors are numbered from the start of the disk.
2. A disk that was made or grown for a user holds no zeros there, but what the old bytes of its
   storage decrypt to, as with QEMU. Grown by a parent node, which counts on zeros, it gets them.
3. Without its key (``metadata_only``) a node tells what the header says and refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

from msgspec import UNSET, Meta, UnsetType

from blocklayer.drivers.crypto.options import (
    CipherName,
    HashName,
    IterationTime,
    IvGeneratorName,
    IvHashName,
    KeySecret,
    Keyslot,
    LuksInfo,
    ModeName,
    NewSecret,
    OldSecret,
    SlotTime,
    State,
    VolumeOptions,
    luks_info,
    slot_change,
)
from blocklayer.drivers.crypto.storage import NodeStorage
from blocklayer.errors import FormatError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.child import Role
from blocklayer.graph.driver import Buffer, DriverInfo, FormatDriver, Measured, Measurement
from blocklayer.graph.extent import Extent, Kind
from blocklayer.graph.options import AmendOptions, NodeOptions, Reference
from blocklayer.graph.options import CreateOptions as AnyCreateOptions
from blocklayer.units import MAX_SIZE, MIB, SECTOR, align_down, align_up

if TYPE_CHECKING:
    from blocklayer.drivers.crypto.keys import KeySlots
    from blocklayer.drivers.crypto.sealed import Sealed
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

_MAGIC: Final = b"LUKS\xba\xbe\0\1"
_CHUNK: Final = MIB
NO_KEY: Final = "Parameter '{}' is required for cipher"


class LuksOptions(NodeOptions):
    """``header``: where the header is, if it is not at the start of ``file``."""

    file: Reference | None = None
    header: Reference | None = None
    key_secret: str | UnsetType = UNSET


class LuksCreateOptions(
    AnyCreateOptions,
    rename={
        "key_secret": "key-secret",
        "cipher_alg": "cipher-alg",
        "cipher_mode": "cipher-mode",
        "ivgen_alg": "ivgen-alg",
        "ivgen_hash_alg": "ivgen-hash-alg",
        "hash_alg": "hash-alg",
        "iter_time": "iter-time",
        "detached_header": "detached-header",
    },
):
    """What a new LUKS volume can be told."""

    key_secret: KeySecret = None
    cipher_alg: CipherName = None
    cipher_mode: ModeName = None
    ivgen_alg: IvGeneratorName = None
    ivgen_hash_alg: IvHashName = None
    hash_alg: HashName = None
    iter_time: IterationTime = None
    detached_header: Annotated[bool | None, Meta(description="Create a detached LUKS header")] = (
        None
    )
    preallocation: Annotated[
        Literal["off", "metadata", "falloc", "full"] | None,
        Meta(description="Preallocation mode (allowed values: off, falloc, full)"),
    ] = None

    @property
    def volume(self) -> VolumeOptions:
        """How the volume is to be encrypted."""
        return VolumeOptions(
            cipher_alg=self.cipher_alg,
            cipher_mode=self.cipher_mode,
            ivgen_alg=self.ivgen_alg,
            ivgen_hash_alg=self.ivgen_hash_alg,
            hash_alg=self.hash_alg,
            iter_time=self.iter_time,
        )

    @property
    def needs_size(self) -> bool:
        """The size of a disk is that of its file, not its header's to tell."""
        return not self.detached_header

    def secrets(self) -> list[str]:
        """The passphrase's."""
        return [self.key_secret] if self.key_secret else []

    def validate(self) -> None:
        """Raise UsageError or UnsupportedError unless a volume can be made like this."""
        if self.key_secret is None:
            raise UsageError(NO_KEY.format("key-secret"))
        _ = self.volume.spec, self.volume.time_ms
        if self.detached_header and self.preallocation not in (None, "off"):
            raise UsageError("Preallocation is for data: it cannot be used with detached-header")


class LuksAmendOptions(
    AmendOptions,
    rename={
        "new_secret": "new-secret",
        "old_secret": "old-secret",
        "iter_time": "iter-time",
    },
):
    """What can be changed of the key slots."""

    state: State = UNSET
    new_secret: NewSecret = UNSET
    old_secret: OldSecret = UNSET
    keyslot: Keyslot = UNSET
    iter_time: SlotTime = UNSET


class LuksDriver(FormatDriver):
    """One LUKS volume."""

    NAME: ClassVar[str] = "luks"
    Options = LuksOptions
    CreateOptions = LuksCreateOptions
    new_reads_zero = False

    _slots: KeySlots
    _storage: Node

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._sealed: Sealed | None = None
        self._key = bytearray()

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Certain for version 1; version 2 is another format."""
        return 100 if head.startswith(_MAGIC) else 0

    async def open(self) -> None:
        """Read the header and, unless only metadata is wanted, unlock it."""
        from blocklayer.drivers.crypto.keys import KeySlots

        node, options = self.node, self.node.options
        assert isinstance(options, LuksOptions)
        self._detached = options.header is not None
        role = Role.DATA if self._detached else Role.STORAGE
        self._storage = home = await node.open_child("file", options.file, role)
        if self._detached:
            home = await node.open_child("header", options.header)
        if options.key_secret is not UNSET:
            node.overrides["key-secret"] = options.key_secret
        self._slots = await KeySlots.load(NodeStorage(home), node.graph.policy)
        self._payload_offset = self._slots.header.payload_offset
        needed = 0 if self._detached else self._slots.header.size
        if self._payload_offset < needed and not node.flags.metadata_only:
            raise FormatError(
                f"The LUKS header in '{self._storage.filename}' is a detached one: give it as "
                "'header', and as 'file' the file that holds the data"
            )
        if self._storage.size < self._payload_offset and not node.flags.metadata_only:
            raise FormatError(
                f"The LUKS payload of '{self._storage.filename}' starts at "
                f"{self._payload_offset:#x}, past the file's end at {self._storage.size:#x}"
            )
        if not node.flags.metadata_only:
            await self._unlock(options.key_secret)

    async def _unlock(self, secret: str | UnsetType) -> None:
        from blocklayer.drivers.crypto.cipher import SectorCipher
        from blocklayer.drivers.crypto.sealed import Sealed

        if secret is UNSET:
            raise UsageError(NO_KEY.format("key-secret"))
        passphrase = self.node.graph.objects.secret(secret).passphrase
        self._key = await self._slots.unlock(passphrase)
        cipher = SectorCipher(self._slots.header.spec, self._key)
        self._sealed = Sealed(NodeStorage(self._storage), cipher)

    async def close(self) -> None:
        """Forget the key."""
        self._sealed = None
        self._key[:] = bytes(len(self._key))

    @property
    def size(self) -> int:
        """Whole sectors of the payload."""
        return align_down(max(0, self._storage.driver.size - self._payload_offset), SECTOR)

    async def map(self, offset: int, length: int) -> Extent:
        """All of it is encrypted."""
        return Extent(offset, length, Kind.OPAQUE, writable=not self.node.read_only)

    def _open_data(self) -> Sealed:
        if self._sealed is None:
            raise UsageError(NO_KEY.format("key-secret"))
        return self._sealed

    async def read_opaque(self, offset: int, view: memoryview) -> None:
        """Read and decrypt."""
        await self._open_data().read(self._payload_offset + offset, offset, view)

    async def write_opaque(self, offset: int, data: Buffer) -> None:
        """Encrypt and write."""
        await self._open_data().write(self._payload_offset + offset, offset, data)

    async def flush(self) -> None:
        """Nothing is kept here."""
        await io.flush(self._storage)

    async def truncate(self, size: int, *, preallocation: str, shrink: bool) -> None:
        """Change the size of the file."""
        if size % SECTOR:
            raise UsageError(f"The size of a LUKS disk must be a multiple of {SECTOR} bytes")
        if size > MAX_SIZE - self._payload_offset:
            raise UsageError("The requested file size is too large")
        old = self.size
        await io.truncate(
            self._storage, size + self._payload_offset, preallocation=preallocation, shrink=shrink
        )
        if any(edge.parent is not None for edge in self.node.parents):
            for at in range(old, size, _CHUNK):
                await self.write_opaque(at, io.zeros(min(_CHUNK, size - at)))

    def actual_size(self) -> int | None:
        """The file's."""
        return self._storage.driver.actual_size()

    def info(self) -> DriverInfo:
        """That it is encrypted."""
        return DriverInfo(encrypted=True)

    def specific_info(self) -> LuksInfo:
        """What the header says."""
        return luks_info(self._slots.header, detached=self._detached)

    @classmethod
    def amend_options(cls) -> type[AmendOptions]:
        """Key slots."""
        return LuksAmendOptions

    async def amend(
        self, options: AmendOptions, progress: Callable[[int, int], None], *, force: bool = False
    ) -> None:
        """Add and erase key slots."""
        from blocklayer.drivers.crypto.amending import amend_slots

        assert isinstance(options, LuksAmendOptions)
        self._open_data()
        change = slot_change(
            options.state,
            options.new_secret,
            options.old_secret,
            options.keyslot,
            options.iter_time,
        )
        await amend_slots(self._slots, self._key, change, self.node.graph.objects, force=force)

    @classmethod
    async def create(cls, graph: Graph, target: Node, options: AnyCreateOptions) -> None:
        """Write a header, and make room for the disk after it."""
        from blocklayer.drivers.crypto.keys import KeySlots, make_header

        assert isinstance(options, LuksCreateOptions)
        options.validate()
        assert options.key_secret is not None
        passphrase = graph.objects.secret(options.key_secret).passphrase
        volume, detached = options.volume, bool(options.detached_header)
        header = make_header(volume.spec, volume.hash_name, detached=detached)
        end = header.size
        if not detached:
            end = header.payload_offset + align_up(options.size, SECTOR)
        if end > MAX_SIZE:
            raise UsageError("The requested file size is too large")
        if target.size:
            # A device holds what it held before, perhaps a header: end that first.
            if target.size < end:
                raise UnsupportedError(
                    f"'{target.filename}' has {target.size} bytes, {end} are needed"
                )
            await io.write_zeroes(target, 0, header.size)
            await io.flush(target)
        else:
            await io.truncate(target, end, preallocation=options.preallocation or "off")
        await KeySlots.format(NodeStorage(target), graph.policy, header, passphrase, volume.time_ms)

    @classmethod
    async def measure(
        cls, options: AnyCreateOptions, size: int, source: Measured | None
    ) -> Measurement:
        """The header and the disk, all of which is stored."""
        from blocklayer.drivers.crypto.keys import make_header

        assert isinstance(options, LuksCreateOptions)
        volume = options.volume
        header = make_header(volume.spec, volume.hash_name)
        whole = header.size if options.detached_header else 0
        whole = whole or header.payload_offset + align_up(size, SECTOR)
        return Measurement(required=whole, fully_allocated=whole)
