"""``secret`` objects: passphrases and keys, given as data or in a file, plain or encrypted.

1. A secret is read once, when it is made; a file that changes later changes nothing.
2. One that is encrypted by another (``keyid``, ``iv``) is AES-256-CBC with PKCS#7 padding, and both
   it and its key are checked at once.
3. Its bytes are seen by who asks for them only; ``repr`` and errors do not hold them.
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from blocklayer.errors import StorageError, UsageError
from blocklayer.graph.objects import UserObject

if TYPE_CHECKING:
    from blocklayer.graph.objects import Objects

_KEY_SIZE: Final = 32
_BLOCK_SIZE: Final = 16
_MAX_FILE_SIZE: Final = 1 << 20


class SecretProperties(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What ``--object secret,…`` takes."""

    format: Literal["raw", "base64"] = "raw"
    data: str | UnsetType = UNSET
    file: str | UnsetType = UNSET
    keyid: str | UnsetType = UNSET
    iv: str | UnsetType = UNSET


class Secret(UserObject):
    """A passphrase or key, by its id."""

    Properties = SecretProperties

    def __init__(self, identifier: str, data: bytes) -> None:
        self.identifier = identifier
        self.data = data

    def __repr__(self) -> str:
        return f"Secret({self.identifier!r}, …)"

    @property
    def passphrase(self) -> bytes:
        """The secret as text. Raises UsageError if it is none: nobody could type it."""
        if self.data.decode("utf-8", "ignore").encode() != self.data:
            raise UsageError(f"Data from secret {self.identifier} is not valid UTF-8")
        return self.data

    @classmethod
    def make(cls, objects: Objects, identifier: str, properties: SecretProperties) -> Secret:
        """Read, decrypt and decode. Raises UsageError, or StorageError for the file."""
        data = _given(properties)
        if properties.keyid is not UNSET:
            return cls(identifier, _decrypted(objects, properties.keyid, properties, data))
        if properties.format == "base64":
            data = _base64(data)
        return cls(identifier, data)


def _given(properties: SecretProperties) -> bytes:
    if properties.file is not UNSET:
        if properties.data is not UNSET:
            raise UsageError("'file' and 'data' are mutually exclusive")
        return _read(properties.file)
    if properties.data is UNSET:
        raise UsageError("Either 'file' or 'data' must be provided")
    return properties.data.encode("utf-8", "surrogateescape")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_SIZE + 1)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or 22
        raise StorageError(f"Unable to read {path}: {os.strerror(number)}", number, path) from None
    if len(data) > _MAX_FILE_SIZE:
        raise UsageError(f"'{path}' is longer than a secret can be ({_MAX_FILE_SIZE} bytes)")
    return data


def _base64(data: bytes) -> bytes:
    try:
        # Lines are how people's tools write it.
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        raise UsageError("Base64 data contains invalid characters") from None


def _decrypted(objects: Objects, keyid: str, properties: SecretProperties, data: bytes) -> bytes:
    """``data`` decrypted by the secret ``keyid``."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = objects.secret(keyid).data
    if len(key) != _KEY_SIZE:
        raise UsageError(f"Key should be {_KEY_SIZE} bytes in length")
    if properties.iv is UNSET:
        raise UsageError("IV is required to decrypt secret")
    iv = _base64(properties.iv.encode("utf-8", "surrogateescape"))
    if len(iv) != _BLOCK_SIZE:
        raise UsageError(f"IV should be {_BLOCK_SIZE} bytes in length not {len(iv)}")
    if properties.format == "base64":
        data = _base64(data)
    if not data or len(data) % _BLOCK_SIZE:
        raise UsageError(f"Length {len(data)} must be a multiple of block size {_BLOCK_SIZE}")
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    plain = decryptor.update(data) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= _BLOCK_SIZE or plain[-padding:] != bytes([padding]) * padding:
        raise UsageError(
            f"Incorrect padding found on decrypted data: '{keyid}' is not the secret's key, or the "
            "IV is another"
        )
    return plain[:-padding]
