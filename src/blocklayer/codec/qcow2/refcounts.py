"""Refcount blocks: one cluster of packed counters, between bytes and an array.

Public:
    decode_block(data, refcount_order) -> array      one native item per entry
    encode_block(counts, refcount_order) -> bytes    the inverse
    zero_block(entries, refcount_order) -> array     all free
    TYPECODES                                        array typecode by refcount_order

1. An item is as wide as the entry, or a byte where the entry is narrower; narrow entries start
   at the least significant bit of their byte, wide ones are big endian.
2. `encode_block` raises OverflowError for a count that the width cannot hold; nothing is cut.
3. No loop of Python code runs per entry.
"""

from __future__ import annotations

import sys
from array import array
from typing import Final

TYPECODES: Final = ("B", "B", "B", "B", "H", "I", "Q")
_BYTE_ORDER: Final = 3


def _plane_tables(refcount_order: int) -> tuple[bytes, ...]:
    """For each entry of a packed byte, the table that maps the byte to that entry's count."""
    bits = 1 << refcount_order
    mask = (1 << bits) - 1
    return tuple(
        bytes((byte >> shift) & mask for byte in range(256)) for shift in range(0, 8, bits)
    )


_PLANES: Final = tuple(_plane_tables(order) for order in range(_BYTE_ORDER))


def decode_block(data: bytes | bytearray | memoryview, refcount_order: int) -> array[int]:
    """The counts in `data`, whose length is a whole number of entries."""
    counts = array(TYPECODES[refcount_order])
    if refcount_order < _BYTE_ORDER:
        packed = bytes(data)
        planes = _PLANES[refcount_order]
        unpacked = bytearray(len(packed) * len(planes))
        for position, table in enumerate(planes):
            unpacked[position :: len(planes)] = packed.translate(table)
        counts.frombytes(unpacked)
        return counts
    counts.frombytes(data)
    if sys.byteorder == "little":
        counts.byteswap()
    return counts


def encode_block(counts: array[int], refcount_order: int) -> bytes:
    """`counts` packed; the array is left as it is."""
    if refcount_order >= _BYTE_ORDER:
        if sys.byteorder == "little":
            counts = counts[:]
            counts.byteswap()
        return counts.tobytes()
    bits = 1 << refcount_order
    unpacked = counts.tobytes()
    too_large = unpacked.translate(None, bytes(range(1 << bits)))
    if too_large:
        raise OverflowError(f"refcount {max(too_large)} does not fit in {bits} bits")
    per_byte = 8 // bits
    # Each plane is one large integer whose bytes hold one small count each, so that shifting it
    # never carries from a byte into the next.
    packed = 0
    for position in range(per_byte):
        packed |= int.from_bytes(unpacked[position::per_byte], "little") << (position * bits)
    return packed.to_bytes(len(unpacked) // per_byte, "little")


def zero_block(entries: int, refcount_order: int) -> array[int]:
    """A new block in which every cluster is free."""
    typecode = TYPECODES[refcount_order]
    return array(typecode, bytes(entries * array(typecode).itemsize))
