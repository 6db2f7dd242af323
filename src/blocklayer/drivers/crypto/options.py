"""What can be told of encryption: when a volume is made, when its slots change, and what it tells.

1. The same declarations serve the ``luks`` driver and, prefixed with ``encrypt.``, ``qcow2``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec.luks import CipherSpec, LuksHeader
from blocklayer.drivers.crypto.passphrase import DEFAULT_TIME_MS
from blocklayer.errors import UsageError

CipherName = Annotated[
    Literal["aes-128", "aes-192", "aes-256"] | None,
    Meta(description="Name of encryption cipher algorithm"),
]
ModeName = Annotated[
    Literal["cbc", "xts"] | None, Meta(description="Name of encryption cipher mode")
]
IvGeneratorName = Annotated[
    Literal["plain", "plain64", "essiv"] | None, Meta(description="Name of IV generator algorithm")
]
_Hash = Literal["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160", "sm3"]
IvHashName = Annotated[_Hash | None, Meta(description="Name of IV generator hash algorithm")]
HashName = Annotated[_Hash | None, Meta(description="Name of encryption hash algorithm")]
Milliseconds = Annotated[int, Meta(ge=0)]
IterationTime = Annotated[
    Milliseconds | None, Meta(description="Time to spend in PBKDF in milliseconds")
]
KeySecret = Annotated[
    str | None, Meta(description="ID of the secret that provides the keyslot passphrase")
]

_TIME_MAX_MS: Final = 10 * 60 * 1000


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a new volume is to be encrypted; None: as QEMU does it."""

    cipher_alg: str | None = None
    cipher_mode: str | None = None
    ivgen_alg: str | None = None
    ivgen_hash_alg: str | None = None
    hash_alg: str | None = None
    iter_time: int | None = None

    @property
    def spec(self) -> CipherSpec:
        """The cipher. Raises UnsupportedError for what cannot be had together."""
        ivgen = self.ivgen_alg or "plain64"
        spec = CipherSpec(
            key_size=int((self.cipher_alg or "aes-256").removeprefix("aes-")) // 8,
            mode=self.cipher_mode or "xts",
            ivgen=ivgen,
            ivgen_hash=self.ivgen_hash_alg or ("sha256" if ivgen == "essiv" else None),
        )
        spec.check()
        return spec

    @property
    def hash_name(self) -> str:
        """The hash of passphrases and of key material."""
        return self.hash_alg or "sha256"

    @property
    def time_ms(self) -> int:
        """What trying a passphrase is to take. Raises UsageError."""
        return checked_time(self.iter_time)


def checked_time(time_ms: int | None) -> int:
    """``time_ms``, or what is usual. Raises UsageError for more than anybody would wait."""
    if time_ms is not None and time_ms > _TIME_MAX_MS:
        raise UsageError(f"iter-time of {time_ms} ms is too long: use {_TIME_MAX_MS} at most")
    return DEFAULT_TIME_MS if time_ms is None else time_ms


class SlotChange(msgspec.Struct, frozen=True, kw_only=True):
    """What ``amend`` wants done to key slots."""

    state: str
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None


State = Annotated[
    Literal["active", "inactive"] | UnsetType,
    Meta(description="Select new state of affected keyslots (active/inactive)"),
]
NewSecret = Annotated[
    str | UnsetType,
    Meta(description="New secret to set in the matching keyslots. Empty string to erase"),
]
OldSecret = Annotated[
    str | UnsetType, Meta(description="Select all keyslots that match this password")
]
Keyslot = Annotated[
    int | UnsetType, Meta(description="Select a single keyslot to modify explicitly")
]
SlotTime = Annotated[
    Milliseconds | UnsetType, Meta(description="Time to spend in PBKDF in milliseconds")
]


def slot_change(
    state: str | UnsetType,
    new_secret: str | UnsetType,
    old_secret: str | UnsetType,
    keyslot: int | UnsetType,
    iter_time: int | UnsetType,
) -> SlotChange:
    """What these options ask for. Raises UsageError."""
    if state is UNSET:
        raise UsageError("Parameter 'state' is missing")
    return SlotChange(
        state=state,
        new_secret=None if new_secret is UNSET else new_secret,
        old_secret=None if old_secret is UNSET else old_secret,
        keyslot=None if keyslot is UNSET else keyslot,
        iter_time=None if iter_time is UNSET else iter_time,
    )


class SlotInfo(msgspec.Struct, rename="kebab", omit_defaults=True, kw_only=True):
    """One key slot, as ``info`` shows it."""

    active: bool
    iters: int | None = None
    key_offset: int
    stripes: int | None = None


class LuksInfo(msgspec.Struct, rename="kebab", omit_defaults=True, kw_only=True):
    """A LUKS header, as ``info`` shows it; ``format`` only inside another format's answer."""

    ivgen_alg: str
    detached_header: bool
    hash_alg: str
    cipher_alg: str
    uuid: str
    ivgen_hash_alg: str | None = None
    format: str | None = None
    cipher_mode: str
    slots: list[SlotInfo]
    payload_offset: int
    master_key_iters: int


def luks_info(header: LuksHeader, *, detached: bool, format: str | None = None) -> LuksInfo:
    """What ``header`` says, without any key."""
    spec = header.spec
    return LuksInfo(
        ivgen_alg=spec.ivgen,
        detached_header=detached,
        hash_alg=header.hash_name,
        cipher_alg=spec.algorithm,
        uuid=header.uuid,
        ivgen_hash_alg=spec.ivgen_hash if spec.ivgen == "essiv" else None,
        format=format,
        cipher_mode=spec.mode,
        slots=[
            SlotInfo(
                active=slot.active,
                iters=slot.iterations if slot.active else None,
                key_offset=slot.material_offset,
                stripes=slot.stripes if slot.active else None,
            )
            for slot in header.slots
        ],
        payload_offset=header.payload_offset,
        master_key_iters=header.digest_iterations,
    )
