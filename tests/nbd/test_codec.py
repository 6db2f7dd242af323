"""The codec: both sides against each other, in pieces of any size, and against noise."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.nbd import constants, messages
from blocklayer.codec.nbd.client import ClientState, Connecting, Listing
from blocklayer.codec.nbd.constants import (
    Chunk,
    Command,
    CommandFlag,
    HandshakeFlag,
    Mode,
    Option,
    OptionReply,
    TransmissionFlag,
)
from blocklayer.codec.nbd.messages import Request
from blocklayer.codec.nbd.records import BlockSizes, Offer, OptionHeader, OptionReplyHeader
from blocklayer.codec.nbd.server import ServerHandshake, ServerState
from blocklayer.errors import BlockError, ProtocolError, StorageError

OFFER = Offer(
    "disk",
    1 << 40,
    TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH,
    "a disk",
    BlockSizes(1, 4096, 1 << 25),
    ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"),
)
OTHER = Offer("ünïcode", 512)


def server(tls: bool = False) -> ServerHandshake:
    offers = {offer.name: offer for offer in (OFFER, OTHER)}
    return ServerHandshake(offers.get, offers.values, tls=tls)


def talk(one: ServerHandshake, other: Connecting | Listing, piece: int) -> None:
    """Let the two talk to each other in pieces of at most ``piece`` bytes."""
    to_client = one.greeting()
    while to_client:
        to_server = b"".join(
            other.receive(to_client[at : at + piece]) for at in range(0, len(to_client), piece)
        )
        to_client = b"".join(
            one.receive(to_server[at : at + piece]) for at in range(0, len(to_server), piece)
        )


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("piece", [1, 7, 65536])
def test_a_client_gets_the_export_and_contexts_it_asks_for(mode: Mode, piece: int) -> None:
    one = server()
    other = Connecting("disk", mode=mode, contexts=["qemu:dirty-bitmap:b", "no:such"])
    talk(one, other, piece)
    assert (one.state, other.state) == (ServerState.CHOSEN, ClientState.DONE)
    assert (one.mode, one.chosen) == (mode, OFFER)
    assert other.result is not None
    assert (other.result.mode, other.result.offer.size) == (mode, OFFER.size)
    assert other.result.offer.description == "a disk"
    wanted = {} if mode is Mode.SIMPLE else {2: "qemu:dirty-bitmap:b"}
    assert one.contexts == other.result.contexts == wanted
    assert (TransmissionFlag.SEND_DF in other.result.offer.flags) == (mode is not Mode.SIMPLE)


@pytest.mark.parametrize("mode", Mode)
def test_a_listing_has_all_exports_with_their_contexts(mode: Mode) -> None:
    one, other = server(), Listing(mode=mode)
    talk(one, other, 65536)
    assert one.state is ServerState.CLOSED
    assert [(each.name, each.size) for each in other.result] == [
        ("disk", 1 << 40),
        ("ünïcode", 512),
    ]
    assert other.result[0].contexts == (() if mode is Mode.SIMPLE else OFFER.contexts)


def test_an_unknown_export_is_refused_in_words() -> None:
    with pytest.raises(StorageError, match=r"not available.*'nope' is not present"):
        talk(server(), Connecting("nope"), 65536)


def test_nothing_is_said_before_tls_where_tls_is_required() -> None:
    one = server(tls=True)
    with pytest.raises(StorageError, match="requires TLS"):
        talk(one, Connecting("disk"), 65536)
    one, other = server(tls=True), Connecting("disk", tls=True)
    talk(one, other, 65536)
    assert (one.state, other.state) == (ServerState.TLS, ClientState.TLS)
    one.tls_started()
    to_server = other.tls_started()
    while to_server:
        to_server = other.receive(one.receive(to_server))
    assert one.state is ServerState.CHOSEN


def test_what_was_sent_along_with_starttls_is_no_part_of_the_encrypted_talk() -> None:
    one = server(tls=True)
    one.receive(bytes([0, 0, 0, 3]))
    header = OptionHeader(constants.OPTION_MAGIC, Option.STARTTLS, 0).pack()
    injected = OptionHeader(constants.OPTION_MAGIC, Option.LIST, 0).pack()
    with pytest.raises(ProtocolError, match="between STARTTLS"):
        one.receive(header + injected)


def test_a_server_without_tls_or_go_is_used_as_it_is() -> None:
    """By the words of servers that know only EXPORT_NAME."""
    client = Connecting("disk", mode=Mode.EXTENDED)
    greeting = ServerHandshake.greeting()
    sent = client.receive(greeting)
    answered = []
    while True:
        at = 4 if not answered else 0
        header = OptionHeader.unpack(sent, at)
        answered.append(header.option)
        if header.option == Option.EXPORT_NAME:
            break
        reply = OptionReplyHeader(
            constants.OPTION_REPLY_MAGIC, header.option, OptionReply.ERR_UNSUP, 0
        )
        sent = client.receive(reply.pack())
    assert answered == [11, 8, 7, 1]
    client.receive((1 << 20).to_bytes(8, "big") + (1).to_bytes(2, "big"))
    assert client.state is ClientState.DONE
    assert client.result is not None
    assert (client.result.mode, client.result.offer.size) == (Mode.SIMPLE, 1 << 20)


def test_contexts_of_one_export_are_not_those_of_another() -> None:
    one = server()
    first = Connecting("disk", contexts=["base:allocation"])
    sent = first.receive(one.greeting())
    while True:
        sent = first.receive(one.receive(sent))
        if sent and OptionHeader.unpack(sent).option == Option.GO:
            break
    go = OptionHeader(constants.OPTION_MAGIC, Option.GO, 4 + len(OTHER.name.encode()) + 2).pack()
    name = OTHER.name.encode()
    one.receive(go + len(name).to_bytes(4, "big") + name + b"\0\0")
    assert (one.chosen, one.contexts) == (OTHER, {})


@given(st.lists(st.binary(max_size=200), max_size=20), st.booleans())
def test_no_noise_makes_a_server_do_anything_but_refuse(pieces: list[bytes], tls: bool) -> None:
    one = server(tls)
    with contextlib.suppress(ProtocolError):
        one.receive(bytes([0, 0, 0, 3]))
        for piece in pieces:
            one.receive(piece)
        for option in [*Option, 77]:
            if one.state is ServerState.OPTIONS:
                for piece in pieces[:3]:
                    header = OptionHeader(constants.OPTION_MAGIC, option, len(piece))
                    one.receive(header.pack() + piece)


options = st.lists(
    st.tuples(st.sampled_from([*Option, 4, 12, 99]), st.binary(max_size=40)), max_size=30
)


@given(options, st.booleans())
def test_options_of_any_content_get_one_final_reply_each(
    asked: list[tuple[int, bytes]], tls: bool
) -> None:
    one = server(tls)
    one.receive(bytes([0, 0, 0, 3]))
    for option, data in asked:
        if one.state is not ServerState.OPTIONS:
            break
        try:
            sent = one.receive(
                OptionHeader(constants.OPTION_MAGIC, option, len(data)).pack() + data
            )
        except ProtocolError:
            assert option == Option.EXPORT_NAME
            break
        at, finals = 0, 0
        while at < len(sent):
            reply = OptionReplyHeader.unpack(sent, at)
            assert (reply.option, reply.magic) == (option, constants.OPTION_REPLY_MAGIC)
            finals += reply.type == OptionReply.ACK or bool(reply.type >> 31)
            at += OptionReplyHeader.SIZE + reply.length
        assert finals == 1
        if tls and option not in (Option.STARTTLS, Option.ABORT):
            assert OptionReplyHeader.unpack(sent).type == OptionReply.ERR_TLS_REQD


def test_the_number_and_size_of_options_is_bounded() -> None:
    one = server()
    one.receive(bytes([0, 0, 0, 3]))
    with pytest.raises(ProtocolError, match="bytes of data"):
        one.receive(OptionHeader(constants.OPTION_MAGIC, 99, 1 << 31).pack())
    one = server()
    one.receive(bytes([0, 0, 0, 3]))
    flood = OptionHeader(constants.OPTION_MAGIC, 99, 0).pack()
    with pytest.raises(ProtocolError, match="More than"):
        one.receive(flood * (constants.MAX_OPTIONS + 1))


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_a_server_gone_mad_is_refused_not_followed(noise: bytes, at: int, value: int) -> None:
    """Valid talk with one byte changed, then noise."""
    one, other = server(), Connecting("disk", contexts=["base:allocation"])
    to_client, seen = one.greeting(), 0
    try:
        while to_client:
            if seen <= at < seen + len(to_client):
                to_client = bytearray(to_client)
                to_client[at - seen] = value
            seen += len(to_client)
            to_server = other.receive(to_client)
            to_client = one.receive(to_server)
        other.receive(noise)
    except BlockError:
        return
    assert other.state in ClientState
    if other.result is not None:
        assert other.result.offer.size <= constants.MAX_SIZE
        assert other.result.offer.block_sizes.maximum <= constants.MAX_PAYLOAD


requests = st.builds(
    Request,
    st.sampled_from(list(Command)),
    st.integers(0, 31),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, constants.MAX_PAYLOAD),
)


@given(st.sampled_from(Mode), requests)
def test_requests_come_out_as_they_went_in(mode: Mode, request: Request) -> None:
    packed = messages.pack_request(mode, request)
    assert len(packed) == messages.request_size(mode)
    seen = messages.unpack_request(mode, b"x" + packed, 1)
    if mode is Mode.EXTENDED and request.command == Command.WRITE:
        assert seen.flags & CommandFlag.PAYLOAD_LEN
        seen.flags &= ~CommandFlag.PAYLOAD_LEN
    assert seen == request


@given(st.sampled_from(Mode), st.binary(min_size=32, max_size=32))
def test_noise_is_no_request_and_no_reply(mode: Mode, noise: bytes) -> None:
    for unpack in (messages.unpack_request, messages.unpack_reply, messages.reply_size):
        with contextlib.suppress(ProtocolError):
            unpack(mode, noise, 0)


@given(st.sampled_from([*Chunk, 0x8003, 0xFFFF]), st.binary(max_size=80))
def test_payloads_of_any_content_are_bounded(kind: int, payload: bytes) -> None:
    for unpack in (messages.unpack_error, messages.unpack_extents):
        with contextlib.suppress(ProtocolError):
            unpack(kind, payload)
    for take in (messages.unpack_hole, messages.unpack_offset, messages.unpack_status_payload):
        with contextlib.suppress(ProtocolError):
            take(payload)


extents = st.lists(
    st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=9
)


@given(st.sampled_from([Mode.STRUCTURED, Mode.EXTENDED]), requests, extents)
def test_replies_come_out_as_they_went_in(
    mode: Mode, request: Request, status: list[tuple[int, int]]
) -> None:
    packed = messages.pack_extents(mode, request, 7, status, True)
    size = messages.reply_size(mode, packed, 0)
    reply = messages.unpack_reply(mode, packed, 0)
    assert (reply.cookie, reply.done, reply.payload_length) == (
        request.cookie,
        True,
        len(packed) - size,
    )
    assert messages.unpack_extents(reply.type or 0, packed[size:]) == (7, status)
    packed = messages.pack_error(mode, request, 28, "kein Platz: ü", 4096)
    reply = messages.unpack_reply(mode, packed, 0)
    assert reply.is_error
    assert messages.unpack_error(reply.type or 0, packed[size:]) == (28, "kein Platz: ü")
    packed = messages.pack_hole(mode, request, 5, 6, False)
    assert not messages.unpack_reply(mode, packed, 0).done
    assert messages.unpack_hole(packed[size:]) == (5, 6)


def test_only_errors_of_the_protocol_go_over_the_wire() -> None:
    seen = {constants.wire_errno(number) for number in range(200)}
    assert seen == constants.WIRE_ERRNOS
    assert constants.wire_errno(30) == 1  # EROFS: EPERM


def test_client_flags_that_nobody_knows_end_the_talk() -> None:
    with pytest.raises(ProtocolError, match="flags"):
        server().receive((4 | int(HandshakeFlag.FIXED_NEWSTYLE)).to_bytes(4, "big"))
