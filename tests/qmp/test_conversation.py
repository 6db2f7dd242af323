"""Whole conversations, compared with the real storage daemon's replies word by word."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qmp.conversation import Message, Peer, real_daemon, run, serving, talk, talk_in_turn


def command(name: str, **arguments: Any) -> Message:
    return {"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}


def add(id: Any, kind: Any, **data: Any) -> Message:
    data = {key.replace("_", "-"): value for key, value in data.items()}
    return command("chardev-add", id=id, backend={"type": kind, "data": data})


def unix(path: str) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path}}


BROKEN: list[bytes] = [
    b"hello\n", b"hello world ", b"}\n", b"]", b":", b",", b"[}", b"{]", b"[}]", b"[1}", b"[,]",
    b"[1,]", b"[1 2]", b'{"a":[}]}', b"{1:2}", b'{"a":1 "b":2}', b'{"execute" "query-version"}',
    b'{"execute":"query-version",}', b'{"a":}{"execute":"query-version","id":2}', b"nul ",
    b'{"a":nulx}', b'{"a":%d}', b"%d ", b'% 1 "x" abc {}', b"% \n 1 \n", b"% \x01 1 \n", b"A ",
    b'% "a,b" 1 \n', b"\x01 1 \n", b'{"a":1 \x01 1 \n', b'"abc\x01 1 \n', b"abc\x01 1 \n",
    b"abc\xff 1 \n", b"12\xff 1 \n", b"12a 1 \n", b"% \xff 1 \n", b"12\x01 1 \n", b"\x7f 1 ",
    b'{"execute":\xff{"execute":"query-version"}', b"\xff", b"\xc3\xa9 1\n", b"\xf4 1\n",
    b'"\x80" 1 \n', b'"\xed\xa0\x80" \n', b'"\xe9" 1\n', b'"\xf5\x80\x80\x80" 1\n', b"_a ",
    b'"\\udc00" \n', b'"\\ud83d\\u0041" \n', b'"\\ufffe"\n', b'"\\ud83f\\udfff"\n', b"--1 ",
    b"'a\\'b' \n", b"'a\\\"b' \n", b'"a\\qb" ', b"1_a ", b"a-b ", b"a1 ", b"1e ", b"1e+ ", b"-a ",
    b"00 ", b"-01 ", b"1.2.3 ", b"tru\x00 1 ", b"@@ 1 ", b"@ @ 1 ",
    b'{"execute":"query-version","id":01}', b'{"execute":"query-version","id":-}',
    b'{"execute":"query-version","id":+1}', b'{"execute":"query-version","id":.5}',
    b'{"execute":"query-version","id":1.}', b'{"execute":"query-version"; "id":1}',
    b'{"execute":"query-version","id":"a\nb"}', b'{"execute":"query-version","id":"\xff"}',
]  # fmt: skip

REQUESTS: list[Message] = [
    b"[]", b"1 ", b'"x"', b"null ", b"true 5 false ", b"{}", b'{"id":5}', b'{"x":1}',
    b'{"arguments":[]}', b'{"execute":1}', b'{"execute":"nope","arguments":[]}',
    b'{"execute":"query-version","id":1,"id":2}', b'{"execute":"query-version","x":1}',
    b'{"execute":"query-version","arguments":{"a":1,"a":2}}', b'{"execute":5,"x":1}',
    b'{"execute":"query-version","arguments":null}', b'{"execute":"query-version","arguments":1}',
    b'{"execute":"query-version","exec-oob":"query-version","id":1}',
    b'{"exec-oob":"query-version","id":1}', b'{"execute":"nope","id":[1,{"a":null}]}',
    b"{'execute':'nope','id':'a\"b'}", b'{"execute":"nope","id":1.5}',
    b'{"execute":"nope","id":18446744073709551615}', b'{"execute":"nope","id":-0}',
    b'{"execute":"nope","id":18446744073709551616}', b'{"execute":"nope","id":1e5}',
    b'{"execute":"nope","id":-9223372036854775809}', b'{"execute":"nope","id":0.1}',
    '{"execute":"nope","id":"\\u00e9\\ud83d\\ude00é\x7f\\b\\f\\n\\r\\t\\/"}'.encode(),
    b'{"execute":"nope","id":"\\u0000"}', b'{"execute":"nope","id":' + b"[" * 99 + b"]" * 99 + b"}",
    command("query-version", x=1), command("qmp_capabilities"), command("qmp_capabilities", x=1),
    command("qmp_capabilities", enable=["oob"]), command("qmp_capabilities", enable="oob"),
    command("qmp_capabilities", enable=[5]),
]  # fmt: skip

CHARDEVS: list[Message] = [
    command("chardev-add"), command("chardev-add", id="a"), command("chardev-add", id=5),
    command("chardev-add", id="a", backend={}), command("chardev-add", id="a", backend=5),
    command("chardev-add", id="a", backend={"type": "null"}), add("a", 5), add("a", "nope"),
    command("chardev-add", id="a", backend={"type": "null", "data": {}, "x": 1}),
    add("a", "null", x=1), add("a", "null", logappend="x"), add("a", "null", logfile=5),
    add("a", "null"), add("a", "null"), add("1", "null"),
    add("s", "socket"), add("s", "socket", addr={}), add("s", "socket", addr=5),
    add("s", "socket", addr={"type": "nope"}), add("s", "socket", addr={"type": "unix"}),
    add("s", "socket", addr={"type": "unix", "data": {}}), add("s", "socket", addr=unix("a"), x=1),
    add("s", "socket", addr={"type": "unix", "data": {"path": 5}}),
    add("s", "socket", addr={"type": "unix", "data": {"path": "x", "y": 1}}),
    add("s", "socket", addr={"type": "inet", "data": {"host": "127.0.0.1"}}),
    add("s", "socket", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": 5}}),
    add("s", "socket", addr={"type": "inet", "data": {"host": "a", "port": "1", "to": "x"}}),
    add("s", "socket", addr=unix("/nowhere/s.sock")), add("s", "socket", addr=unix("s.sock")),
    add("s4", "socket", addr=unix("/nowhere/s.sock"), server=False),
    add("s5", "socket", addr=unix("x"), server=5), add("s5", "socket", addr=unix("x"), wait=5),
    add("r", "ringbuf", size=100), add("r", "ringbuf", size="16"), add("r", "ringbuf", size=1.0),
    add("r", "ringbuf", size=16), add("f", "file"), add("f", "file", out=5),
    add("f", "file", out="out"), add("f2", "file", out="/nowhere/out"),
    command("query-chardev"),
    command("ringbuf-write", device="r", data="hello"), command("ringbuf-read", device="r", size=9),
    command("ringbuf-read", device="none", size=1), command("ringbuf-read", device="a", size=1),
    command("ringbuf-write", device="r", data="aGVsbG8gd29ybGQgdGhpcyBpcw==", format="base64"),
    command("ringbuf-read", device="r", size=100, format="base64"),
    command("ringbuf-read", device="r", size=0), command("ringbuf-read", device="r"),
    command("ringbuf-read", device="r", size=1, format="nope"),
    command("ringbuf-write", device="none", data="x"),
    command("chardev-remove"), command("chardev-remove", id="none"),
    command("chardev-remove", id="m"), command("chardev-remove", id="a"),
    command("chardev-change", id="none", backend={"type": "null", "data": {}}),
    command("chardev-change", id="m", backend={"type": "null", "data": {}}),
    command("chardev-change", id="s", backend={"type": "null", "data": {}}),
    command("query-chardev"),
]  # fmt: skip


def masked(replies: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Without what may differ: the version, where sockets are, the order of devices."""
    for reply in replies:
        value = reply.get("return")
        if isinstance(value, dict) and "package" in value:
            value["package"] = "masked"
        if isinstance(value, list) and value and "label" in value[0]:
            value.sort(key=lambda device: str(device["label"]))
            for device in value:
                device["filename"] = device["filename"].replace(str(path), "SOCKET")
                # A device that a monitor has is open there only while a client is connected.
    return replies


@pytest.mark.oracle("qemu-storage-daemon")
@pytest.mark.parametrize(
    "script", [BROKEN, REQUESTS, CHARDEVS], ids=["broken", "requests", "chardevs"]
)
def test_replies_are_qemus(
    tmp_path: Path, script: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (tmp_path / "theirs", tmp_path / "ours")
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    with real_daemon(folders[0] / "q.sock"):
        theirs = [talk(folders[0] / "q.sock", [message]) for message in script]
    monkeypatch.chdir(folders[1])

    async def ours() -> list[list[dict[str, Any]]]:
        async with serving(folders[1] / "q.sock"):
            return [
                await asyncio.to_thread(talk, folders[1] / "q.sock", [message])
                for message in script
            ]

    for message, real, own in zip(script, theirs, run(ours()), strict=True):
        expected = masked(real, folders[0] / "q.sock")
        assert masked(own, folders[1] / "q.sock") == expected, message


@pytest.mark.oracle("qemu-storage-daemon")
def test_negotiation_is_qemus(tmp_path: Path) -> None:
    script: list[Message] = [
        command("query-version"), command("nope"), command("qmp_capabilities", x=1),
        command("qmp_capabilities", enable=["oob"]), command("qmp_capabilities", enable=["oob"]),
        {"exec-oob": "query-version", "id": 1}, {"exec-oob": "nope"}, {"exec-oob": 5},
        {"exec-oob": "qmp_capabilities"}, {"execute": "nope", "exec-oob": "nope"},
        {"exec-oob": "nope", "x": 1}, {"exec-oob": "query-version", "arguments": 5},
    ]  # fmt: skip
    with real_daemon(tmp_path / "theirs"):
        theirs = talk_in_turn(tmp_path / "theirs", script)

    async def ours() -> list[dict[str, Any]]:
        async with serving(tmp_path / "ours"):
            return await asyncio.to_thread(talk_in_turn, tmp_path / "ours", script)

    assert run(ours()) == theirs


def test_greeting(tmp_path: Path) -> None:
    async def ours() -> None:
        async with serving(tmp_path / "q.sock"):
            peer = await Peer.connect(tmp_path / "q.sock")
            greeting = await peer.read()
            version = (await peer.ask(NEGOTIATE_AND_ASK[0]), await peer.ask(NEGOTIATE_AND_ASK[1]))
            assert greeting["QMP"]["version"] == version[1]["return"]
            assert greeting["QMP"]["capabilities"] == ["oob"]
            await peer.close()

    run(ours())


NEGOTIATE_AND_ASK = (command("qmp_capabilities"), command("query-version"))
