"""Arguments against their declarations: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from blocklayer.codec.addresses import InetSocket, SocketAddress, UnixSocket
from blocklayer.graph.events import UInt64
from blocklayer.qmp.errors import CommandError
from blocklayer.qmp.nodes import BlockdevOptions
from blocklayer.qmp.shapes import shape_of
from blocklayer.qmp.visiting import visit
from qmp.conversation import Message, real_daemon, talk


class Limits(msgspec.Struct, rename="kebab", kw_only=True):
    total_max: int
    read: UInt64 = 0


class Everything(msgspec.Struct, rename="kebab", kw_only=True):
    name: str
    when: Literal["now", "later"] = "now"
    port: Annotated[int, Meta(ge=0, le=0xFFFF)] = 0
    ratio: float = 0.0
    limits: Limits | UnsetType = UNSET
    several: list[Limits] | UnsetType = UNSET
    name_or_null: str | UnsetType | None = UNSET
    none_means_absent: str | None = None
    name_or_limits: str | Limits | UnsetType = UNSET
    address: SocketAddress | UnsetType = UNSET
    anything: Any = None


GOOD = [
    ({"name": "a"}, Everything(name="a")),
    ({"name": "a", "ratio": 2}, Everything(name="a", ratio=2.0)),
    ({"name": "a", "name-or-null": None}, Everything(name="a", name_or_null=None)),
    (
        {"name": "a", "limits": {"total-max": 5, "read": (1 << 64) - 1}},
        Everything(name="a", limits=Limits(total_max=5, read=(1 << 64) - 1)),
    ),
    (
        {"name": "a", "several": [{"total-max": 1}], "name-or-limits": {"total-max": 2}},
        Everything(name="a", several=[Limits(total_max=1)], name_or_limits=Limits(total_max=2)),
    ),
    (
        {"name": "a", "address": {"type": "unix", "path": "p"}, "anything": [{}]},
        Everything(name="a", address=UnixSocket(path="p"), anything=[{}]),
    ),
    (
        {"name": "a", "address": {"type": "inet", "host": "h", "port": "1", "ipv4": True}},
        Everything(name="a", address=InetSocket(host="h", port="1", ipv4=True)),
    ),
]

BAD = [
    ({}, "Parameter 'name' is missing"),
    ({"name": 5}, "Invalid parameter type for 'name', expected: string"),
    ({"name": "a", "when": "never"}, "Parameter 'when' does not accept value 'never'"),
    ({"name": "a", "when": True}, "Invalid parameter type for 'when', expected: string"),
    ({"name": "a", "port": True}, "Parameter 'port' expects uint64"),
    ({"name": "a", "port": 65536}, "Parameter 'port' expects uint16_t"),
    ({"name": "a", "ratio": "1"}, "Invalid parameter type for 'ratio', expected: number"),
    ({"name": "a", "limits": 5}, "Invalid parameter type for 'limits', expected: object"),
    ({"name": "a", "limits": {}}, "Parameter 'limits.total-max' is missing"),
    (
        {"name": "a", "limits": {"total-max": 1 << 63}},
        "Invalid parameter type for 'limits.total-max', expected: integer",
    ),
    (
        {"name": "a", "limits": {"total-max": 1, "read": -1}},
        "Parameter 'read' expects uint64",
    ),
    ({"name": "a", "several": {}}, "Invalid parameter type for 'several', expected: array"),
    ({"name": "a", "several": [5]}, "Invalid parameter type for 'several[0]', expected: object"),
    (
        {"name": "a", "several": [{"total-max": 1}, {"total-max": 1, "x": 2}]},
        "Parameter 'several[1].x' is unexpected",
    ),
    (
        {"name": "a", "name-or-null": 5},
        "Invalid parameter type for 'name-or-null', expected: strOrNull",
    ),
    (
        {"name": "a", "none-means-absent": None},
        "Invalid parameter type for 'none-means-absent', expected: string",
    ),
    ({"name": "a", "name-or-limits": {}}, "Parameter 'name-or-limits.total-max' is missing"),
    ({"name": "a", "address": {}}, "Parameter 'address.type' is missing"),
    ({"name": "a", "address": {"type": "x"}}, "Parameter 'type' does not accept value 'x'"),
    ({"name": "a", "address": {"type": "unix"}}, "Parameter 'address.path' is missing"),
    (
        {"name": "a", "address": {"type": "unix", "path": "p", "host": "h"}},
        "Parameter 'address.host' is unexpected",
    ),
    ({"name": "a", "x": 1}, "Parameter 'x' is unexpected"),
    ({"x": 1}, "Parameter 'name' is missing"),
]


@pytest.mark.parametrize(("given", "expected"), GOOD)
def test_accepted(given: dict[str, Any], expected: Everything) -> None:
    assert visit(shape_of(Everything), given, "") == expected


@pytest.mark.parametrize(("given", "text"), BAD)
def test_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(CommandError) as raised:
        visit(shape_of(Everything), given, "")
    assert str(raised.value) == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "limits", "several", "type", "path", "address", "read", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(JSON)
def test_anything_is_accepted_or_refused(value: Any) -> None:
    try:
        visit(shape_of(Everything), value, "")
    except CommandError:
        pass


def nested(depth: int) -> dict[str, Any]:
    node: dict[str, Any] = {"driver": "null-co"}
    for _ in range(depth):
        node = {"driver": "raw", "file": node}
    return node


def test_the_deepest_that_is_let_in_can_be_checked() -> None:
    from blocklayer.qmp.wire import MAX_NESTING

    deepest = nested(MAX_NESTING - 2)
    assert visit(shape_of(BlockdevOptions), deepest, "") == deepest


def add(**options: Any) -> Message:
    return {
        "execute": "blockdev-add",
        "arguments": {key.replace("_", "-"): value for key, value in options.items()},
    }


FILE = {"driver": "file"}
NODES: list[dict[str, Any]] = [
    add(), add(driver=1), add(driver="nope"), add(driver="null-co", node_name=1),
    add(driver="null-co", x=1), add(driver="null-co", size="x"), add(driver="null-co", size=1.5),
    add(driver="null-co", size=1 << 63), add(driver="null-co", read_only="on"),
    add(driver="null-co", cache=5), add(driver="null-co", cache={"direct": 5}),
    add(driver="null-co", cache={"x": 5}), add(driver="null-co", detect_zeroes="q"),
    add(driver="null-co", detect_zeroes=1), add(driver="null-co", discard="q"),
    add(driver="raw"), add(driver="raw", file=5), add(driver="raw", file=None),
    add(driver="raw", file={}), add(driver="raw", file=FILE), add(driver="raw", file={"driver": 5}),
    add(driver="raw", file={**FILE, "filename": 5}), add(driver="raw", file={"driver": "nope"}),
    add(driver="raw", file={**FILE, "filename": "x", "z": 5}), add(driver="file", filename=None),
    add(driver="file", filename="x", locking="q"), add(driver="file", filename="x", locking=1),
    add(driver="qcow2", file="x", backing=5), add(driver="qcow2", file="x", backing={}),
    add(driver="qcow2", file="x", backing={"driver": "raw", "file": {**FILE, "x": 1}}),
    add(driver="qcow2", file="x", lazy_refcounts="x"), add(driver="qcow2", file={**FILE, "x": 1}),
]  # fmt: skip


@pytest.mark.oracle("qemu-storage-daemon")
def test_options_of_nodes_are_refused_in_qemus_words(tmp_path: Path) -> None:
    with real_daemon(tmp_path / "q"):
        theirs = [talk(tmp_path / "q", [message])[0] for message in NODES]
    for message, reply in zip(NODES, theirs, strict=True):
        with pytest.raises(CommandError) as raised:
            visit(shape_of(BlockdevOptions), message["arguments"], "")
        assert reply["error"]["class"] == "GenericError"
        assert str(raised.value) == reply["error"]["desc"], message
