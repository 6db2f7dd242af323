"""The server's side of the handshake: bytes of the client in, bytes for it out.

Public: `ServerHandshake`, `ServerState`.

1. Which answer an option gets depends on tables: `_BEFORE_TLS` (what may come before TLS where TLS
   is required) and `_HANDLERS` (everything else; what is not in it is unsupported).
2. A client that breaks the framing, or ends the handshake with an export that it cannot have, is
   not answered: ProtocolError, and the connection is to be closed. Everything else that is wrong
   gets an error as answer, and the handshake goes on.
3. What is kept of a client is bounded: one option's data (`MAX_OPTION_DATA`), `MAX_OPTIONS`
   options, and contexts that the export really has.
4. Nothing that was sent before TLS began is believed after it: `tls_started` drops it, and bytes
   that came with STARTTLS itself are a violation.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import ClassVar

from blocklayer.codec.nbd.constants import (
    GREETING_MAGIC,
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    MAX_QUERIES,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    QEMU_DIRTY_BITMAP,
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
    ExportInfo,
    ExportNameReply,
    Greeting,
    Offer,
    OptionHeader,
    OptionReplyHeader,
    decode_name,
    pack_string,
)
from blocklayer.errors import ProtocolError


class ServerState(enum.Enum):
    """Where the handshake is."""

    FLAGS = "waits for the client's flags"
    OPTIONS = "waits for options"
    TLS = "TLS is to be started"
    CHOSEN = "an export was chosen; transmission follows"
    CLOSED = "the client said goodbye"


class _RefusedError(Exception):
    """An option gets an error as answer."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


_BEFORE_TLS = (Option.STARTTLS, Option.ABORT)


class ServerHandshake:
    """One client's handshake.

    ``find`` gives the export of a name, ``offers`` all of them. Send ``greeting()``; then, for what
    arrives, send what ``receive`` answers, and look at ``state``. Once an export is ``chosen``, so
    are ``mode``, ``contexts`` (context id to name), and ``rest`` holds what came after it.
    """

    def __init__(
        self,
        find: Callable[[str], Offer | None],
        offers: Callable[[], Iterable[Offer]],
        *,
        tls: bool = False,
    ) -> None:
        self._find, self._offers = find, offers
        self._tls_required = tls
        self._encrypted = False
        self._flags = HandshakeFlag(0)
        self._options = 0
        self._selected: tuple[str, dict[int, str]] = ("", {})
        self.state = ServerState.FLAGS
        self.mode = Mode.SIMPLE
        self.chosen: Offer | None = None
        self.contexts: dict[int, str] = {}
        self.rest = bytearray()

    @staticmethod
    def greeting() -> bytes:
        """What the server says first."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return Greeting(GREETING_MAGIC, OPTION_MAGIC).pack() + flags.to_bytes(2, "big")

    def tls_started(self) -> None:
        """The connection is encrypted from here on."""
        assert self.state is ServerState.TLS
        self._encrypted = True
        self.state = ServerState.OPTIONS

    def receive(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take bytes from the client; the answer is to be sent. ProtocolError: close."""
        self.rest += data
        out = bytearray()
        while self.state is ServerState.FLAGS or self.state is ServerState.OPTIONS:
            answer = self._take_flags() if self.state is ServerState.FLAGS else self._take_option()
            if answer is None:
                break
            out += answer
        if self.state is ServerState.TLS and self.rest:
            raise ProtocolError("Data between STARTTLS and the start of TLS")
        return bytes(out)

    def _take_flags(self) -> bytes | None:
        if len(self.rest) < 4:
            return None
        number = int.from_bytes(self.rest[:4], "big")
        if number & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):
            raise ProtocolError(f"Client flags {number:#x} are not known")
        self._flags = HandshakeFlag(number)
        del self.rest[:4]
        self.state = ServerState.OPTIONS
        return b""

    def _take_option(self) -> bytes | None:
        if len(self.rest) < OptionHeader.SIZE:
            return None
        header = OptionHeader.unpack(self.rest)
        if header.magic != OPTION_MAGIC:
            raise ProtocolError(f"Option with magic {header.magic:#x}")
        if header.length > MAX_OPTION_DATA:
            raise ProtocolError(f"Option with {header.length} bytes of data")
        end = OptionHeader.SIZE + header.length
        if len(self.rest) < end:
            return None
        data = bytes(self.rest[OptionHeader.SIZE : end])
        del self.rest[:end]
        self._options += 1
        if self._options > MAX_OPTIONS:
            raise ProtocolError(f"More than {MAX_OPTIONS} options")
        return self._answer(header.option, data)

    def _answer(self, number: int, data: bytes) -> bytes:
        fixed = HandshakeFlag.FIXED_NEWSTYLE in self._flags
        unsafe = self._tls_required and not self._encrypted
        if number == Option.EXPORT_NAME:
            if unsafe:
                raise ProtocolError("EXPORT_NAME before TLS, which is required")
            return self._export_name(data)
        if not fixed:
            raise ProtocolError(f"Option {number} from a client that is not fixed newstyle")
        handler = self._HANDLERS.get(number)
        try:
            if unsafe and number not in _BEFORE_TLS:
                raise _RefusedError(
                    OptionReply.ERR_TLS_REQD, f"Option {number:#x} not permitted before TLS"
                )
            if handler is None:
                raise _RefusedError(OptionReply.ERR_UNSUP, f"Unsupported option {number:#x}")
            return handler(self, data)
        except _RefusedError as error:
            return _reply(number, error.reply, str(error).encode())
        except ProtocolError as error:
            return _reply(number, OptionReply.ERR_INVALID, str(error).encode())

    def _export_name(self, data: bytes) -> bytes:
        name = decode_name(data)
        offer = self._find(name)
        if offer is None:
            raise ProtocolError(f"Export '{name}' is not present")
        self._choose(offer)
        answer = ExportNameReply(offer.size, self._transmission_flags(offer)).pack()
        padded = HandshakeFlag.NO_ZEROES not in self._flags
        return answer + bytes(EXPORT_NAME_PADDING if padded else 0)

    def _choose(self, offer: Offer) -> None:
        name, contexts = self._selected
        # Contexts belong to the export that they were asked for.
        self.contexts = contexts if name == offer.name else {}
        self.chosen = offer
        self.state = ServerState.CHOSEN

    def _transmission_flags(self, offer: Offer) -> int:
        flags = offer.flags
        if self.mode is not Mode.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self.mode is Mode.EXTENDED:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return int(flags)

    def _abort(self, data: bytes) -> bytes:
        self.state = ServerState.CLOSED
        return _reply(Option.ABORT, OptionReply.ACK)

    def _list(self, data: bytes) -> bytes:
        _want_no_data(data)
        out = bytearray()
        for offer in self._offers():
            entry = pack_string(offer.name) + offer.description.encode()
            out += _reply(Option.LIST, OptionReply.SERVER, entry)
        return bytes(out) + _reply(Option.LIST, OptionReply.ACK)

    def _starttls(self, data: bytes) -> bytes:
        _want_no_data(data)
        if self._encrypted:
            raise _RefusedError(OptionReply.ERR_INVALID, "TLS is in use already")
        if not self._tls_required:
            raise _RefusedError(OptionReply.ERR_POLICY, "TLS not configured")
        self.state = ServerState.TLS
        return _reply(Option.STARTTLS, OptionReply.ACK)

    def _structured(self, data: bytes) -> bytes:
        _want_no_data(data)
        if self.mode is Mode.EXTENDED:
            raise _RefusedError(
                OptionReply.ERR_EXT_HEADER_REQD, "Extended headers are negotiated already"
            )
        if self.mode is Mode.STRUCTURED:
            raise _RefusedError(
                OptionReply.ERR_INVALID, "Structured replies are negotiated already"
            )
        self.mode = Mode.STRUCTURED
        return _reply(Option.STRUCTURED_REPLY, OptionReply.ACK)

    def _extended(self, data: bytes) -> bytes:
        _want_no_data(data)
        if self.mode is Mode.EXTENDED:
            raise _RefusedError(OptionReply.ERR_INVALID, "Extended headers are negotiated already")
        self.mode = Mode.EXTENDED
        return _reply(Option.EXTENDED_HEADERS, OptionReply.ACK)

    def _info(self, data: bytes) -> bytes:
        return self._describe(Option.INFO, data)[0]

    def _go(self, data: bytes) -> bytes:
        answer, offer = self._describe(Option.GO, data)
        self._choose(offer)
        return answer

    def _describe(self, option: Option, data: bytes) -> tuple[bytes, Offer]:
        name, at = _take_name(data, 0)
        count = int.from_bytes(data[at : at + 2], "big")
        if len(data) != at + 2 + 2 * count:
            raise ProtocolError("Bytes of the option do not match its counts")
        asked = {int.from_bytes(data[i : i + 2], "big") for i in range(at + 2, len(data), 2)}
        offer = self._known(name)
        sizes = offer.block_sizes
        pieces = []
        if Info.NAME in asked:
            pieces.append(Info.NAME.to_bytes(2, "big") + offer.name.encode())
        if Info.DESCRIPTION in asked and offer.description:
            pieces.append(Info.DESCRIPTION.to_bytes(2, "big") + offer.description.encode())
        pieces.append(
            BlockSizeInfo(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum).pack()
        )
        pieces.append(ExportInfo(Info.EXPORT, offer.size, self._transmission_flags(offer)).pack())
        answer = b"".join(_reply(option, OptionReply.INFO, piece) for piece in pieces)
        return answer + _reply(option, OptionReply.ACK), offer

    def _known(self, name: str) -> Offer:
        offer = self._find(name)
        if offer is None:
            raise _RefusedError(OptionReply.ERR_UNKNOWN, f"Export '{name}' is not present")
        return offer

    def _list_contexts(self, data: bytes) -> bytes:
        offer, queries = self._take_queries(data)
        if queries:
            names = [name for name in offer.contexts if any(_lists(q, name) for q in queries)]
        else:
            names = list(offer.contexts)
        return _contexts_reply(Option.LIST_META_CONTEXT, dict.fromkeys(names, 0))

    def _set_contexts(self, data: bytes) -> bytes:
        # Whatever comes of it, what was selected before is gone.
        self._selected = ("", {})
        offer, queries = self._take_queries(data)
        chosen = {index: name for index, name in enumerate(offer.contexts) if name in queries}
        self._selected = (offer.name, chosen)
        return _contexts_reply(
            Option.SET_META_CONTEXT, {name: index for index, name in chosen.items()}
        )

    def _take_queries(self, data: bytes) -> tuple[Offer, set[str]]:
        if self.mode is Mode.SIMPLE:
            raise ProtocolError("Contexts need structured replies, which were not negotiated")
        name, at = _take_name(data, 0)
        if len(data) < at + 4:
            raise ProtocolError("Bytes of the option do not match its counts")
        count = int.from_bytes(data[at : at + 4], "big")
        if count > MAX_QUERIES:
            raise _RefusedError(OptionReply.ERR_TOO_BIG, f"{count} queries")
        at += 4
        queries = set()
        for _ in range(count):
            query, at = _take_name(data, at)
            queries.add(query)
        if at != len(data):
            raise ProtocolError("Bytes of the option do not match its counts")
        return self._known(name), queries

    _HANDLERS: ClassVar[dict[int, Callable[[ServerHandshake, bytes], bytes]]] = {
        Option.ABORT: _abort,
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info,
        Option.GO: _go,
        Option.STRUCTURED_REPLY: _structured,
        Option.LIST_META_CONTEXT: _list_contexts,
        Option.SET_META_CONTEXT: _set_contexts,
        Option.EXTENDED_HEADERS: _extended,
    }


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return OptionReplyHeader(OPTION_REPLY_MAGIC, option, kind, len(data)).pack() + data


def _contexts_reply(option: Option, contexts: dict[str, int]) -> bytes:
    entries = (
        _reply(option, OptionReply.META_CONTEXT, number.to_bytes(4, "big") + name.encode())
        for name, number in contexts.items()
    )
    return b"".join(entries) + _reply(option, OptionReply.ACK)


def _lists(query: str, name: str) -> bool:
    """Whether a LIST_META_CONTEXT for ``query`` shows the context ``name``."""
    if query in ("base:", "qemu:", QEMU_DIRTY_BITMAP):
        return name.startswith(query)
    return query == name


def _want_no_data(data: bytes) -> None:
    if data:
        raise ProtocolError("The option takes no data")


def _take_name(data: bytes, at: int) -> tuple[str, int]:
    """The string behind its length at ``at``, and where it ends."""
    if len(data) < at + 4:
        raise ProtocolError("Bytes of the option do not match its counts")
    length = int.from_bytes(data[at : at + 4], "big")
    if len(data) < at + 4 + length:
        raise ProtocolError("Bytes of the option do not match its counts")
    return decode_name(data[at + 4 : at + 4 + length]), at + 4 + length
