"""How an image is written from its first byte to its last, without going back: to a pipe.

1. First everything is planned: data, zeros, and (where ``measured``) what each unit is compressed
   to, in rising order. ``settle`` ends that; from then on ``length`` is known if it can be.
2. Then ``head``, all planned data in rising order by ``put``, and ``tail`` give the image's bytes.
3. ``pack`` runs in any thread and, for the same data, always gives the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from blocklayer.graph.driver import Buffer
from blocklayer.graph.options import CreateOptions

Packed = Mapping[int, bytes]
"""Compressed units, by offset."""


class ImageStream:
    """One image of one format, of ``size`` bytes for its guest; formats derive from this."""

    unit: int = 1
    """Data comes in whole units, or up to the end of the disk."""
    packs: bool = False
    """Units are compressed by ``pack``."""
    measured: bool = False
    """The lengths of all compressed units must be planned."""
    materialised: bool = False
    """Zeros cannot be told from data: they are planned and put as data."""
    skips_zeros: bool = False
    """Units that turn out to be zeros need not be put, though they were planned as data."""
    length: int | None = None
    """Bytes of the whole stream, once it is planned; None if only its end will tell."""

    def __init__(self, size: int) -> None:
        self.size = size

    def plan_data(self, start: int, end: int) -> None:
        """Data, stored as it is."""

    def plan_packed(self, start: int, length: int) -> None:
        """The unit at ``start``, of ``length`` compressed bytes."""

    def plan_zeros(self, start: int, end: int) -> None:
        """What reads as zeros."""

    def settle(self) -> None:
        """All is planned. Raises UsageError if no image of the format can hold it."""

    def wants_packed(self, start: int) -> bool:
        """Whether the unit at ``start`` is to be put compressed."""
        return self.packs

    def pack(self, data: memoryview) -> bytes | None:
        """One unit (or the disk's tail) compressed; None: it is stored as it is."""
        return None

    def head(self) -> Iterator[bytes]:
        """What comes before all data."""
        yield from ()

    def put(self, start: int, view: memoryview, packed: Packed) -> Iterable[Buffer]:
        """The data of whole units from ``start`` on, in the stream's own form.

        Raises StorageError where they are not what was planned.
        """
        return (view,)

    def tail(self) -> bytes:
        """What comes after all data."""
        return b""


def unstreamable(options: CreateOptions, streamed: frozenset[str]) -> str | None:
    """The first option in force (``name=value``) that is not one of ``streamed``."""
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if name not in streamed and value not in (None, False, "off", ""):
            return f"{name}={'on' if value is True else value}"
    return None
