"""Encryption of version 1 images: AES-128 in CBC, by sectors numbered as on the disk.

1. It is for reading only, to rescue what such images hold: the format is broken.
2. Without the key an image opens for its metadata only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from blocklayer.drivers.crypto.sealed import Sealed
    from blocklayer.graph.node import Node

_KEY_SIZE: Final = 16


class EncryptOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """``encrypt.*`` of a node."""

    format: Literal["aes"] | UnsetType = UNSET
    key_secret: str | UnsetType = UNSET


def check_unused(options: EncryptOptions | UnsetType) -> None:
    """Raise UsageError if there are ``options``, for an image without encryption."""
    if options is not UNSET and options.format is not UNSET:
        raise UsageError(
            f"No encryption in image header, but options specified format '{options.format}'"
        )


def unlock(node: Node, storage: Node, options: EncryptOptions | UnsetType) -> Sealed | None:
    """The data of the encrypted image in ``storage``; None where only metadata are wanted.

    Raises UsageError without a key, UnsupportedError if the node is to be writable.
    """
    from blocklayer.codec.luks import CipherSpec
    from blocklayer.drivers.crypto.cipher import SectorCipher
    from blocklayer.drivers.crypto.luks import NO_KEY
    from blocklayer.drivers.crypto.sealed import Sealed
    from blocklayer.drivers.crypto.storage import NodeStorage

    flags = node.flags
    if flags.metadata_only:
        return None
    secret = UNSET if options is UNSET else options.key_secret
    if secret is UNSET:
        raise UsageError(NO_KEY.format("encrypt.key-secret"))
    node.overrides["encrypt.key-secret"] = secret
    if not flags.read_only:
        if not flags.auto_read_only:
            raise UnsupportedError(
                "Encrypted images of this format can be read only: open it read-only, and convert "
                "it to qcow2 with encrypt.format=luks"
            )
        flags.read_only = True
    passphrase = node.graph.objects.secret(secret).passphrase
    key = bytes(passphrase[:_KEY_SIZE]).ljust(_KEY_SIZE, b"\0")
    spec = CipherSpec(key_size=_KEY_SIZE, mode="cbc", ivgen="plain64")
    return Sealed(NodeStorage(storage), SectorCipher(spec, key))
