"""The LUKS header between bytes and values, and what hostile ones are told."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec import luks
from blocklayer.codec.luks import CipherSpec, decode_header, merge_key, new_header, split_key
from blocklayer.errors import FormatError, UnsupportedError

SPEC = CipherSpec(key_size=32, mode="xts", ivgen="plain64")
SLOT = 208


def header_bytes() -> bytearray:
    header = new_header(SPEC, "sha256", uuid="u", digest_salt=bytes(32), detached=False)
    header.digest_iterations = 1000
    header.slots[0].active = True
    header.slots[0].iterations = 1000
    return bytearray(header.encode())


def test_same_bytes_again() -> None:
    data = header_bytes()
    assert decode_header(data).encode() == data
    assert decode_header(data).payload_offset == 2068480


@given(
    st.sampled_from([16, 24, 32, 48, 64]),
    st.sampled_from(["sha1", "sha256", "sha512", "md5"]),
    st.integers(1, 50),
    st.integers(0, 1 << 32),
)
def test_split_keys_merge(size: int, hash_name: str, stripes: int, seed: int) -> None:
    chance = random.Random(seed)
    key = chance.randbytes(size)
    material = split_key(key, chance.randbytes(size * (stripes - 1)), hash_name)
    assert len(material) == size * stripes
    assert merge_key(material, size, stripes, hash_name) == key
    if stripes > 1:
        hurt = bytearray(material)
        hurt[chance.randrange(size * (stripes - 1))] ^= 1
        assert merge_key(hurt, size, stripes, hash_name) != key


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"LUKS\0\0", "not in LUKS format"),
        (6, b"\0\2", "version 2"),
        (8, b"serpent\0", "serpent"),
        (8, b"x" * 32, "cipher name"),
        (40, b"xts\0", "cipher mode string"),
        (40, b"lrw-benbi\0", "lrw"),
        (40, b"xts-essiv:sha1\0", "key size 20"),
        (72, b"nohash\0", "nohash"),
        (104, struct.pack(">I", 8), "overlapping"),
        (108, struct.pack(">I", 0), "0 bytes"),
        (108, struct.pack(">I", 1 << 31), "bytes does not fit"),
        (164, struct.pack(">I", 0), "0 iterations"),
        (SLOT, b"\1\2\3\4", "Keyslot 0 state"),
        (SLOT + 4, struct.pack(">I", 0), "iteration count is zero"),
        (SLOT + 40, struct.pack(">I", 1), "overlapping with the LUKS header"),
        (SLOT + 44, struct.pack(">I", 0), "0 stripes"),
        (SLOT + 44, struct.pack(">I", 0xFFFFFFFF), "stripes"),
        (SLOT + 48 + 40, struct.pack(">I", 9), "overlapping with keyslot"),
        (SLOT + 48 + 40, struct.pack(">I", 0xFFFFFFFF), "payload"),
    ],
)
def test_hostile_headers(offset: int, patch: bytes, message: str) -> None:
    data = header_bytes()
    data[offset : offset + len(patch)] = patch
    with pytest.raises((FormatError, UnsupportedError), match=message):
        decode_header(data)


@given(st.binary(max_size=700), st.integers(0, 600), st.binary(max_size=60))
def test_anything_is_decoded_or_refused(tail: bytes, offset: int, patch: bytes) -> None:
    data = header_bytes()
    data[offset : offset + len(patch)] = patch
    for one in (bytes(data), luks.MAGIC + tail):
        try:
            header = decode_header(one)
        except (FormatError, UnsupportedError):
            continue
        assert header.size <= (1 << 32) * 512 + (1 << 20)
