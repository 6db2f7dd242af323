"""From one header to another by writes that each leave a header which can be read.

Public:
    rewriting(old, new) -> list[(offset, data)]: to be written in order, each durable before the
    next. `old` and `new` are whole first clusters.

A disk stores sectors whole, and nothing larger. A header that fills several sectors must therefore
not be changed by one write where what moves is in use: the name of the backing file, above all,
stands behind the extensions, and the first sector says where.

1. The name is copied to the end of the cluster first, where nothing is; the first sector points
   there while everything between changes.
2. Extensions that are added at the end are written from the back, those that go from the front:
   until the sector with the old end marker changes, nobody looks past it.
3. The first sector comes last, and says what holds from then on.
"""

from __future__ import annotations

from typing import Final

_SECTOR: Final = 512
_BACKING_FIELDS: Final = slice(8, 20)
"""Where the first sector has the offset (8 bytes) and the size (4) of the backing file's name."""


def rewriting(old: bytes, new: bytes) -> list[tuple[int, bytes]]:
    """The writes; none if the headers are the same."""
    changed = [at for at in range(0, len(new), _SECTOR) if old[at : at + _SECTOR] != _part(new, at)]
    if len(changed) <= 1:
        return [(at, _part(new, at)) for at in changed]
    old_end, new_end = _extensions_end(old), _extensions_end(new)
    name = _name(new)
    far = len(new) - len(name) - len(name) % 8
    if name and far < max(len(old.rstrip(b"\0")), len(new.rstrip(b"\0"))):
        # No room to be careful in; a header as full as that takes what it can get.
        start, end = changed[0], changed[-1] + _SECTOR
        return [(start, new[start:end])]
    same_extensions = old[_SECTOR:old_end] == new[_SECTOR:new_end]
    steps: list[tuple[int, bytes]] = []
    if (old[_BACKING_FIELDS], _name(old)) != (new[_BACKING_FIELDS], name):
        if name:
            steps.append((far, name))
        fields = (far if name else 0).to_bytes(8, "big") + len(name).to_bytes(4, "big")
        first = bytearray(_part(new if same_extensions else old, 0))
        first[_BACKING_FIELDS] = fields
        steps.append((0, bytes(first)))
    rest = [at for at in changed if at]
    steps += [(at, _part(new, at)) for at in (rest if new_end < old_end else reversed(rest))]
    steps.append((0, _part(new, 0)))
    if name:
        steps.append((far, new[far : far + len(name)]))
    return steps


def _part(header: bytes, at: int) -> bytes:
    return header[at : at + _SECTOR]


def _name_place(header: bytes) -> tuple[int, int]:
    fields = header[_BACKING_FIELDS]
    return int.from_bytes(fields[:8], "big"), int.from_bytes(fields[8:], "big")


def _name(header: bytes) -> bytes:
    offset, size = _name_place(header)
    return header[offset : offset + size] if offset else b""


def _extensions_end(header: bytes) -> int:
    offset, _ = _name_place(header)
    return offset or len(header.rstrip(b"\0"))
