"""LUKS version 1 on disk: the header, its eight key slots, and the splitting of keys.

Public:
    MAGIC, HEADER_SIZE, SLOT_COUNT, STRIPES
    CipherSpec(key_size, mode, ivgen, ivgen_hash)   how sectors are encrypted
    KeySlot, LuksHeader                             decode_header(data) -> LuksHeader, .encode()
    new_header(spec, hash_name, ...) -> LuksHeader  slots and payload where QEMU puts them
    split_key(key, random, hash_name) -> bytes      the anti-forensic splitter, and its inverse
    merge_key(material, key_size, stripes, hash_name) -> bytearray

1. What ``decode_header`` returns has been checked: every area that a slot names lies after the
   header, before the payload where that has a place, and meets no other slot's; counts are bounded.
2. decode then encode gives the same bytes for every header that fits the format, but for what
   follows the end of a text.
3. A split key is worthless when any one of its stripes is lost: that is what makes erasing work.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated, Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError
from blocklayer.record import U16, U32, Record
from blocklayer.units import KIB, SECTOR, align_up

MAGIC: Final = b"LUKS\xba\xbe"
SLOT_COUNT: Final = 8
STRIPES: Final = 4000
DIGEST_SIZE: Final = 20
SALT_SIZE: Final = 32

_VERSION: Final = 1
_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD
_SLOT_ALIGNMENT: Final = 4 * KIB
_STRIPES_MAX: Final = 2 * STRIPES
"""Everybody writes 4000; nothing is read that would need more memory than twice that."""

MODES: Final = ("cbc", "xts")
IVGENS: Final = ("plain", "plain64", "essiv")
HASHES: Final = {
    "md5": 16, "sha1": 20, "ripemd160": 20, "sha224": 28, "sha256": 32, "sm3": 32, "sha384": 48,
    "sha512": 64,
}  # fmt: skip
"""Hash names and the sizes of their digests."""
AES_KEY_SIZES: Final = (16, 24, 32)


class _Fixed(Record, byte_order=">"):
    """The header up to the key slots."""

    magic: Annotated[bytes, "6s"]
    version: U16
    cipher_name: Annotated[bytes, "32s"]
    cipher_mode: Annotated[bytes, "32s"]
    hash_name: Annotated[bytes, "32s"]
    payload_offset_sectors: U32
    key_size: U32
    digest: Annotated[bytes, "20s"]
    digest_salt: Annotated[bytes, "32s"]
    digest_iterations: U32
    uuid: Annotated[bytes, "40s"]


class _Slot(Record, byte_order=">"):
    state: U32
    iterations: U32
    salt: Annotated[bytes, "32s"]
    material_offset_sectors: U32
    stripes: U32


HEADER_SIZE: Final = _Fixed.SIZE + SLOT_COUNT * _Slot.SIZE


class CipherSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How sectors are encrypted. ``key_size``: bytes of the AES key, half of the master key's in
    mode ``"xts"``.
    """

    key_size: int
    mode: str
    ivgen: str
    ivgen_hash: str | None = None

    @property
    def algorithm(self) -> str:
        """The cipher, named as in options: ``"aes-256"``."""
        return f"aes-{self.key_size * 8}"

    @property
    def master_key_size(self) -> int:
        """Bytes of the key that all sectors are encrypted with."""
        return self.key_size * (2 if self.mode == "xts" else 1)

    def check(self) -> None:
        """Raise UnsupportedError for what cannot be had together."""
        if self.ivgen_hash is not None and self.ivgen_hash not in HASHES:
            raise UnsupportedError(f"Hash algorithm '{self.ivgen_hash}' is not supported")
        if self.ivgen != "essiv":
            return
        size = HASHES[self.ivgen_hash] if self.ivgen_hash else 0
        if size not in AES_KEY_SIZES:
            raise UnsupportedError(f"No AES cipher with key size {size} available")

    def encode(self) -> str:
        """As the header has it: ``"cbc-essiv:sha256"``."""
        return f"{self.mode}-{self.ivgen}" + (f":{self.ivgen_hash}" if self.ivgen_hash else "")

    @classmethod
    def decode(cls, name: str, mode_text: str, master_key_size: int) -> CipherSpec:
        """Raises UnsupportedError for other ciphers, FormatError for a key that fits none."""
        mode, dash, ivgen = mode_text.partition("-")
        ivgen, _, ivgen_hash = ivgen.partition(":")
        if not dash:
            raise FormatError(f"Unexpected cipher mode string format '{mode_text}'")
        if name != "aes":
            raise UnsupportedError(f"Algorithm '{name}' is not supported, only 'aes' is")
        if mode not in MODES or ivgen not in IVGENS:
            raise UnsupportedError(f"Cipher mode '{mode_text}' is not supported")
        divisor = 2 if mode == "xts" else 1
        if master_key_size not in [size * divisor for size in AES_KEY_SIZES]:
            raise FormatError(f"A key of {master_key_size} bytes does not fit 'aes' in '{mode}'")
        spec = cls(
            key_size=master_key_size // divisor,
            mode=mode,
            ivgen=ivgen,
            ivgen_hash=ivgen_hash or None,
        )
        spec.check()
        return spec


class KeySlot(msgspec.Struct, kw_only=True):
    """One place for the master key, encrypted by a passphrase. Offsets in bytes."""

    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(SALT_SIZE)
    material_offset: int
    stripes: int = STRIPES

    def encode(self) -> bytes:
        """The slot's part of the header."""
        return _Slot(
            state=_ACTIVE if self.active else _INACTIVE,
            iterations=self.iterations,
            salt=self.salt,
            material_offset_sectors=self.material_offset // SECTOR,
            stripes=self.stripes,
        ).pack()


class LuksHeader(msgspec.Struct, kw_only=True):
    """All that the first 592 bytes say. Sizes and offsets in bytes."""

    spec: CipherSpec
    hash_name: str
    payload_offset: int
    digest: bytes = bytes(DIGEST_SIZE)
    digest_salt: bytes
    digest_iterations: int = 0
    uuid: str
    slots: list[KeySlot]

    @property
    def material_size(self) -> int:
        """Bytes of the longest split key, in whole sectors."""
        stripes = max(slot.stripes for slot in self.slots)
        return align_up(self.spec.master_key_size * stripes, SECTOR)

    @property
    def size(self) -> int:
        """Bytes from the header's start to the end of all slots."""
        return max(slot.material_offset for slot in self.slots) + self.material_size

    @staticmethod
    def slot_offset(index: int) -> int:
        """Where slot ``index``'s own record is."""
        return _Fixed.SIZE + index * _Slot.SIZE

    def encode(self) -> bytes:
        """The header's bytes."""
        fixed = _Fixed(
            magic=MAGIC,
            version=_VERSION,
            cipher_name=b"aes",
            cipher_mode=self.spec.encode().encode(),
            hash_name=self.hash_name.encode(),
            payload_offset_sectors=self.payload_offset // SECTOR,
            key_size=self.spec.master_key_size,
            digest=self.digest,
            digest_salt=self.digest_salt,
            digest_iterations=self.digest_iterations,
            uuid=self.uuid.encode(),
        )
        return fixed.pack() + b"".join(slot.encode() for slot in self.slots)


def new_header(
    spec: CipherSpec, hash_name: str, *, uuid: str, digest_salt: bytes, detached: bool
) -> LuksHeader:
    """A header without keys. The payload follows the slots; with ``detached`` it is elsewhere."""
    spec.check()
    step = align_up(spec.master_key_size * STRIPES, _SLOT_ALIGNMENT)
    places = [_SLOT_ALIGNMENT + index * step for index in range(SLOT_COUNT)]
    return LuksHeader(
        spec=spec,
        hash_name=hash_name,
        payload_offset=0 if detached else places[-1] + step,
        digest_salt=digest_salt,
        uuid=uuid,
        slots=[KeySlot(material_offset=place) for place in places],
    )


def decode_header(data: bytes | bytearray | memoryview) -> LuksHeader:
    """The header at the start of ``data``. Raises FormatError or UnsupportedError."""
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise FormatError("Volume is not in LUKS format")
    fixed = _Fixed.unpack(data)
    if fixed.version != _VERSION:
        raise UnsupportedError(f"LUKS version {fixed.version} is not supported")
    spec = CipherSpec.decode(
        _text(fixed.cipher_name, "cipher name"),
        _text(fixed.cipher_mode, "cipher mode"),
        fixed.key_size,
    )
    hash_name = _text(fixed.hash_name, "hash")
    if hash_name not in HASHES:
        raise UnsupportedError(f"Hash algorithm '{hash_name}' is not supported")
    if not fixed.digest_iterations:
        raise FormatError("The LUKS header has a master key digest of 0 iterations")
    header = LuksHeader(
        spec=spec,
        hash_name=hash_name,
        payload_offset=fixed.payload_offset_sectors * SECTOR,
        digest=fixed.digest,
        digest_salt=fixed.digest_salt,
        digest_iterations=fixed.digest_iterations,
        uuid=_text(fixed.uuid, "UUID"),
        slots=[
            _decode_slot(_Slot.unpack(data, LuksHeader.slot_offset(index)), index)
            for index in range(SLOT_COUNT)
        ],
    )
    _check_areas(header)
    return header


def _text(field: bytes, what: str) -> str:
    text, end, _ = field.partition(b"\0")
    if not end or not text.isascii():
        raise FormatError(f"LUKS header {what} is not NUL terminated text")
    return text.decode()


def _decode_slot(slot: _Slot, index: int) -> KeySlot:
    if slot.state not in (_ACTIVE, _INACTIVE):
        raise FormatError(f"Keyslot {index} state (active/disable) is corrupted: {slot.state:#x}")
    active = slot.state == _ACTIVE
    if active and not slot.iterations:
        raise FormatError(f"Keyslot {index} iteration count is zero")
    if not 1 <= slot.stripes <= _STRIPES_MAX:
        raise FormatError(f"Keyslot {index} is corrupted: it has {slot.stripes} stripes")
    return KeySlot(
        active=active,
        iterations=slot.iterations,
        salt=slot.salt,
        material_offset=slot.material_offset_sectors * SECTOR,
        stripes=slot.stripes,
    )


def _check_areas(header: LuksHeader) -> None:
    """Raise FormatError where key material would lie in the header, the payload, or other keys."""
    areas = sorted(
        (
            slot.material_offset,
            slot.material_offset + align_up(slot.stripes * header.spec.master_key_size, SECTOR),
            index,
        )
        for index, slot in enumerate(header.slots)
    )
    end, before = HEADER_SIZE, "the LUKS header"
    for start, stop, index in areas:
        if start < end:
            raise FormatError(f"Keyslot {index} at {start:#x} is overlapping with {before}")
        end, before = stop, f"keyslot {index}"
    if header.payload_offset and header.payload_offset < end:
        raise FormatError(
            f"LUKS payload at {header.payload_offset:#x} is overlapping with {before}"
        )


def split_key(key: bytes | bytearray, random: bytes, hash_name: str) -> bytes:
    """``key`` as stripes, all of which are needed to get it back; ``random`` is all but the last.

    Raises UnsupportedError if this machine does not have the hash.
    """
    size = len(key)
    state = bytearray(size)
    for at in range(0, len(random), size):
        state = _diffuse(_xor(state, random[at : at + size]), hash_name)
    return random + _xor(state, key)


def merge_key(
    material: bytes | bytearray, key_size: int, stripes: int, hash_name: str
) -> bytearray:
    """The key of ``key_size`` bytes that was split into ``material``."""
    state = bytearray(key_size)
    last = key_size * (stripes - 1)
    for at in range(0, last, key_size):
        state = _diffuse(_xor(state, material[at : at + key_size]), hash_name)
    return _xor(state, material[last : last + key_size])


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytearray:
    both = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return bytearray(both.to_bytes(len(one), "little"))


def _diffuse(data: bytearray, hash_name: str) -> bytearray:
    """Every byte of each digest-sized piece depends on all of that piece."""
    digest = _hash(hash_name)
    step = HASHES[hash_name]
    mixed = bytearray()
    for number, at in enumerate(range(0, len(data), step)):
        piece = data[at : at + step]
        mixed += digest(number.to_bytes(4, "big") + piece).digest()[: len(piece)]
    return mixed


@functools.cache
def _hash(name: str) -> functools.partial[hashlib._Hash]:
    check_hash(name)
    return functools.partial(hashlib.new, name, usedforsecurity=False)


def check_hash(name: str) -> None:
    """Raise UnsupportedError if this machine does not have hash ``name``."""
    try:
        hashlib.new(name, usedforsecurity=False)
    except ValueError:
        raise UnsupportedError(
            f"Hash algorithm '{name}' is not supported by this machine's OpenSSL"
        ) from None
