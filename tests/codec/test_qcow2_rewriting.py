"""From one header to another: cut off after any write, any sector of it lost, there is a header."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.codec.qcow2.header import (
    EXTENSION_BITMAPS,
    EXTENSION_FEATURE_NAMES,
    ImageHeader,
    decode_header,
    feature_name_table,
)
from blocklayer.codec.qcow2.rewriting import rewriting

NAMES = st.one_of(st.none(), st.text("abc/é", min_size=1, max_size=600))
BITMAPS = st.one_of(st.none(), st.binary(min_size=24, max_size=24))


def header(cluster_bits: int, name: str | None, features: bool, padding: int) -> ImageHeader:
    made = ImageHeader(
        cluster_bits=cluster_bits,
        size=1 << 20,
        l1_size=1,
        l1_table_offset=3 << cluster_bits,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=1,
        backing_file=name,
        extensions=[],
    )
    if name:
        made.backing_format = "raw"
    if features:
        made.set_extension(EXTENSION_FEATURE_NAMES, feature_name_table())
    if padding:
        # Something of a size that puts what follows anywhere in its sector.
        made.set_extension(EXTENSION_FEATURE_NAMES, bytes(8 * padding))
    return made


def moments(old: bytes, new: bytes) -> Iterator[bytes]:
    """What the disk may hold: after each write, and in the middle of each."""
    now = bytearray(old)
    yield bytes(now)
    for offset, data in rewriting(old, new):
        for at in range(0, len(data), 512):
            torn = bytearray(now)
            torn[offset + at : offset + at + 512] = data[at : at + 512]
            yield bytes(torn)
        now[offset : offset + len(data)] = data
        yield bytes(now)
    assert bytes(now) == new


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from((12, 16)), NAMES, st.booleans(), st.integers(0, 120), BITMAPS, BITMAPS,
    st.booleans(),
)  # fmt: skip
def test_bitmaps_come_and_go(
    bits: int,
    name: str | None,
    features: bool,
    padding: int,
    before: bytes | None,
    after: bytes | None,
    later: bool,
) -> None:
    """Nobody vouches for the bitmaps meanwhile; all else must be there at every moment."""
    old = header(bits, name, features, padding)
    if before is not None:
        old.set_extension(EXTENSION_BITMAPS, before)
    new = msgspec.structs.replace(old, extensions=list(old.extensions), size=(1 + later) << 20)
    new.set_extension(EXTENSION_BITMAPS, after)
    for moment in moments(old.encode(), new.encode()):
        found = decode_header(moment)
        assert found.backing_file == name
        assert found.backing_format == old.backing_format
        assert found.size in (old.size, new.size)
        others = [each for each in old.extensions if each.type != EXTENSION_BITMAPS]
        assert [each for each in found.extensions if each.type != EXTENSION_BITMAPS] == others


@settings(deadline=None, max_examples=300)
@given(st.sampled_from((12, 16)), NAMES, NAMES, st.booleans(), BITMAPS)
def test_the_backing_file_changes(
    bits: int, before: str | None, after: str | None, features: bool, bitmaps: bytes | None
) -> None:
    old = header(bits, before, features, 0)
    old.set_extension(EXTENSION_BITMAPS, bitmaps)
    new = msgspec.structs.replace(old, backing_file=after)
    for moment in moments(old.encode(), new.encode()):
        found = decode_header(moment)
        assert found.backing_file in (before, after)
        assert found.extensions == old.extensions
