"""Encryption of a qcow2 image's data: LUKS, and for reading the AES that came before it.

1. Guest data of plain clusters is encrypted, by sectors numbered by their place in the file (LUKS)
   or on the disk (AES). Zero clusters, metadata and compressed clusters are not; compressed ones
   are read if somebody else wrote them, and never written: all could see what they hold.
2. Without the key an image opens for its metadata only.
3. AES images are read only: the format is broken, and kept for rescuing what is in it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.header import ImageHeader
from blocklayer.codec.qcow2.validation import full_disk_encryption_area
from blocklayer.drivers.crypto.luks import NO_KEY
from blocklayer.drivers.crypto.options import LuksInfo, SlotChange, luks_info
from blocklayer.errors import BlockError, UnsupportedError, UsageError
from blocklayer.graph import io
from blocklayer.graph.extent import Allocation, Extent, Kind

if TYPE_CHECKING:
    from blocklayer.drivers.crypto.keys import KeySlots
    from blocklayer.drivers.crypto.sealed import Sealed
    from blocklayer.drivers.qcow2.compression import Compressor
    from blocklayer.drivers.qcow2.mapping import Mapping
    from blocklayer.drivers.qcow2.storage import Storage
    from blocklayer.graph.driver import Buffer
    from blocklayer.graph.node import Node

_AES_KEY_SIZE: Final = 16
_FORMATS: Final = {qcow2_header.CRYPT_AES: "aes", qcow2_header.CRYPT_LUKS: "luks"}


class EncryptOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """``encrypt.*`` of a qcow2 node."""

    format: Literal["aes", "luks"] | UnsetType = UNSET
    key_secret: str | UnsetType = UNSET


class AesInfo(msgspec.Struct, frozen=True):
    """All there is to tell of the old encryption."""

    format: str = "aes"


class Encryption:
    """The encryption of one open image."""

    def __init__(self, node: Node, format: str, slots: KeySlots | None) -> None:
        self.format = format
        self.slots = slots
        self._node = node
        self._by_place = format == "luks"
        self._sealed: Sealed | None = None
        self._key = bytearray()

    @classmethod
    async def open(
        cls,
        node: Node,
        storage: Storage,
        data: Storage,
        header: ImageHeader,
        options: EncryptOptions,
    ) -> Encryption | None:
        """What ``header`` asks for, unlocked unless only metadata is wanted; None if nothing.

        Keys are in ``storage``, what they encrypt in ``data``.
        """
        format = _FORMATS.get(header.crypt_method)
        if format is None:
            if options.format is not UNSET:
                raise UsageError(
                    "No encryption in image header, but options specified format "
                    f"'{options.format}'"
                )
            return None
        if options.format not in (UNSET, format):
            raise UsageError(
                f"Header reported '{format}' encryption format but options specify "
                f"'{options.format}'"
            )
        if options.key_secret is not UNSET:
            node.overrides["encrypt.key-secret"] = options.key_secret
        slots = None
        if format == "luks":
            slots = await _load_slots(node, storage, header)
        found = cls(node, format, slots)
        if not node.flags.metadata_only:
            await found._unlock(data, options.key_secret)
        return found

    async def _unlock(self, data: Storage, secret: str | UnsetType) -> None:
        from blocklayer.codec.luks import CipherSpec
        from blocklayer.drivers.crypto.cipher import SectorCipher
        from blocklayer.drivers.crypto.sealed import Sealed

        if secret is UNSET:
            raise self._no_key()
        flags = self._node.flags
        if not self._by_place and not flags.read_only:
            if not flags.auto_read_only:
                raise UnsupportedError(
                    "Images with the old AES encryption can be read only: open it read-only, and "
                    "convert it to one with encrypt.format=luks"
                )
            flags.read_only = True
        passphrase = self._node.graph.objects.secret(secret).passphrase
        if self.slots is not None:
            spec = self.slots.header.spec
            self._key = await self.slots.unlock(passphrase)
        else:
            spec = CipherSpec(key_size=_AES_KEY_SIZE, mode="cbc", ivgen="plain64")
            self._key = bytearray(passphrase[:_AES_KEY_SIZE].ljust(_AES_KEY_SIZE, b"\0"))
        self._sealed = Sealed(data, SectorCipher(spec, self._key))

    @staticmethod
    def _no_key() -> UsageError:
        return UsageError(NO_KEY.format("encrypt.key-secret"))

    @property
    def _open(self) -> Sealed:
        if self._sealed is None:
            raise self._no_key()
        return self._sealed

    def close(self) -> None:
        """Forget the key."""
        self._sealed = None
        self._key[:] = bytes(len(self._key))

    def info(self) -> LuksInfo | AesInfo:
        """What ``info`` shows."""
        if self.slots is None:
            return AesInfo()
        return luks_info(self.slots.header, detached=False, format="luks")

    @staticmethod
    def shown(extent: Extent) -> Extent:
        """``extent`` as the graph must see it: nobody reads past us, or is told a place."""
        if extent.host_offset is None:
            return extent
        kind = Kind.OPAQUE if extent.kind is Kind.DATA else extent.kind
        return Extent(extent.offset, extent.length, kind, writable=extent.writable)

    def prepare(self, allocation: Allocation) -> None:
        """Let what fills ``allocation`` be encrypted on its way."""
        sealed = self._open
        # Space that reads as zeros does not when it is decrypted.
        allocation.reads_zero = False
        allocation.seal = functools.partial(sealed.seal, allocation.host_offset)

    async def read(
        self, offset: int, view: memoryview, mapping: Mapping, compressor: Compressor
    ) -> None:
        """Fill ``view``, which lies within encrypted or compressed clusters."""
        done = 0
        while done < len(view):
            extent = await mapping.map(offset + done, len(view) - done)
            piece = view[done : done + extent.length]
            place = extent.host_offset
            if extent.compressed:
                await compressor.read(extent.offset, piece)
            elif extent.kind is Kind.DATA and place is not None:
                position = place if self._by_place else extent.offset
                await self._open.read(place, position, piece)
            else:
                # Rewritten since the request looked: let it have what is there now.
                await io.read_into(self._node, extent.offset, piece)
            done += len(piece)

    async def write(self, offset: int, data: Buffer, mapping: Mapping) -> None:
        """Encrypt and store ``data`` in clusters that may be written in place."""
        view = memoryview(data)
        while view:
            extent = await mapping.map(offset, len(view))
            piece, place = view[: extent.length], extent.host_offset
            if extent.writable and place is not None:
                await self._open.write(place, place, piece)
            else:
                # Given up since the request looked.
                await io.write(self._node, offset, piece)
            offset, view = offset + len(piece), view[len(piece) :]

    async def amend(self, change: SlotChange, *, force: bool) -> None:
        """Add and erase key slots."""
        from blocklayer.drivers.crypto.amending import amend_slots

        _ = self._open
        if self.slots is None:
            raise UnsupportedError("Only LUKS encryption options can be amended")
        objects = self._node.graph.objects
        await amend_slots(self.slots, self._key, change, objects, force=force)


async def _load_slots(node: Node, storage: Storage, header: ImageHeader) -> KeySlots:
    from blocklayer.drivers.crypto.keys import KeySlots

    area = full_disk_encryption_area(header)
    assert area is not None, "validation saw to that"
    start, room = area
    try:
        return await KeySlots.load(storage, node.graph.policy, start=start, room=room)
    except BlockError as error:
        raise error.reworded(
            f"Could not open '{storage.node.filename}': encryption header at {start:#x}: {error}"
        ) from None


def refuse_compression(encryption: Encryption | None) -> None:
    """Raise UnsupportedError in an encrypted image: compressed clusters are not encrypted."""
    if encryption is not None:
        raise UnsupportedError(
            "Compression and encryption not supported at the same time: compressed clusters would "
            "be stored without encryption"
        )
