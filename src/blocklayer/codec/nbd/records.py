"""The fixed structures of the NBD protocol, and the strings between them.

Public: the records, `Offer`, `BlockSizes`, `pack_string`, `decode_name`.
"""

from typing import Final

import msgspec

from blocklayer.codec.nbd.constants import MAX_PAYLOAD, MAX_STRING, TransmissionFlag
from blocklayer.errors import ProtocolError
from blocklayer.record import U16, U32, U64, Record


class Greeting(Record):
    """The first words of a server."""

    magic: U64
    style: U64


class OptionHeader(Record):
    """A client's option; ``length`` bytes follow."""

    magic: U64
    option: U32
    length: U32


class OptionReplyHeader(Record):
    """A server's answer to an option; ``length`` bytes follow."""

    magic: U64
    option: U32
    type: U32
    length: U32


class ExportNameReply(Record):
    """The answer to EXPORT_NAME; 124 zero bytes follow unless NO_ZEROES was agreed on."""

    size: U64
    flags: U16


EXPORT_NAME_PADDING: Final = 124


class OldstyleGreeting(Record):
    """What follows the two magic numbers of an oldstyle server, then 124 zero bytes."""

    size: U64
    flags: U32


class ExportInfo(Record):
    """INFO_EXPORT, behind its type."""

    type: U16
    size: U64
    flags: U16


class BlockSizeInfo(Record):
    """INFO_BLOCK_SIZE, behind its type."""

    type: U16
    minimum: U32
    preferred: U32
    maximum: U32


class RequestHeader(Record):
    """A request of the transmission phase."""

    magic: U32
    flags: U16
    command: U16
    cookie: U64
    offset: U64
    length: U32


class ExtendedRequestHeader(Record):
    """A request after EXTENDED_HEADERS."""

    magic: U32
    flags: U16
    command: U16
    cookie: U64
    offset: U64
    length: U64


class SimpleReplyHeader(Record):
    """A simple reply; a READ's data follows unless ``error``."""

    magic: U32
    error: U32
    cookie: U64


class StructuredReplyHeader(Record):
    """One chunk of a structured reply; ``length`` bytes follow."""

    magic: U32
    flags: U16
    type: U16
    cookie: U64
    length: U32


class ExtendedReplyHeader(Record):
    """One chunk of a reply after EXTENDED_HEADERS; ``offset`` is the request's."""

    magic: U32
    flags: U16
    type: U16
    cookie: U64
    offset: U64
    length: U64


class HolePayload(Record):
    """OFFSET_HOLE: this part of a read is zeros."""

    offset: U64
    length: U32


class ErrorPayload(Record):
    """ERROR and ERROR_OFFSET; the message follows, then for the latter 8 bytes of offset."""

    error: U32
    message_length: U16


class BlockSizes(msgspec.Struct, frozen=True):
    """What requests an export takes, in bytes: multiples of ``minimum``, up to ``maximum``."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD


class Offer(msgspec.Struct, frozen=True):
    """An export as a server describes it. ``size`` in bytes; ``contexts`` are those it offers."""

    name: str
    size: int
    flags: TransmissionFlag = TransmissionFlag.HAS_FLAGS
    description: str = ""
    block_sizes: BlockSizes = BlockSizes()
    contexts: tuple[str, ...] = ()


def pack_string(text: str) -> bytes:
    """``text`` behind its length of 32 bits."""
    data = text.encode()
    return len(data).to_bytes(4, "big") + data


def decode_name(data: bytes | bytearray | memoryview) -> str:
    """A string of the peer's. ProtocolError if it is too long or not a string."""
    if len(data) > MAX_STRING:
        raise ProtocolError(f"A string of {len(data)} bytes; {MAX_STRING} are allowed")
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("A string that is not UTF-8") from error
    if "\0" in text:
        raise ProtocolError("A string with a NUL character")
    return text
