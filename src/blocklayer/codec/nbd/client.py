"""The client's side of the handshake: bytes of the server in, bytes for it out.

Public: `Connecting` (ends with an export in use), `Listing` (ends with all that a server offers),
`ClientState`, `Negotiated`.

1. A handshake is a coroutine over bytes: it asks for so many (`_take`), and says what to send.
   Options go out one at a time, each after the final reply to the one before.
2. What the server can do is found by asking for the best and falling back: extended headers,
   structured replies, simple replies; GO, EXPORT_NAME.
3. A refusal of what was asked for is a StorageError with the server's own words; a server that
   breaks the protocol a ProtocolError. After either the connection is of no use.
4. With ``tls``, nothing but STARTTLS is sent before TLS has begun; a refusal ends the handshake.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Generator, Sequence
from typing import Final, TypeAlias

import msgspec

from blocklayer.codec.nbd.constants import (
    GREETING_MAGIC,
    MAX_EXPORTS,
    MAX_OPTION_DATA,
    MAX_PAYLOAD,
    MAX_SIZE,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    REPLY_ERROR,
    HandshakeFlag,
    Info,
    Mode,
    Option,
    OptionReply,
    TransmissionFlag,
)
from blocklayer.codec.nbd.records import (
    EXPORT_NAME_PADDING,
    BlockSizeInfo,
    BlockSizes,
    ExportInfo,
    ExportNameReply,
    Greeting,
    Offer,
    OldstyleGreeting,
    OptionHeader,
    OptionReplyHeader,
    decode_name,
    pack_string,
)
from blocklayer.errors import ProtocolError, StorageError
from blocklayer.units import is_power_of_two


class ClientState(enum.Enum):
    """Where the handshake is."""

    TALKING = "waits for the server"
    TLS = "TLS is to be started"
    DONE = "the result is there"


class Negotiated(msgspec.Struct, frozen=True):
    """What a connection can be used for; ``contexts`` gives the name of each context id."""

    offer: Offer
    mode: Mode
    contexts: dict[int, str]


_Steps: TypeAlias = Generator[int, bytes, None]
"""Asks for so many bytes each time, and gets exactly these."""

_Replies: TypeAlias = Generator[int, bytes, tuple[int, bytes, list[tuple[int, bytes]]]]
"""As ``_Steps``; returns the final reply's type and data, and the replies before it."""

_MAX_REPLIES: Final = 4096
_REFUSALS: Final = {
    OptionReply.ERR_UNSUP: (errno.ENOTSUP, "the server does not support it"),
    OptionReply.ERR_POLICY: (errno.EACCES, "denied by server policy"),
    OptionReply.ERR_INVALID: (errno.EINVAL, "the server calls it invalid"),
    OptionReply.ERR_PLATFORM: (errno.ENOTSUP, "the server's platform does not support it"),
    OptionReply.ERR_TLS_REQD: (errno.EACCES, "the server requires TLS"),
    OptionReply.ERR_UNKNOWN: (errno.ENOENT, "the export is not available"),
    OptionReply.ERR_SHUTDOWN: (errno.ESHUTDOWN, "the server is shutting down"),
    OptionReply.ERR_BLOCK_SIZE_REQD: (errno.EINVAL, "the server requires block sizes"),
    OptionReply.ERR_TOO_BIG: (errno.EINVAL, "the server calls it too big"),
    OptionReply.ERR_EXT_HEADER_REQD: (errno.EINVAL, "the server requires extended headers"),
}


def _refusal(option: Option, kind: int, data: bytes) -> StorageError:
    try:
        number, text = _REFUSALS[OptionReply(kind)]
    except ValueError:
        number, text = errno.EIO, f"the server answers with error {kind:#x}"
    words = data.decode(errors="backslashreplace")
    # A server's words go to terminals: no control characters.
    words = "".join(each if each.isprintable() else "?" for each in words[:4096])
    return StorageError(
        f"NBD option {option.name}: {text}" + (f" ({words})" if words else ""), number
    )


class ClientHandshake:
    """What all handshakes of a client share. Send what ``receive`` answers; look at ``state``.

    After state TLS, call ``tls_started`` once the connection is encrypted, and send its answer.
    Once DONE, ``rest`` holds what came after the handshake.
    """

    def __init__(self, *, mode: Mode = Mode.EXTENDED, tls: bool = False) -> None:
        self._wanted_mode = mode
        self._tls = tls
        self._out = bytearray()
        self._flags = HandshakeFlag(0)
        self.mode = Mode.SIMPLE
        self.state = ClientState.TALKING
        self.rest = bytearray()
        self._steps = self._run()
        self._needed = next(self._steps)

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the server; the answer is to be sent. Raises: close the connection."""
        self.rest += data
        while self.state is ClientState.TALKING and len(self.rest) >= self._needed:
            piece = bytes(self.rest[: self._needed])
            del self.rest[: self._needed]
            self._advance(piece)
        if self.state is ClientState.TLS and self.rest:
            raise ProtocolError("The server sent data between STARTTLS and the start of TLS")
        return self._sent()

    def tls_started(self) -> bytes:
        """The connection is encrypted from here on; the answer is to be sent."""
        assert self.state is ClientState.TLS
        self.state = ClientState.TALKING
        self._advance(b"")
        return self._sent()

    def _advance(self, piece: bytes) -> None:
        try:
            self._needed = self._steps.send(piece)
        except StopIteration:
            self.state = ClientState.DONE

    def _sent(self) -> bytes:
        out = bytes(self._out)
        self._out.clear()
        return out

    def _run(self) -> _Steps:
        greeting = Greeting.unpack((yield Greeting.SIZE))
        if greeting.magic != GREETING_MAGIC:
            raise ProtocolError("The server's greeting is not that of NBD")
        if greeting.style == OLDSTYLE_MAGIC:
            old = OldstyleGreeting.unpack((yield OldstyleGreeting.SIZE + EXPORT_NAME_PADDING))
            self._oldstyle(old)
            return
        if greeting.style != OPTION_MAGIC:
            raise ProtocolError("The server's greeting is neither oldstyle nor newstyle")
        known = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._flags = HandshakeFlag(int.from_bytes((yield 2), "big") & known)
        self._out += self._flags.to_bytes(4, "big")
        if HandshakeFlag.FIXED_NEWSTYLE in self._flags:
            if self._tls:
                yield from self._start_tls()
            yield from self._agree_on_mode()
        elif self._tls:
            raise StorageError("The server cannot do TLS", errno.ENOTSUP)
        yield from self._finish()

    def _oldstyle(self, old: OldstyleGreeting) -> None:
        raise StorageError("The server is oldstyle and has nothing to list", errno.ENOTSUP)

    def _finish(self) -> _Steps:
        raise AssertionError

    def _start_tls(self) -> _Steps:
        kind, data, _ = yield from self._option(Option.STARTTLS)
        if kind != OptionReply.ACK:
            raise _refusal(Option.STARTTLS, kind, data)
        self.state = ClientState.TLS
        yield 0

    def _agree_on_mode(self) -> _Steps:
        for mode, option in (
            (Mode.EXTENDED, Option.EXTENDED_HEADERS),
            (Mode.STRUCTURED, Option.STRUCTURED_REPLY),
        ):
            if self._wanted_mode >= mode:
                kind, data, _ = yield from self._option(option)
                if kind == OptionReply.ACK:
                    self.mode = mode
                    return
                if kind == OptionReply.ERR_TLS_REQD:
                    raise _refusal(option, kind, data)

    def _option(self, option: Option, data: bytes = b"", limit: int = _MAX_REPLIES) -> _Replies:
        """Send an option; the answer is the final reply and those before it."""
        self._out += OptionHeader(OPTION_MAGIC, option, len(data)).pack() + data
        before: list[tuple[int, bytes]] = []
        while True:
            header = OptionReplyHeader.unpack((yield OptionReplyHeader.SIZE))
            if header.magic != OPTION_REPLY_MAGIC:
                raise ProtocolError(f"Reply to an option with magic {header.magic:#x}")
            if header.option != option:
                raise ProtocolError(f"Reply to option {header.option}, which was not sent")
            if header.length > MAX_OPTION_DATA:
                raise ProtocolError(f"Reply to an option with {header.length} bytes of data")
            payload = (yield header.length) if header.length else b""
            if header.type == OptionReply.ACK or header.type & REPLY_ERROR:
                return header.type, payload, before
            if len(before) >= limit:
                raise ProtocolError(f"More than {limit} replies to one option")
            before.append((header.type, payload))

    def _select(self, option: Option, name: str, queries: Sequence[str]) -> _Contexts:
        """LIST_META_CONTEXT or SET_META_CONTEXT: names by id; none if the server has none."""
        data = pack_string(name) + len(queries).to_bytes(4, "big")
        kind, _, replies = yield from self._option(
            option, data + b"".join(map(pack_string, queries))
        )
        found: list[tuple[int, str]] = []
        for reply, payload in replies:
            if reply != OptionReply.META_CONTEXT or len(payload) < 4:
                raise ProtocolError(f"Unexpected reply {reply} to {option.name}")
            context = decode_name(payload[4:])
            if option is Option.SET_META_CONTEXT and context not in queries:
                raise ProtocolError(f"The server selects context '{context}' unasked")
            found.append((int.from_bytes(payload[:4], "big"), context))
        return found if kind == OptionReply.ACK else []

    def _describe(self, option: Option, name: str) -> _Offers:
        """INFO or GO: the export, or None where the server does not know the option."""
        infos = (Info.BLOCK_SIZE, Info.DESCRIPTION)
        data = pack_string(name) + len(infos).to_bytes(2, "big")
        data += b"".join(info.to_bytes(2, "big") for info in infos)
        kind, words, replies = yield from self._option(option, data)
        if kind == OptionReply.ERR_UNSUP:
            return None
        if kind != OptionReply.ACK:
            raise _refusal(option, kind, words)
        return _offer(name, replies)


_Contexts: TypeAlias = Generator[int, bytes, list[tuple[int, str]]]
_Offers: TypeAlias = Generator[int, bytes, Offer | None]


class Connecting(ClientHandshake):
    """Get the export ``name``, with ``contexts`` where the server has them; see ``result``."""

    def __init__(
        self,
        name: str,
        *,
        mode: Mode = Mode.EXTENDED,
        contexts: Sequence[str] = (),
        tls: bool = False,
    ) -> None:
        self._name = name
        self._contexts = contexts
        self.result: Negotiated | None = None
        super().__init__(mode=mode, tls=tls)

    def _oldstyle(self, old: OldstyleGreeting) -> None:
        if self._tls:
            raise StorageError("The server cannot do TLS", errno.ENOTSUP)
        if self._name:
            raise StorageError("The server is oldstyle and has no named exports", errno.ENOENT)
        self._settle(_checked(Offer("", old.size, TransmissionFlag(old.flags & 0xFFFF))), [])

    def _settle(self, offer: Offer, contexts: list[tuple[int, str]]) -> None:
        if len(dict(contexts)) != len(contexts):
            raise ProtocolError("The server gives two contexts one id")
        self.result = Negotiated(offer, self.mode, dict(contexts))

    def _finish(self) -> _Steps:
        contexts: list[tuple[int, str]] = []
        if HandshakeFlag.FIXED_NEWSTYLE in self._flags:
            if self._contexts and self.mode is not Mode.SIMPLE:
                contexts = yield from self._select(
                    Option.SET_META_CONTEXT, self._name, self._contexts
                )
            offer = yield from self._describe(Option.GO, self._name)
            if offer is not None:
                self._settle(offer, contexts)
                return
        data = self._name.encode()
        self._out += OptionHeader(OPTION_MAGIC, Option.EXPORT_NAME, len(data)).pack() + data
        reply = ExportNameReply.unpack((yield ExportNameReply.SIZE))
        if HandshakeFlag.NO_ZEROES not in self._flags:
            yield EXPORT_NAME_PADDING
        flags = TransmissionFlag(reply.flags)
        self._settle(_checked(Offer(self._name, reply.size, flags)), contexts)


class Listing(ClientHandshake):
    """Find all that a server offers: ``result``, an export each, with its contexts."""

    def __init__(self, *, mode: Mode = Mode.EXTENDED, tls: bool = False) -> None:
        self.result: list[Offer] = []
        super().__init__(mode=mode, tls=tls)

    def _finish(self) -> _Steps:
        if HandshakeFlag.FIXED_NEWSTYLE not in self._flags:
            raise StorageError("The server cannot list its exports", errno.ENOTSUP)
        kind, words, replies = yield from self._option(Option.LIST, limit=MAX_EXPORTS)
        if kind != OptionReply.ACK:
            raise _refusal(Option.LIST, kind, words)
        for reply, payload in replies:
            end = 4 + int.from_bytes(payload[:4], "big")
            if reply != OptionReply.SERVER or len(payload) < 4 or end > len(payload):
                raise ProtocolError(f"Unexpected reply {reply} to LIST")
            name, description = decode_name(payload[4:end]), decode_name(payload[end:])
            offer = yield from self._describe(Option.INFO, name)
            if offer is None:
                self.result.append(Offer(name, 0, TransmissionFlag(0), description))
                continue
            contexts: list[tuple[int, str]] = []
            if self.mode is not Mode.SIMPLE:
                contexts = yield from self._select(Option.LIST_META_CONTEXT, name, ())
            self.result.append(
                msgspec.structs.replace(
                    offer,
                    description=offer.description or description,
                    contexts=tuple(context for _, context in contexts),
                )
            )
        self._out += OptionHeader(OPTION_MAGIC, Option.ABORT, 0).pack()


def _offer(name: str, replies: list[tuple[int, bytes]]) -> Offer:
    """What the replies to INFO or GO say about the export ``name``."""
    size: int | None = None
    flags, description, sizes = TransmissionFlag(0), "", BlockSizes()
    for kind, data in replies:
        if kind != OptionReply.INFO or len(data) < 2:
            raise ProtocolError(f"Unexpected reply {kind} about an export")
        info = int.from_bytes(data[:2], "big")
        if info == Info.EXPORT and len(data) == ExportInfo.SIZE:
            export = ExportInfo.unpack(data)
            size, flags = export.size, TransmissionFlag(export.flags)
        elif info == Info.BLOCK_SIZE and len(data) == BlockSizeInfo.SIZE:
            block = BlockSizeInfo.unpack(data)
            sizes = BlockSizes(block.minimum, block.preferred, block.maximum)
        elif info == Info.DESCRIPTION:
            description = decode_name(data[2:])
        elif info in (Info.EXPORT, Info.BLOCK_SIZE):
            raise ProtocolError(f"Information {info} about an export in {len(data)} bytes")
    if size is None:
        raise ProtocolError("The server did not say how large the export is")
    return _checked(Offer(name, size, flags, description, sizes))


def _checked(offer: Offer) -> Offer:
    """``offer`` with everything in it safe to use. Raises ProtocolError."""
    sizes = offer.block_sizes
    if offer.size > MAX_SIZE:
        raise ProtocolError(f"Export '{offer.name}' claims {offer.size:#x} bytes")
    if TransmissionFlag.HAS_FLAGS not in offer.flags:
        offer = msgspec.structs.replace(offer, flags=TransmissionFlag(0))
    if not is_power_of_two(sizes.minimum) or sizes.minimum > 64 * 1024:
        raise ProtocolError(f"Minimum block size {sizes.minimum} of export '{offer.name}'")
    if not is_power_of_two(sizes.preferred) or sizes.preferred < sizes.minimum:
        raise ProtocolError(f"Preferred block size {sizes.preferred} of export '{offer.name}'")
    if sizes.maximum < sizes.minimum:
        raise ProtocolError(f"Maximum block size {sizes.maximum} of export '{offer.name}'")
    maximum = min(sizes.maximum, MAX_PAYLOAD) // sizes.minimum * sizes.minimum
    return msgspec.structs.replace(
        offer, block_sizes=BlockSizes(sizes.minimum, sizes.preferred, maximum)
    )
