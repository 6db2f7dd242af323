"""The VMDK descriptor: which extents make up a disk, and which disk is its parent.

Public:
    Descriptor(cid, parent_cid, create_type, parent, extents), parse_descriptor(data)
    ExtentLine(access, sectors, type, filename, start)
    format_descriptor(…) -> bytes, with_cid(data, cid) -> bytes, is_descriptor(head) -> bool
    NO_PARENT, MAX_SIZE

1. Only lines that are understood count; an extent that is not is an error, since what follows it
   would lie elsewhere.
2. File names are bytes to the host; those that are no UTF-8 survive the round trip.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from blocklayer.errors import FormatError, UnsupportedError, UsageError

MAX_SIZE: Final = 1 << 20
"""Bytes that a descriptor may have."""
MAX_EXTENTS: Final = 4096
NO_PARENT: Final = 0xFFFFFFFF
_MAX_SECTORS: Final = 1 << 54
_MAX_NAME: Final = 1023

FLAT: Final = ("FLAT", "VMFS")
SPARSE: Final = ("SPARSE",)
ZERO: Final = ("ZERO",)

_CID = re.compile(rb"^CID[ \t]*=[ \t]*[0-9a-fA-F]{1,8}(?=[ \t]*\r?$)", re.MULTILINE)
_ACCESSES: Final = ("RW", "RDONLY", "NOACCESS")
_EXTENT = re.compile(
    r'(?P<access>[A-Z]+)\s+(?P<sectors>\d{1,19})\s+(?P<type>[A-Z0-9]+)'
    r'(?:\s+"(?P<name>[^"]*)")?(?:\s+(?P<start>\d{1,19}))?'
)  # fmt: skip


class ExtentLine(msgspec.Struct, frozen=True):
    """One extent; ``start`` is where a flat one begins in its file, in sectors."""

    access: str
    sectors: int
    type: str
    filename: str
    start: int = 0


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """What the text says."""

    cid: int
    parent_cid: int
    create_type: str
    parent: str | None
    extents: list[ExtentLine]


def is_descriptor(head: bytes) -> bool:
    """Whether an image that starts with ``head`` is a descriptor: its first statement tells."""
    for line in head.split(b"\n"):
        text = line.rstrip(b"\r")
        if text.startswith(b"#") or not text.strip(b" "):
            continue
        return text in (b"version=1", b"version=2", b"version=3")
    return False


def parse_descriptor(data: bytes) -> Descriptor:
    """The descriptor in ``data``, which may be followed by zeros. Raises FormatError."""
    text = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    values: dict[str, str] = {}
    extents: list[ExtentLine] = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.split(None, 1)[0] in _ACCESSES:
            match = _EXTENT.match(line)
            if match is None:
                raise FormatError(f"Invalid extent line: {line[:200]}")
            if len(extents) == MAX_EXTENTS:
                raise FormatError(f"The VMDK descriptor names more than {MAX_EXTENTS} extents")
            extents.append(_extent(match, line))
            continue
        name, equals, value = line.partition("=")
        if equals:
            values.setdefault(name.strip(), value.strip().strip('"'))
    return Descriptor(
        cid=_number(values, "CID", 0),
        parent_cid=_number(values, "parentCID", NO_PARENT),
        create_type=values.get("createType", ""),
        parent=values.get("parentFileNameHint") or None,
        extents=extents,
    )


def _number(values: dict[str, str], name: str, default: int) -> int:
    text = values.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", text):
        raise FormatError(f"The VMDK descriptor's {name} is no number: '{text[:80]}'")
    return int(text, 16)


def _extent(match: re.Match[str], line: str) -> ExtentLine:
    kind, name, start = match["type"], match["name"], match["start"]
    sectors = int(match["sectors"])
    if kind not in (*FLAT, *SPARSE, *ZERO):
        raise UnsupportedError(f"Unsupported VMDK extent type '{kind}'")
    if match["access"] == "NOACCESS":
        raise UnsupportedError("A VMDK extent that may not be accessed is not supported")
    if (not name and kind not in ZERO) or (kind == "FLAT" and start is None):
        raise FormatError(f"Invalid extent line: {line[:200]}")
    if not sectors < _MAX_SECTORS or int(start or 0) >= _MAX_SECTORS:
        raise FormatError(f"A VMDK extent of {sectors} sectors is too large")
    return ExtentLine(match["access"], sectors, kind, name or "", int(start or 0))


def with_cid(data: bytes, cid: int) -> bytes:
    """``data`` with another content identity, of the same length where there is room."""
    changed = _CID.sub(b"CID=%08x" % cid, data, count=1)
    if len(changed) > len(data) and changed.endswith(bytes(len(changed) - len(data))):
        return changed[: len(data)]
    return changed


def format_descriptor(
    *,
    cid: int,
    parent_cid: int,
    create_type: str,
    parent: str | None,
    extents: list[ExtentLine],
    hardware_version: str,
    adapter_type: str,
    tools_version: str,
) -> bytes:
    """The text of a new disk's descriptor."""
    for name in (parent or "", *(extent.filename for extent in extents)):
        if len(name) > _MAX_NAME or any(character in name for character in '"\n\r'):
            raise UsageError(f"A VMDK descriptor cannot hold the file name '{name[:80]}'")
    sectors = sum(extent.sectors for extent in extents)
    heads = 16 if adapter_type == "ide" else 255
    hint = f'parentFileNameHint="{parent}"\n' if parent else ""
    lines = "".join(_extent_line(extent) for extent in extents)
    text = (
        f"# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\n"
        f'createType="{create_type}"\n{hint}\n# Extent description\n{lines}\n'
        f'# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = "{hardware_version}"\n'
        f'ddb.geometry.cylinders = "{sectors // (heads * 63)}"\n'
        f'ddb.geometry.heads = "{heads}"\nddb.geometry.sectors = "63"\n'
        f'ddb.adapterType = "{adapter_type}"\nddb.toolsVersion = "{tools_version}"\n'
    )
    return text.encode("utf-8", "surrogateescape")


def _extent_line(extent: ExtentLine) -> str:
    start = f" {extent.start}" if extent.type in FLAT else ""
    return f'{extent.access} {extent.sectors} {extent.type} "{extent.filename}"{start}\n'
