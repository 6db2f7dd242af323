"""Declared records: what is packed comes back, what does not fit is refused."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.errors import FormatError
from blocklayer.record import I8, I16, I32, I64, U8, U16, U32, U64, Record


class Big(Record, byte_order=">"):
    a: U8
    b: U16
    c: Annotated[bytes, "3s"]
    d: U32
    e: U64
    f: I8
    g: I16
    h: I32
    i: I64


class Little(Record, byte_order="<", frozen=True):
    a: U16
    b: U32 = 7


def integers(bits: int, signed: bool = False) -> st.SearchStrategy[int]:
    low = -(1 << bits - 1) if signed else 0
    return st.integers(low, low + (1 << bits) - 1)


BIG = st.builds(
    Big,
    integers(8),
    integers(16),
    st.binary(min_size=3, max_size=3),
    integers(32),
    integers(64),
    *(integers(bits, signed=True) for bits in (8, 16, 32, 64)),
)


@given(BIG, st.binary(max_size=9))
def test_pack_then_unpack_gives_the_same_record(record: Big, before: bytes) -> None:
    assert Big.unpack(record.pack()) == record
    assert Big.unpack(before + record.pack() + b"after", len(before)) == record


@given(st.binary(min_size=Big.SIZE, max_size=Big.SIZE))
def test_unpack_then_pack_gives_the_same_bytes(data: bytes) -> None:
    assert Big.unpack(data).pack() == data


def test_size_and_byte_order_are_as_declared() -> None:
    assert Big.SIZE == 1 + 2 + 3 + 4 + 8 + 1 + 2 + 4 + 8
    assert Little(1).pack() == b"\1\0\7\0\0\0"
    assert Big(1, 2, b"xyz", 0, 0, 0, 0, 0, 0).pack()[:6] == b"\1\0\2xyz"


def test_short_bytes_are_filled_and_long_ones_refused() -> None:
    assert Big(0, 0, b"x", 0, 0, 0, 0, 0, 0).pack()[3:6] == b"x\0\0"
    with pytest.raises(ValueError, match=r"Big\.c: 4 bytes do not fit in 3"):
        Big(0, 0, b"wxyz", 0, 0, 0, 0, 0, 0).pack()


@pytest.mark.parametrize("value", [-1, 1 << 16])
def test_a_value_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Little(value).pack()


@pytest.mark.parametrize(("length", "offset"), [(0, 0), (5, 0), (6, 1), (6, 100), (6, -1)])
def test_missing_bytes_are_a_format_error(length: int, offset: int) -> None:
    with pytest.raises(FormatError, match="Little"):
        Little.unpack(bytes(length), offset)
