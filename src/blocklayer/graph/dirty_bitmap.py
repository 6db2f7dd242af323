"""Dirty bitmaps: which parts of a node have been written to since a bitmap was made or cleared.

A bitmap watches its node (``Node.watchers``). ``graph.bitmaps`` is who adds and removes them; a
format that can keep them in its images says so in ``Driver``.

1. While it records, a bitmap covers every byte that a request changed, or may have changed because
   it failed half way: it may claim too much, never too little (R5). What a node grows by counts as
   changed: something else may have been there before.
2. While a job works with a bitmap it is frozen: its bits stay, and what is written meanwhile goes
   to a successor, which then replaces it (``abdicate``) or is added to it (``reclaim``).
3. Bits of a persistent bitmap that was opened read-only are read when first asked for: call
   ``load`` before anything that looks at bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from blocklayer.errors import LockedError, UsageError
from blocklayer.graph.bits import Bits
from blocklayer.units import GIB, MIB, div_up, is_power_of_two

if TYPE_CHECKING:
    from blocklayer.graph.node import Node

MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 2 * GIB
MAX_BITS: Final = 512 * MIB * 8
"""What a qcow2 image can hold, and as much as a bitmap is let take of memory."""
MAX_NAME_SIZE: Final = 1023


class BlockDirtyInfo(msgspec.Struct, kw_only=True, rename="kebab", omit_defaults=True):
    """A bitmap as ``query-block`` shows it; ``count`` and ``granularity`` in bytes."""

    name: str | None = None
    recording: bool
    persistent: bool
    busy: bool
    granularity: int
    count: int
    inconsistent: bool | None = None


class DirtyBitmap:
    """One bitmap of ``node``; without a name it is somebody's own, and is listed nowhere."""

    __slots__ = (
        "_bits",
        "_enabled",
        "_loader",
        "_successor",
        "granularity",
        "inconsistent",
        "modified",
        "name",
        "node",
        "persistent",
        "read_only",
        "shift",
        "size",
        "users",
    )

    def __init__(
        self,
        node: Node,
        name: str | None,
        granularity: int,
        *,
        enabled: bool = True,
        persistent: bool = False,
        bits: Bits | None = None,
        loader: Callable[[], Awaitable[Bits]] | None = None,
    ) -> None:
        check_granularity(granularity)
        self.node = node
        self.name = name
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.size = node.size
        """Bytes covered: as many as the node has."""
        self.persistent = persistent
        self.inconsistent = False
        """Its bits were not saved: it can only be removed."""
        self.read_only = False
        """It belongs to an image that is open read-only."""
        self.modified = False
        """Whether anything differs from what the image has stored."""
        self.users = 0
        """Exports and others that need it to stay as it is."""
        self._enabled = enabled
        self._loader = loader
        self._successor: Bits | None = None
        if bits is None:
            bits = Bits(0 if loader else length_for(self.size, granularity))
        self._bits = bits

    async def load(self) -> None:
        """Read the bits, if that has not been done."""
        if self._loader is not None:
            self._bits = await self._loader()
            self._loader = None

    def reload_with(self, loader: Callable[[], Awaitable[Bits]]) -> None:
        """The image was opened anew: bits that were not read yet are read by ``loader``."""
        if self._loader is not None:
            self._loader = loader

    @property
    def bits(self) -> Bits:
        """The bits. To be looked at only."""
        assert self._loader is None, "load() comes first"
        return self._bits

    @property
    def enabled(self) -> bool:
        """Whether it records what is written."""
        return self._enabled

    @property
    def frozen(self) -> bool:
        """Whether a job works with it, and a successor takes what is written."""
        return self._successor is not None

    @property
    def busy(self) -> bool:
        """Whether somebody relies on it staying as it is."""
        return self.frozen or self.users > 0

    @property
    def count(self) -> int:
        """Dirty bytes, in whole granules (the last may reach past the node's end)."""
        return self.bits.count << self.shift

    def info(self) -> BlockDirtyInfo:
        """What ``query-block`` shows of it."""
        return BlockDirtyInfo(
            name=self.name,
            recording=self._enabled and not self.inconsistent,
            persistent=self.persistent,
            busy=self.busy,
            granularity=self.granularity,
            count=0 if self.inconsistent else self.count,
            inconsistent=self.inconsistent or None,
        )

    def sha256(self) -> str:
        """The hash of the bits in 64-bit words, as ``x-debug-block-dirty-bitmap-sha256`` has it."""
        data = self.bits.data
        return hashlib.sha256(bytes(data) + bytes(-len(data) % 8)).hexdigest()

    # What the node tells its watchers.

    def changed(self, offset: int, length: int) -> None:
        """A request to change the range has ended, well or not."""
        if not self._enabled or not length or self.inconsistent:
            return
        end = offset + length
        if end > self.size:
            # A file grows by being written to.
            self.resized(self.node.size)
            end = min(end, self.size)
            if offset >= end:
                return
        bits = self._bits if self._successor is None else self._successor
        first, last = offset >> self.shift, (end - 1) >> self.shift
        if first == last and bits.data[first >> 3] >> (first & 7) & 1:
            # Most writes go where others went before.
            return
        if bits.set(first, last + 1):
            self.modified = True

    def resized(self, size: int) -> None:
        """The node has ``size`` bytes now."""
        old, self.size = self.size, size
        if self.inconsistent or self._loader is not None:
            return
        length = div_up(size, self.granularity)
        for bits in (self._bits, self._successor):
            if bits is not None:
                bits.resize(length)
        self.modified = True
        if size > old:
            self.changed(old, size - old)

    # What users do. All of these check first, and change nothing if they raise.

    def check(self, *, busy: bool = False, read_only: bool = False) -> None:
        """Raise LockedError or UsageError if it is of no use now; ``busy`` and ``read_only`` say
        that being so does no harm.
        """
        name = self.name or ""
        if self.busy and not busy:
            raise LockedError(
                f"Bitmap '{name}' is currently in use by another operation and cannot be used"
            )
        if self.read_only and not read_only:
            raise UsageError(f"Bitmap '{name}' is readonly and cannot be modified")
        if self.inconsistent:
            raise UsageError(
                f"Bitmap '{name}' is inconsistent and cannot be used\n"
                "Try block-dirty-bitmap-remove to delete this bitmap from disk"
            )

    def check_resize(self, size: int) -> None:
        """Raise unless the node may have ``size`` bytes."""
        self.check()
        length_for(size, self.granularity)

    def enable(self) -> None:
        """Record what is written from now on."""
        self.check()
        self.modified |= not self._enabled
        self._enabled = True

    def disable(self) -> None:
        """Record no more."""
        self.check()
        self.modified |= self._enabled
        self._enabled = False

    def clear(self) -> Bits:
        """Nothing is dirty; the answer is what ``restore`` takes to undo this."""
        self.check()
        old, self._bits = self.bits, Bits(self.bits.length)
        self.modified = True
        return old

    def merge(self, *sources: DirtyBitmap) -> Bits:
        """Whatever is dirty in ``sources``, which are loaded, is dirty here as well.

        All or nothing; the answer is what ``restore`` takes to undo this.
        """
        self.check()
        for source in sources:
            source.check(read_only=True)
            if source.size != self.size:
                raise UsageError(
                    f"Bitmaps are of different sizes (destination size is {self.size}, source size "
                    f"is {source.size}) and can't be merged"
                )
        merged = self.bits.copy()
        for source in sources:
            if source.granularity == self.granularity:
                merged.merge(source.bits)
                continue
            for offset, length in source.runs():
                merged.set(offset >> self.shift, ((offset + length - 1) >> self.shift) + 1)
        old, self._bits = self._bits, merged
        self.modified = True
        return old

    def restore(self, bits: Bits) -> None:
        """Undo ``clear`` or ``merge``: its bits are these again. For transactions: call it drained,
        or what was written since is lost.
        """
        self._bits = bits
        self.modified = True

    def is_dirty(self, offset: int) -> bool:
        """Whether the granule of ``offset`` is dirty."""
        return self.bits.get(offset >> self.shift)

    def runs(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty parts (offset, length) of ``[offset, end)``, in order, in bytes.

        Bits that change meanwhile are seen if they lie ahead.
        """
        end = self.size if end is None else min(end, self.size)
        if offset >= end:
            return
        low, high = offset >> self.shift, div_up(end, self.granularity)
        for first, last in self.bits.runs(low, high):
            start = max(offset, first << self.shift)
            yield start, min(end, last << self.shift) - start

    def set_dirty(self, offset: int, length: int) -> None:
        """Mark the range, whoever records: for jobs."""
        if length and self.bits.set(
            offset >> self.shift, ((offset + length - 1) >> self.shift) + 1
        ):
            self.modified = True

    def reset_dirty(self, offset: int, length: int) -> None:
        """The range is clean: whole granules only, but for the node's end. For jobs."""
        end = offset + length
        last = self.bits.length if end >= self.size else end >> self.shift
        if self.bits.clear(div_up(offset, self.granularity), last):
            self.modified = True

    def freeze(self) -> None:
        """Keep the bits as they are for a job; a successor takes what is written."""
        self.check()
        self._successor = Bits(self.bits.length)

    def abdicate(self) -> None:
        """The job is done with the bits: the successor's take their place."""
        assert self._successor is not None
        self._bits, self._successor = self._successor, None
        self.modified = True

    def reclaim(self) -> None:
        """The job failed: what was written meanwhile is added to the bits."""
        assert self._successor is not None
        successor, self._successor = self._successor, None
        if self._bits.merge(successor):
            self.modified = True

    def all_bits(self) -> Bits:
        """The bits and, while a job works with them, those written meanwhile: what to store."""
        if self._successor is None:
            return self.bits
        both = self.bits.copy()
        both.merge(self._successor)
        return both


def check_granularity(granularity: int) -> None:
    """Raise UsageError unless bitmaps can have it."""
    if not is_power_of_two(granularity) or not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
        raise UsageError("Granularity must be power of 2 and at least 512")


def length_for(size: int, granularity: int) -> int:
    """Bits for ``size`` bytes. Raises UsageError if those are too many to keep."""
    length = div_up(size, granularity)
    if length > MAX_BITS:
        raise UsageError(
            f"Too much space will be occupied by the bitmap ({length >> 3} bytes, at most "
            f"{MAX_BITS >> 3}). Use larger granularity"
        )
    return length
