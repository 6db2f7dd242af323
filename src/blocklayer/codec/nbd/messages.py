"""Requests and replies of the transmission phase, for both sides.

Public: `Request`, `request_size`, `pack_request`, `unpack_request`, `pack_status_payload`,
`unpack_status_payload`; `Reply`, `reply_size`, `unpack_reply`; `pack_simple`, `pack_done`,
`pack_data_header`, `pack_hole`, `pack_error`, `pack_extents`; `unpack_offset`, `unpack_hole`,
`unpack_error`, `unpack_extents`, `Extents`.

1. Headers are told apart from payloads: whoever reads a socket takes a header, looks at its
   ``payload_length`` (bounded), and puts the payload where it is wanted. Nothing is copied here.
2. What is unpacked is safe to use: lengths are bounded, extents are not empty. Whether ranges lie
   within the export is for the one who knows its size.
3. ``Mode`` decides the layout; in EXTENDED mode there are no other headers than extended ones.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final, TypeAlias

import msgspec

from blocklayer.codec.nbd.constants import (
    CHUNK_DONE,
    CHUNK_ERROR,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_EXTENTS,
    MAX_PAYLOAD,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    Mode,
)
from blocklayer.codec.nbd.records import (
    ErrorPayload,
    ExtendedReplyHeader,
    ExtendedRequestHeader,
    HolePayload,
    RequestHeader,
    SimpleReplyHeader,
    StructuredReplyHeader,
)
from blocklayer.errors import ProtocolError
from blocklayer.record import U16, U32, U64, Record

Buffer: TypeAlias = bytes | bytearray | memoryview
Extents: TypeAlias = list[tuple[int, int]]
"""Lengths in bytes and flags, one after the other."""

_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_WRITE: Final = int(Command.WRITE)
_request = RequestHeader.LAYOUT
_extended_request = ExtendedRequestHeader.LAYOUT


class Request(msgspec.Struct, gc=False):
    """One request. ``length`` is the range's, or with PAYLOAD_LEN what the header says of it."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int

    @property
    def payload_length(self) -> int:
        """Bytes that follow the header."""
        return self.length if self.command == _WRITE or self.flags & _PAYLOAD_LEN else 0


def request_size(mode: Mode) -> int:
    """Bytes of a request's header."""
    return ExtendedRequestHeader.SIZE if mode is Mode.EXTENDED else RequestHeader.SIZE


def pack_request(mode: Mode, request: Request) -> bytes:
    """The request's header; its payload is to follow. PAYLOAD_LEN is set where it must be."""
    if mode is Mode.EXTENDED:
        flags = request.flags | (_PAYLOAD_LEN if request.command == _WRITE else 0)
        magic, layout = EXTENDED_REQUEST_MAGIC, _extended_request
    else:
        flags, magic, layout = request.flags, REQUEST_MAGIC, _request
    return layout.pack(
        magic, flags, request.command, request.cookie, request.offset, request.length
    )


def unpack_request(mode: Mode, buffer: Buffer, at: int) -> Request:
    """The request whose header lies at ``at``. ProtocolError: nothing after it can be read."""
    if mode is Mode.EXTENDED:
        fields = _extended_request.unpack_from(buffer, at)
        expected = EXTENDED_REQUEST_MAGIC
    else:
        fields = _request.unpack_from(buffer, at)
        expected = REQUEST_MAGIC
    magic, flags, command, cookie, offset, length = fields
    if magic != expected:
        raise ProtocolError(f"Request with magic {magic:#x}")
    if mode is not Mode.EXTENDED and flags & _PAYLOAD_LEN:
        raise ProtocolError("Request with PAYLOAD_LEN without extended headers")
    request = Request(command, flags, cookie, offset, length)
    if length > MAX_PAYLOAD and request.payload_length:
        raise ProtocolError(f"Request with {length:#x} bytes of data")
    return request


def pack_status_payload(length: int, contexts: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS that wants only these context ids."""
    return length.to_bytes(8, "big") + b"".join(each.to_bytes(4, "big") for each in contexts)


def unpack_status_payload(payload: Buffer) -> tuple[int, list[int]]:
    """The length of the range, and context ids. ProtocolError if it is not such a payload."""
    if len(payload) < 8 or len(payload) % 4:
        raise ProtocolError(f"BLOCK_STATUS with {len(payload)} bytes of data")
    ids = [int.from_bytes(payload[i : i + 4], "big") for i in range(8, len(payload), 4)]
    return int.from_bytes(payload[:8], "big"), ids


class Reply(msgspec.Struct, gc=False):
    """A simple reply or one chunk of another.

    ``type`` is None for a simple reply: whether data follows is for the one to know who asked; else
    ``payload_length`` bytes follow. ``error`` is that of a simple reply, by the wire's numbers.
    """

    cookie: int
    type: int | None
    done: bool
    payload_length: int = 0
    error: int = 0

    @property
    def is_error(self) -> bool:
        """Whether the payload is an error, of a known type or not."""
        return self.type is not None and bool(self.type & CHUNK_ERROR)


_REPLIES: Final[dict[int, type[Record]]] = {
    SIMPLE_REPLY_MAGIC: SimpleReplyHeader,
    STRUCTURED_REPLY_MAGIC: StructuredReplyHeader,
    EXTENDED_REPLY_MAGIC: ExtendedReplyHeader,
}
_ALLOWED: Final = {
    Mode.SIMPLE: (SIMPLE_REPLY_MAGIC,),
    Mode.STRUCTURED: (SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC),
    Mode.EXTENDED: (EXTENDED_REPLY_MAGIC,),
}


def reply_size(mode: Mode, buffer: Buffer, at: int) -> int:
    """Bytes of the reply header that begins at ``at``, of which 4 bytes are there."""
    magic = int.from_bytes(buffer[at : at + 4], "big")
    if magic not in _ALLOWED[mode]:
        raise ProtocolError(f"Reply with magic {magic:#x} in {mode.name.lower()} mode")
    return _REPLIES[magic].SIZE


def unpack_reply(mode: Mode, buffer: Buffer, at: int) -> Reply:
    """The reply whose header (``reply_size`` bytes) lies at ``at``. Raises ProtocolError."""
    magic = int.from_bytes(buffer[at : at + 4], "big")
    if magic not in _ALLOWED[mode]:
        raise ProtocolError(f"Reply with magic {magic:#x} in {mode.name.lower()} mode")
    fields = _REPLIES[magic].LAYOUT.unpack_from(buffer, at)
    if magic == SIMPLE_REPLY_MAGIC:
        return Reply(fields[2], None, True, 0, fields[1])
    flags, kind, cookie, length = fields[1], fields[2], fields[3], fields[-1]
    if length > MAX_PAYLOAD + 8:
        raise ProtocolError(f"Reply chunk of type {kind} with {length:#x} bytes")
    done = bool(flags & CHUNK_DONE)
    if kind == Chunk.NONE and (length or not done):
        raise ProtocolError("Reply chunk of type NONE that is not an end")
    return Reply(cookie, kind, done, length)


def _chunk(mode: Mode, request: Request, kind: int, length: int, done: bool) -> bytes:
    flags = CHUNK_DONE if done else 0
    if mode is Mode.EXTENDED:
        return ExtendedReplyHeader.LAYOUT.pack(
            EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length
        )
    return StructuredReplyHeader.LAYOUT.pack(
        STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length
    )


def pack_simple(cookie: int, error: int = 0) -> bytes:
    """A simple reply; a READ's data is to follow unless ``error`` (by the wire's numbers)."""
    return SimpleReplyHeader.LAYOUT.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def pack_done(mode: Mode, request: Request) -> bytes:
    """The reply to a request that went well and has no data to give (further)."""
    if mode is Mode.SIMPLE:
        return pack_simple(request.cookie)
    return _chunk(mode, request, Chunk.NONE, 0, True)


class _StructuredData(Record):
    magic: U32
    flags: U16
    type: U16
    cookie: U64
    length: U32
    offset: U64


class _ExtendedData(Record):
    magic: U32
    flags: U16
    type: U16
    cookie: U64
    request_offset: U64
    length: U64
    offset: U64


_structured_data = _StructuredData.LAYOUT
_extended_data = _ExtendedData.LAYOUT
_DATA: Final = int(Chunk.OFFSET_DATA)


def pack_data_header(
    mode: Mode, request: Request, offset: int, length: int, done: bool = True
) -> bytes:
    """What goes before ``length`` bytes of data read from ``offset``."""
    if mode is Mode.STRUCTURED:
        return _structured_data.pack(
            STRUCTURED_REPLY_MAGIC, done, _DATA, request.cookie, length + 8, offset
        )
    if mode is Mode.EXTENDED:
        return _extended_data.pack(
            EXTENDED_REPLY_MAGIC, done, _DATA, request.cookie, request.offset, length + 8, offset
        )
    return pack_simple(request.cookie)


def pack_hole(mode: Mode, request: Request, offset: int, length: int, done: bool) -> bytes:
    """A chunk that says: this part of a read is zeros. Not in SIMPLE mode."""
    payload = HolePayload(offset, length).pack()
    return _chunk(mode, request, Chunk.OFFSET_HOLE, len(payload), done) + payload


def pack_error(
    mode: Mode, request: Request, error: int, message: str = "", offset: int | None = None
) -> bytes:
    """The reply to a request that failed; ``error`` by the wire's numbers."""
    if mode is Mode.SIMPLE:
        return pack_simple(request.cookie, error)
    words = message.encode()[:MAX_STRING].decode(errors="ignore").encode()
    payload = ErrorPayload(error, len(words)).pack() + words
    if offset is None:
        return _chunk(mode, request, Chunk.ERROR, len(payload), True) + payload
    payload += offset.to_bytes(8, "big")
    return _chunk(mode, request, Chunk.ERROR_OFFSET, len(payload), True) + payload


def pack_extents(mode: Mode, request: Request, context: int, extents: Extents, done: bool) -> bytes:
    """A chunk with the block status of one context."""
    numbers = [number for extent in extents for number in extent]
    if mode is Mode.EXTENDED:
        head, width, kind = [context, len(extents)], 8, Chunk.BLOCK_STATUS_EXT
    else:
        head, width, kind = [context], 4, Chunk.BLOCK_STATUS
    payload = b"".join(number.to_bytes(4, "big") for number in head)
    payload += b"".join(number.to_bytes(width, "big") for number in numbers)
    return _chunk(mode, request, kind, len(payload), done) + payload


def unpack_offset(payload: Buffer) -> int:
    """The offset at the start of an OFFSET_DATA payload; data follows it."""
    if len(payload) < 8:
        raise ProtocolError(f"OFFSET_DATA with {len(payload)} bytes")
    return int.from_bytes(payload[:8], "big")


def unpack_hole(payload: Buffer) -> tuple[int, int]:
    """Offset and length of an OFFSET_HOLE."""
    if len(payload) != HolePayload.SIZE:
        raise ProtocolError(f"OFFSET_HOLE with {len(payload)} bytes")
    hole = HolePayload.unpack(payload)
    if not hole.length:
        raise ProtocolError("OFFSET_HOLE of no length")
    return hole.offset, hole.length


def unpack_error(kind: int, payload: Buffer) -> tuple[int, str]:
    """Number and message of an error chunk of type ``kind``, known or not."""
    if len(payload) < ErrorPayload.SIZE:
        raise ProtocolError(f"Error chunk with {len(payload)} bytes")
    error = ErrorPayload.unpack(payload)
    end = ErrorPayload.SIZE + error.message_length
    rest = {Chunk.ERROR: 0, Chunk.ERROR_OFFSET: 8}.get(kind, len(payload) - end)  # type: ignore[call-overload]
    if end + rest != len(payload) or rest < 0:
        raise ProtocolError("Error chunk whose message does not fit in it")
    words = bytes(payload[ErrorPayload.SIZE : min(end, ErrorPayload.SIZE + MAX_STRING)])
    message = "".join(
        each if each.isprintable() else "?" for each in words.decode(errors="replace")
    )
    return error.error or errno.EIO, message


def unpack_extents(kind: int, payload: Buffer) -> tuple[int, Extents]:
    """Context id and extents of a BLOCK_STATUS or BLOCK_STATUS_EXT."""
    head, width = (8, 8) if kind == Chunk.BLOCK_STATUS_EXT else (4, 4)
    count, odd = divmod(len(payload) - head, 2 * width)
    if count < 1 or odd or count > MAX_EXTENTS:
        raise ProtocolError(f"Block status in {len(payload)} bytes")
    if width == 8 and int.from_bytes(payload[4:8], "big") != count:
        raise ProtocolError("Block status whose count is not that of its extents")
    step = 2 * width
    extents = [
        (
            int.from_bytes(payload[at : at + width], "big"),
            int.from_bytes(payload[at + width : at + step], "big"),
        )
        for at in range(head, len(payload), step)
    ]
    if any(not length for length, _ in extents):
        raise ProtocolError("Block status with an empty extent")
    return int.from_bytes(payload[:4], "big"), extents
