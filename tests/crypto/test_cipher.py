"""Sector ciphers: the vectorised ones beside OpenSSL's own, sector by sector."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.luks import CipherSpec
from blocklayer.drivers.crypto.cipher import SectorCipher
from blocklayer.errors import UnsupportedError

SPECS = [
    CipherSpec(key_size=size, mode=mode, ivgen=ivgen, ivgen_hash=digest)
    for size, mode, (ivgen, digest) in itertools.product(
        (16, 24, 32),
        ("xts", "cbc"),
        (("plain", None), ("plain64", None), ("essiv", "sha256"), ("essiv", "md5")),
    )
]
SECTORS = 100
EDGE = (1 << 32) - 50
"""Here plain and plain64 begin to differ."""


def names(spec: CipherSpec) -> str:
    return f"{spec.algorithm}-{spec.encode()}"


def key_of(spec: CipherSpec) -> bytes:
    return random.Random(names(spec)).randbytes(spec.master_key_size)


def initial_vector(spec: CipherSpec, key: bytes, sector: int) -> bytes:
    number = sector & 0xFFFFFFFF if spec.ivgen == "plain" else sector
    vector = number.to_bytes(16, "little")
    if spec.ivgen != "essiv":
        return vector
    salt = hashlib.new(str(spec.ivgen_hash), key).digest()
    return Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(vector)


def by_the_book(spec: CipherSpec, key: bytes, sector: int, data: bytes) -> bytes:
    """One sector in XTS by its definition, in CBC by OpenSSL."""
    vector = initial_vector(spec, key, sector)
    if spec.mode == "cbc":
        return Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor().update(data)
    half = spec.key_size
    block = Cipher(algorithms.AES(key[:half]), modes.ECB()).encryptor().update
    tweak = int.from_bytes(
        Cipher(algorithms.AES(key[half:]), modes.ECB()).encryptor().update(vector), "little"
    )
    out = b""
    for at in range(0, len(data), 16):
        mask = tweak.to_bytes(16, "little")
        plain = bytes(a ^ b for a, b in zip(data[at : at + 16], mask, strict=True))
        out += bytes(a ^ b for a, b in zip(block(plain), mask, strict=True))
        tweak <<= 1
        if tweak >> 128:
            tweak = (tweak & ((1 << 128) - 1)) ^ 0x87
    return out


@pytest.mark.parametrize("spec", SPECS, ids=names)
def test_a_long_run_is_its_sectors(spec: CipherSpec) -> None:
    key = key_of(spec)
    cipher = SectorCipher(spec, key)
    data = random.Random(1).randbytes(SECTORS * 512)
    expected = b"".join(
        by_the_book(spec, key, EDGE + number, data[number * 512 : number * 512 + 512])
        for number in range(SECTORS)
    )
    stored = cipher.encrypt(EDGE, data)
    assert stored == expected
    cipher.decrypt(EDGE, memoryview(stored))
    assert stored == data


@given(st.sampled_from(SPECS), st.integers(0, 1 << 40), st.lists(st.integers(1, 60), max_size=6))
def test_how_a_run_is_cut_changes_nothing(spec: CipherSpec, sector: int, cuts: list[int]) -> None:
    cipher = SectorCipher(spec, key_of(spec))
    data = random.Random(2).randbytes(sum(cuts) * 512)
    parts = b""
    for count in cuts:
        at = len(parts)
        parts += cipher.encrypt(sector + at // 512, data[at : at + count * 512])
    assert parts == cipher.encrypt(sector, data)


def test_longer_than_what_is_worked_on_at_once() -> None:
    spec = CipherSpec(key_size=32, mode="xts", ivgen="plain64")
    cipher = SectorCipher(spec, key_of(spec))
    data = bytes(range(256)) * 2 * 5000
    stored = cipher.encrypt(7, data)
    assert stored[4096 * 512 : 4097 * 512] == cipher.encrypt(4103, data[:512])
    cipher.decrypt(7, memoryview(stored))
    assert stored == data


@pytest.mark.parametrize("digest", ["sha1", "sha384", "sha512", "ripemd160"])
def test_essiv_needs_a_digest_that_is_a_key(digest: str) -> None:
    with pytest.raises(UnsupportedError, match="No AES cipher with key size"):
        CipherSpec(key_size=32, mode="cbc", ivgen="essiv", ivgen_hash=digest).check()
