"""Options: every way of naming them gives the same nested dict, and bad ones are named."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from blocklayer.errors import UsageError
from blocklayer.graph.options import (
    NodeOptions,
    Reference,
    Size,
    decode,
    parse_json_name,
    parse_pairs,
    unflatten,
)


class Options(NodeOptions):
    file: Reference | None = None
    cache_size: Size | None = None
    depth: Annotated[int, Meta(ge=0, le=9)] = 3
    lazy_refcounts: bool | UnsetType = UNSET


PAIRS = [
    ("a=1", {"a": "1"}),
    ("a=1,b=2", {"a": "1", "b": "2"}),
    ("filename=a,,b", {"filename": "a,b"}),
    ("filename=,,", {"filename": ","}),
    ("filename=,,,b=1", {"filename": ",", "b": "1"}),
    ("filename=a,,,,b,c=1", {"filename": "a,,b", "c": "1"}),
    ("filename=a=b", {"filename": "a=b"}),
    ("a=,b=1", {"a": "", "b": "1"}),
    ("a=1,snapshot", {"a": "1", "snapshot": "on"}),
]


@pytest.mark.parametrize(("text", "expected"), PAIRS)
def test_pairs(text: str, expected: dict[str, str]) -> None:
    assert parse_pairs(text) == expected


def test_first_part_without_a_name_is_the_implied_option() -> None:
    assert parse_pairs("qcow2,file=x", implied="driver") == {"driver": "qcow2", "file": "x"}


@given(
    st.dictionaries(
        st.text("abcdefg.-", min_size=1), st.text(st.characters(codec="utf-8")), min_size=1
    )
)
def test_pairs_survive_their_own_quoting(values: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert parse_pairs(text) == values


def test_dotted_names_nest() -> None:
    flat = {"driver": "qcow2", "file.driver": "raw", "file.file.filename": "x"}
    assert unflatten(flat) == {
        "driver": "qcow2",
        "file": {"driver": "raw", "file": {"filename": "x"}},
    }


@pytest.mark.parametrize(
    "flat",
    [
        {"file": "node", "file.driver": "raw"},
        {"file.driver": "raw", "file": "node"},
        {"file": 5, "file.driver": "raw"},
    ],
)
def test_a_name_is_a_value_or_a_node_not_both(flat: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="file"):
        unflatten(flat)


def test_unflatten_leaves_its_argument_alone() -> None:
    flat = {"file": {"driver": "raw"}, "file.filename": "x"}
    assert unflatten(flat) == {"file": {"driver": "raw", "filename": "x"}}
    assert flat == {"file": {"driver": "raw"}, "file.filename": "x"}


JSON_NAMES = [
    ('json:{"driver":"raw","file.filename":"x"}', {"driver": "raw", "file": {"filename": "x"}}),
    (
        'json:{"file":{"driver":"file","filename":"x"}}',
        {"file": {"driver": "file", "filename": "x"}},
    ),
    (
        'json:{"file":{"driver":"raw","file.filename":"x"}}',
        {"file": {"driver": "raw", "file": {"filename": "x"}}},
    ),
]


@pytest.mark.parametrize(("name", "expected"), JSON_NAMES)
def test_json_names(name: str, expected: dict[str, Any]) -> None:
    assert parse_json_name(name) == expected


@pytest.mark.parametrize(
    "name",
    ["json:", "json:{", "json:[1]", "json:5", 'json:{"a":}', "json:" + "[" * 1018,
     "json:" + '{"a":' * 200, "json:" + '{"a":' * 5000 + "1" + "}" * 5000, "json:" + "9" * 5000],
)  # fmt: skip
def test_bad_json_names_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError):
        parse_json_name(name)


DECODED = [
    ({"cache-size": "1M"}, "cache_size", 1 << 20),
    ({"cache-size": 4096}, "cache_size", 4096),
    ({"depth": "0x7"}, "depth", 7),
    ({"read-only": "on"}, "read_only", True),
    ({"read-only": False}, "read_only", False),
    ({"lazy-refcounts": "off"}, "lazy_refcounts", False),
    ({"discard": "unmap"}, "discard", "unmap"),
    ({"file": {"driver": "x"}}, "file", {"driver": "x"}),
    ({"file": None}, "file", None),
    ({"file": "on"}, "file", "on"),
]


@pytest.mark.parametrize(("values", "attribute", "expected"), DECODED)
def test_values_are_read_by_their_declared_type(
    values: dict[str, Any], attribute: str, expected: Any
) -> None:
    assert getattr(decode(Options, values), attribute) == expected


def test_members_of_cache_are_read_by_their_type() -> None:
    decoded = decode(Options, {"cache": {"direct": "on", "no-flush": "off"}})
    assert (decoded.cache.direct, decoded.cache.no_flush) == (True, False)


BAD = [
    ({"colour": "red"}, "'colour' is unexpected"),
    ({"cache": {"direkt": "on"}}, "direkt"),
    ({"read-only": "maybe"}, "'read-only' expects 'on' or 'off'"),
    ({"discard": "perhaps"}, "'discard' does not accept value 'perhaps'"),
    ({"cache-size": "many"}, "cache-size"),
    ({"cache-size": -1}, "cache-size"),
    ({"cache-size": "1" * 5000}, "cache-size"),
    ({"cache-size": "1.\N{SUPERSCRIPT TWO}k"}, "cache-size"),
    ({"depth": "ten"}, "'depth' expects a number"),
    ({"depth": 10}, "depth"),
    ({"depth": [1]}, "depth"),
    ({"file": 5}, "file"),
    ({"node-name": {}}, "node-name"),
]


@pytest.mark.parametrize(("values", "said"), BAD)
def test_bad_values_are_usage_errors_that_name_the_option(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        decode(Options, values)
