"""Sector ciphers: AES in XTS and CBC over runs of 512-byte sectors, each with an IV of its own.

AES itself is the cryptography package's. What is here makes few large calls to it out of thousands
of sectors: a run in XTS is one ECB call between two XORs with all tweaks; a run in CBC is decrypted
by one ECB call and encrypted by one for each of a sector's 32 blocks, over all sectors at once.

1. Every sector is encrypted as if alone, by the IV of its number: how a run is cut changes nothing.
2. Nothing is kept between calls but keys: a cipher may be used by many threads at once.
3. Keys, tweaks and data appear in no message.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any, Final

from blocklayer.codec.luks import CipherSpec
from blocklayer.errors import FormatError
from blocklayer.graph.driver import Buffer
from blocklayer.units import MIB, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK: Final = 16
_BLOCKS: Final = SECTOR // _BLOCK
_AT_ONCE: Final = MIB
"""Bytes of a run that are worked on at a time: more falls out of the processor's caches."""
_FEW: Final = 24 * SECTOR
"""Bytes up to which a call for each sector is faster than setting up vectors."""
_SECTOR_WORDS: Final = SECTOR // 8
_WORD: Final = "<u8"


class SectorCipher:
    """Encrypts and decrypts whole sectors of one volume."""

    def __init__(self, spec: CipherSpec, key: bytes | bytearray) -> None:
        from cryptography.hazmat.primitives.ciphers import algorithms

        self.spec = spec
        self._xts = spec.mode == "xts"
        # The bindings want immutable bytes.
        half = bytes(key[: spec.key_size])
        # OpenSSL has no XTS with keys of 192 bits; made of ECB calls there is.
        self._few = 0 if self._xts and spec.key_size == 24 else _FEW
        self._whole = algorithms.AES(bytes(key)) if self._few else None
        self._data = _ecb(half)
        if self._xts:
            tweak_key = bytes(key[spec.key_size :])
            if tweak_key == half:
                raise FormatError("The master key's two halves are the same: it is no XTS key")
            self._tweak = _ecb(tweak_key)
        self._essiv = None
        if spec.ivgen == "essiv":
            assert spec.ivgen_hash is not None
            salt = hashlib.new(spec.ivgen_hash, bytes(key), usedforsecurity=False).digest()
            self._essiv = _ecb(salt)

    def encrypt(self, sector: int, data: Buffer) -> bytearray:
        """``data``, whole sectors from number ``sector`` on, as they are stored."""
        view = memoryview(data).cast("B")
        stored = bytearray(len(view))
        self._run(sector, view, memoryview(stored), decrypt=False)
        return stored

    def decrypt(self, sector: int, view: memoryview) -> None:
        """Put what was stored as ``view``, from sector number ``sector`` on, in its place."""
        self._run(sector, view, view, decrypt=True)

    def _run(self, sector: int, view: memoryview, out: memoryview, *, decrypt: bool) -> None:
        if len(view) <= self._few or len(view) % SECTOR:
            for at in range(0, len(view), SECTOR):
                piece = view[at : at + SECTOR]
                out[at : at + SECTOR] = self._one(sector + at // SECTOR, piece, decrypt)
            return
        run = self._run_xts if self._xts else (self._open_cbc if decrypt else self._seal_cbc)
        for at in range(0, len(view), _AT_ONCE):
            stop = min(at + _AT_ONCE, len(view))
            run(sector + at // SECTOR, view[at:stop], out[at:stop], decrypt)

    def _one(self, sector: int, view: memoryview, decrypt: bool) -> bytes:
        """One sector (the last one of key material may be short)."""
        from cryptography.hazmat.primitives.ciphers import Cipher, modes

        iv = self._iv_bytes(sector, 1)
        mode = modes.XTS(iv) if self._xts else modes.CBC(iv)
        assert self._whole is not None
        cipher = Cipher(self._whole, mode)
        return (cipher.decryptor() if decrypt else cipher.encryptor()).update(view)

    def _iv_bytes(self, sector: int, count: int) -> bytes:
        """The IVs of ``count`` sectors, one after the other."""
        mask = 0xFFFFFFFF if self.spec.ivgen == "plain" else 0xFFFFFFFFFFFFFFFF
        numbers = b"".join(
            (number & mask).to_bytes(_BLOCK, "little") for number in range(sector, sector + count)
        )
        return self._essiv.encryptor().update(numbers) if self._essiv else numbers

    def _ivs(self, sector: int, count: int) -> NDArray[Any]:
        """The IVs of ``count`` sectors, a row of two words each."""
        import numpy

        numbers = numpy.zeros((count, 2), _WORD)
        numbers[:, 0] = numpy.arange(sector, sector + count, dtype=_WORD)
        if self.spec.ivgen == "plain":
            numbers[:, 0] &= numpy.uint64(0xFFFFFFFF)
        return _through(self._essiv.encryptor(), numbers).copy() if self._essiv else numbers

    def _run_xts(self, sector: int, view: memoryview, out: memoryview, decrypt: bool) -> None:
        import numpy

        count = len(view) // SECTOR
        tweaks = self._tweaks(sector, count)
        scratch = _space.words(_SCRATCH, count * _SECTOR_WORDS).reshape(tweaks.shape)
        numpy.bitwise_xor(_words(view).reshape(tweaks.shape), tweaks, out=scratch)
        context = self._data.decryptor() if decrypt else self._data.encryptor()
        found = _through(context, scratch)
        numpy.bitwise_xor(found, tweaks, out=_words(out).reshape(tweaks.shape))

    def _tweaks(self, sector: int, count: int) -> NDArray[Any]:
        """All tweaks of ``count`` sectors: by sector, block, and word (low, high)."""
        import numpy

        first = _through(self._tweak.encryptor(), self._ivs(sector, count))
        # Words of all sectors side by side, so that each step works on long rows.
        rows = _space.words(_ROWS, count * _SECTOR_WORDS).reshape(2, _BLOCKS, count)
        low, high = rows
        low[0], high[0] = first[:, 0], first[:, 1]
        known = 1
        while known < _BLOCKS:
            # Block n + known is block n times x to the power of known, in the field of 2^128.
            up, down = numpy.uint64(known), numpy.uint64(64 - known)
            below, above = low[:known], high[:known]
            new_low, new_high = low[known : 2 * known], high[known : 2 * known]
            numpy.right_shift(below, down, out=new_low)
            numpy.left_shift(above, up, out=new_high)
            new_high |= new_low
            numpy.left_shift(below, up, out=new_low)
            # What is carried out comes back as x^7 + x^2 + x + 1.
            carry = above >> down
            for shift in (0, 1, 1, 5):
                carry <<= numpy.uint64(shift)
                new_low ^= carry
            known *= 2
        tweaks = _space.words(_TWEAKS, count * _SECTOR_WORDS).reshape(count, _BLOCKS, 2)
        tweaks[:, :, 0], tweaks[:, :, 1] = low.T, high.T
        return tweaks

    def _open_cbc(self, sector: int, view: memoryview, out: memoryview, decrypt: bool) -> None:
        stored = _words(view).reshape(-1, _BLOCKS, 2)
        ivs = self._ivs(sector, len(stored))
        plain = _through(self._data.decryptor(), stored)
        plain[:, 0] ^= ivs
        plain[:, 1:] ^= stored[:, :-1]
        _words(out)[:] = plain.reshape(-1)

    def _seal_cbc(self, sector: int, view: memoryview, out: memoryview, decrypt: bool) -> None:
        plain = _words(view).reshape(-1, _BLOCKS, 2)
        stored = _words(out).reshape(plain.shape)
        encryptor = self._data.encryptor()
        before = self._ivs(sector, len(plain))
        for block in range(_BLOCKS):
            before = _through(encryptor, plain[:, block] ^ before)
            stored[:, block] = before


class _Space(threading.local):
    """Memory for one thread's vectors: asking the system for it anew takes as long as AES does."""

    def __init__(self) -> None:
        self._kept: dict[int, NDArray[Any]] = {}

    def words(self, use: int, count: int) -> NDArray[Any]:
        """Room for ``count`` words, until the thread next asks for the same ``use``."""
        import numpy

        if use not in self._kept:
            self._kept[use] = numpy.empty(_AT_ONCE // 8 + _BLOCK // 8, _WORD)
        return self._kept[use][:count]


_space = _Space()
_ROWS, _TWEAKS, _SCRATCH, _FOUND = range(4)


def _words(view: memoryview) -> NDArray[Any]:
    import numpy

    return numpy.frombuffer(view, _WORD)


def _ecb(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.ECB())


def _through(context: Any, words: NDArray[Any]) -> NDArray[Any]:
    """What the ECB ``context`` makes of ``words``, block by block; gone when called again."""
    import numpy

    # The bindings want room for one block more than there will be.
    found = _space.words(_FOUND, words.size + _BLOCK // 8)
    context.update_into(numpy.ascontiguousarray(words).data.cast("B"), found.data.cast("B"))
    return found[: words.size].reshape(words.shape)
