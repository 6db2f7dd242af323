"""LUKS key slots in an image: unlocking, adding, erasing, each step safe against a crash.

1. A slot is set in this order: key material, barrier, slot record, barrier. A crash leaves a slot
   that does not open anything; all others open as before.
2. A slot is erased in this order: record without its salt, barrier, key material overwritten,
   barrier. A crash leaves material that nobody can open any more: its salt is gone.
3. The header in memory is what the file was last known to hold; changes begin with reading it anew.
4. Iteration counts that the file asks for are compared with the policy before they are spent.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING, Final, Protocol

from blocklayer.codec import luks
from blocklayer.codec.luks import CipherSpec, KeySlot, LuksHeader, decode_header
from blocklayer.drivers.blocks import random_uuid
from blocklayer.drivers.crypto.cipher import SectorCipher
from blocklayer.drivers.crypto.passphrase import MIN_ITERATIONS, derive, iterations_for
from blocklayer.errors import FormatError, PolicyError, UsageError
from blocklayer.graph.waiting import offload
from blocklayer.units import SECTOR, align_up

if TYPE_CHECKING:
    from blocklayer.graph.driver import Buffer
    from blocklayer.graph.gate import Policy

_DIGEST_TIME_SHARE: Final = 8
"""The check of the master key takes this fraction of the time that a passphrase takes."""
_WIPE_PASSES: Final = 3


class Storage(Protocol):
    """Where the header and the key material are."""

    async def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``."""

    async def write(self, offset: int, *buffers: Buffer) -> None:
        """Store ``buffers``, one after the other."""

    async def flush(self) -> None:
        """All that was written before is on stable storage when this returns."""


class KeySlots:
    """The header and key slots that start at ``start`` of ``storage``."""

    def __init__(self, storage: Storage, start: int, header: LuksHeader, policy: Policy) -> None:
        self.header = header
        self._storage = storage
        self._start = start
        self._policy = policy

    @classmethod
    async def load(
        cls, storage: Storage, policy: Policy, *, start: int = 0, room: int | None = None
    ) -> KeySlots:
        """Read the header, which with its slots fits in ``room`` bytes. Raises FormatError."""
        header = decode_header(await storage.read(start, luks.HEADER_SIZE))
        if room is not None and header.size > room:
            raise FormatError(
                f"The LUKS header's key slots end at {header.size:#x}, outside its area of "
                f"{room:#x} bytes"
            )
        return cls(storage, start, header, policy)

    @classmethod
    async def format(
        cls,
        storage: Storage,
        policy: Policy,
        header: LuksHeader,
        passphrase: bytes,
        time_ms: int,
        *,
        start: int = 0,
    ) -> None:
        """Write a new header, its master key random and in slot 0; the last write makes it valid.

        The space up to ``header.size`` belongs to it.
        """
        key = bytearray(os.urandom(header.spec.master_key_size))
        most = policy.max_key_iterations
        # Every other slot takes as long as the user wants; this only tells right from wrong keys.
        iterations = await offload(
            iterations_for, header.hash_name, luks.DIGEST_SIZE, time_ms // _DIGEST_TIME_SHARE, most
        )
        header.digest_iterations = max(iterations, MIN_ITERATIONS)
        header.digest = bytes(
            await offload(
                derive, header.hash_name, key, header.digest_salt, header.digest_iterations,
                luks.DIGEST_SIZE,
            )
        )  # fmt: skip
        slots = cls(storage, start, header, policy)
        header.slots[0] = await slots._fill(0, key, passphrase, time_ms)
        await storage.flush()
        await storage.write(start, header.encode())
        await storage.flush()
        key[:] = bytes(len(key))

    async def reload(self) -> None:
        """Read the header anew."""
        header = decode_header(await self._storage.read(self._start, luks.HEADER_SIZE))
        if header.spec != self.header.spec or header.digest != self.header.digest:
            raise FormatError("The LUKS header has been replaced while it was in use")
        self.header = header

    @property
    def active(self) -> list[int]:
        """Indexes of the slots in use."""
        return [index for index, slot in enumerate(self.header.slots) if slot.active]

    async def unlock(self, passphrase: bytes) -> bytearray:
        """The master key. Raises UsageError if ``passphrase`` opens no slot."""
        for index in self.active:
            key = await self.open_slot(index, passphrase)
            if key is not None:
                return key
        raise UsageError("Invalid password, cannot unlock any keyslot")

    async def open_slot(self, index: int, passphrase: bytes) -> bytearray | None:
        """The master key from slot ``index``, None if ``passphrase`` is not that of the slot."""
        header, slot = self.header, self.header.slots[index]
        for iterations in (slot.iterations, header.digest_iterations):
            if iterations > self._policy.max_key_iterations:
                raise PolicyError(
                    f"Keyslot {index} asks for {iterations} iterations of '{header.hash_name}', "
                    f"the policy allows {self._policy.max_key_iterations}"
                )
        length = header.spec.master_key_size * slot.stripes
        material = await self._storage.read(self._start + slot.material_offset, length)
        return await offload(self._open, slot, passphrase, material)

    def _open(self, slot: KeySlot, passphrase: bytes, material: bytearray) -> bytearray | None:
        header = self.header
        size = header.spec.master_key_size
        wrapping = derive(header.hash_name, passphrase, slot.salt, slot.iterations, size)
        SectorCipher(header.spec, wrapping).decrypt(0, memoryview(material))
        key = luks.merge_key(material, size, slot.stripes, header.hash_name)
        digest = derive(
            header.hash_name, key, header.digest_salt, header.digest_iterations, luks.DIGEST_SIZE
        )
        return key if hmac.compare_digest(digest, header.digest) else None

    async def matching(self, passphrase: bytes) -> list[int]:
        """The slots that ``passphrase`` opens."""
        return [
            index for index in self.active if await self.open_slot(index, passphrase) is not None
        ]

    async def set(
        self, index: int, key: bytes | bytearray, passphrase: bytes, time_ms: int
    ) -> None:
        """Let ``passphrase`` open slot ``index``, whatever it held before."""
        slot = await self._fill(index, key, passphrase, time_ms)
        await self._storage.flush()
        await self._write_record(index, slot)

    async def erase(self, index: int) -> None:
        """Let slot ``index`` hold nothing, on disk either."""
        old = self.header.slots[index]
        slot = KeySlot(material_offset=old.material_offset, stripes=old.stripes)
        await self._write_record(index, slot)
        length = align_up(self.header.spec.master_key_size * slot.stripes, SECTOR)
        for _ in range(_WIPE_PASSES):
            await self._storage.write(self._start + slot.material_offset, os.urandom(length))
            # Each pass reaches the disk: passes that only meet in a cache are one.
            await self._storage.flush()

    async def _fill(
        self, index: int, key: bytes | bytearray, passphrase: bytes, time_ms: int
    ) -> KeySlot:
        """Write key material for slot ``index``; the answer is the record that goes with it."""
        material, slot = await offload(
            self._wrap, self.header.slots[index], key, passphrase, time_ms
        )
        await self._storage.write(self._start + slot.material_offset, material)
        return slot

    def _wrap(
        self, old: KeySlot, key: bytes | bytearray, passphrase: bytes, time_ms: int
    ) -> tuple[bytes, KeySlot]:
        header, size = self.header, len(key)
        iterations = iterations_for(
            header.hash_name, size, time_ms, self._policy.max_key_iterations
        )
        slot = KeySlot(
            active=True,
            iterations=iterations,
            salt=os.urandom(luks.SALT_SIZE),
            material_offset=old.material_offset,
            stripes=old.stripes,
        )
        wrapping = derive(header.hash_name, passphrase, slot.salt, iterations, size)
        split = luks.split_key(key, os.urandom(size * (slot.stripes - 1)), header.hash_name)
        return bytes(SectorCipher(header.spec, wrapping).encrypt(0, split)), slot

    async def _write_record(self, index: int, slot: KeySlot) -> None:
        place = self._start + LuksHeader.slot_offset(index)
        await self._storage.write(place, slot.encode())
        await self._storage.flush()
        self.header.slots[index] = slot


def make_header(spec: CipherSpec, hash_name: str, *, detached: bool = False) -> LuksHeader:
    """A header for a new volume, without keys. Raises UnsupportedError."""
    luks.check_hash(hash_name)
    text = random_uuid().hex()
    return luks.new_header(
        spec,
        hash_name,
        uuid="-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])),
        digest_salt=os.urandom(luks.SALT_SIZE),
        detached=detached,
    )
