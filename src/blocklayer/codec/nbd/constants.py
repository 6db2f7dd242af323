"""The numbers of the NBD protocol, its limits, and the errors that may cross the wire.

Public: the enumerations, `Mode`, the `MAX_…` limits, `wire_errno`.

1. Names are the protocol's own, without their prefix.
2. Every length that a peer announces is compared with a limit of this file before it is used.
"""

import enum
import errno
from typing import Final

GREETING_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809

MAX_STRING: Final = 4096
"""Bytes of a name, a description or a message."""
MAX_OPTION_DATA: Final = 1024 * 1024
"""Bytes of one option's data, or of one reply to it."""
MAX_OPTIONS: Final = 16384
"""Options that one client may send before it chooses an export."""
MAX_QUERIES: Final = 4096
"""Queries in one LIST_META_CONTEXT or SET_META_CONTEXT."""
MAX_EXPORTS: Final = 65536
"""Exports that a client accepts in the answer to one LIST."""
MAX_PAYLOAD: Final = 32 * 1024 * 1024
"""Bytes of data in one request or one reply."""
MAX_EXTENTS: Final = 128 * 1024
"""Extents in the block status of one reply."""
MAX_SIZE: Final = 2**63 - 1
"""Bytes of an export: offsets are signed where they are used."""


class Mode(enum.IntEnum):
    """Which kind of replies was negotiated; each includes what the ones before it can."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


class HandshakeFlag(enum.IntFlag):
    """Sent by the server in its greeting, and by the client in answer to it."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(enum.IntEnum):
    """What a client may send during the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """How a server answers an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


REPLY_ERROR: Final = 0x80000000
"""The bit that makes a reply to an option an error, known or not."""


class Info(enum.IntEnum):
    """Pieces of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Modifiers of a request."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


class Chunk(enum.IntEnum):
    """What a piece of a structured or extended reply carries."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR: Final = 0x8000
"""The bit that makes a chunk an error, known or not."""
CHUNK_DONE: Final = 1
"""The flag of a reply's last chunk."""


class Allocation(enum.IntFlag):
    """Flags of an extent in the context ``base:allocation``."""

    HOLE = 1
    ZERO = 2


BASE_ALLOCATION: Final = "base:allocation"
QEMU_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
QEMU_DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Followed by the bitmap's name; flag 1 of an extent means dirty."""
DIRTY: Final = 1

ESHUTDOWN: Final = 108

WIRE_ERRNOS: Final = frozenset(
    (
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        75,  # EOVERFLOW
        95,  # ENOTSUP
        ESHUTDOWN,
    )
)
"""The errors that the protocol knows, by the numbers that it gives them (those of Linux)."""

_NEAREST: Final = {
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EOPNOTSUPP: 95,
    errno.ENOTSUP: 95,
    errno.EOVERFLOW: 75,
}


def wire_errno(number: int) -> int:
    """The error of the protocol that is nearest to a host's ``number``; EIO when none is near."""
    number = _NEAREST.get(number, number)
    return number if number in WIRE_ERRNOS else errno.EIO
