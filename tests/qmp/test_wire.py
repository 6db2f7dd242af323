"""The decoder of the wire: any bytes, in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.qmp import wire
from blocklayer.qmp.wire import BadInput, Decoder, encode

JSON_LIKE = st.text(alphabet="{}[]:,\"'\\ \n01-.eEtruefalsn%\x01u12d8", max_size=60).map(str.encode)
RAW = st.one_of(JSON_LIKE, st.binary(max_size=60), st.lists(JSON_LIKE).map(b"\xff".join))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=("Cs", "Cn"))),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(max_codepoint=0xFFF)), inner)
    ),
    max_leaves=20,
)


def decode(*pieces: bytes) -> list[Any]:
    decoder = Decoder()
    found = [value for piece in pieces for value in decoder.feed(piece)]
    return [f"bad: {value}" if isinstance(value, BadInput) else value for value in found]


@given(RAW, st.data())
def test_pieces_do_not_matter(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert decode(*pieces) == decode(raw)
    assert decode(*(raw[n : n + 1] for n in range(len(raw)))) == decode(raw)


@given(RAW)
def test_a_stray_byte_starts_afresh(raw: bytes) -> None:
    assert decode(raw, b'\xff\n{"execute": "x"}')[-1] == {"execute": "x"}


@given(VALUES)
def test_what_was_encoded_is_decoded(value: Any) -> None:
    assert decode(encode(value)) == [value]
    assert decode(encode(value, pretty=True)) == [value]
    assert decode(json.dumps(value, ensure_ascii=False).encode() + b"\n") == [value]


@given(VALUES, VALUES)
def test_values_need_nothing_between_them(first: Any, second: Any) -> None:
    raw = json.dumps([first]).encode() + json.dumps({"a": second}).encode()
    assert decode(raw) == [[first], {"a": second}]


def test_nesting_is_bounded() -> None:
    deepest = b"[" * wire.MAX_NESTING + b"]" * wire.MAX_NESTING
    assert len(decode(deepest)) == 1
    assert decode(deepest) != ["bad: JSON nesting depth limit exceeded"]
    assert decode(b"[" + deepest)[0] == "bad: JSON nesting depth limit exceeded"


def test_numbers_and_words_are_bounded() -> None:
    for endless in (b"9" * 5000, b"a" * 5000, b"-", b"1e" + b"1" * 5000):
        found = decode(endless, b" \xff\n", b'{"a": 1}')
        assert found[-1] == {"a": 1}
        assert all(str(value).startswith("bad: JSON") for value in found[:-1])


@pytest.mark.parametrize("endless", [b'"' + b"x" * 999, b"[" + b"1," * 500, b'["' + b"y" * 999])
def test_values_are_bounded(endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_VALUE_SIZE", 4096)
    decoder = Decoder()
    opening, filling = endless[:2], endless[2:]
    found = list(decoder.feed(opening))
    while not found:
        found = list(decoder.feed(filling))
    assert str(found[0]) == "JSON token size limit exceeded"
    assert len(decoder._buffer) < 4096
    assert list(decoder.feed(b'"\xff\n{}'))[-1] == {}


def test_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_TOKENS", 100)
    assert decode(b"[" + b"1," * 60)[0] == "bad: JSON token count limit exceeded"


def test_a_long_string_is_scanned_once() -> None:
    """Quadratic work would not end in any reasonable time."""
    decoder = Decoder()
    assert list(decoder.feed(b'"')) == []
    for _ in range(20_000):
        assert list(decoder.feed(b"\\n")) == []
    assert list(decoder.feed(b'"')) == ["\n" * 20_000]


def test_what_is_no_number_is_not_sent() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        encode(float("inf"))
    assert decode(b"1e400 ") == ["bad: JSON parse error, number out of range"]
