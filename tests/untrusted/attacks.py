"""The attack images of public CVEs, made here: each names, or pretends, what it should not.

``Attack.make`` puts an image in a folder. All of them want the file ``secret`` opened, which lies
in another folder; no test may ever see that happen, nor its bytes change.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from blocklayer.codec.qcow2.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    INCOMPATIBLE_DATA_FILE,
    decode_header,
)
from oracles import require

SECRET = b"root:x:0:0:the host's own secret:/root:/bin/sh\n" * 100

Make = Callable[[Path, Path], Path]


class Attack(NamedTuple):
    """One image; ``format`` is what it is, ``finding`` what inspection must say of it."""

    name: str
    make: Make
    format: str
    finding: str


def _qcow2(folder: Path, size: str = "1M") -> Path:
    path = folder / "attack.qcow2"
    require("qemu-img")("create", "-q", "-f", "qcow2", path, size)
    return path


def _rewrite(path: Path, **changes: object) -> Path:
    """Change the header of a qcow2 image; the rest stays."""
    data = bytearray(path.read_bytes())
    header = decode_header(bytes(data[: 1 << 16]))
    for name, value in changes.items():
        setattr(header, name, value)
    data[: 1 << 16] = header.encode()
    path.write_bytes(data)
    return path


def backing_file(folder: Path, secret: Path) -> Path:
    """CVE-2015-5163: a backing file that is one of the host's."""
    return _rewrite(_qcow2(folder), backing_file=str(secret), backing_format="raw")


def backing_unnamed(folder: Path, secret: Path) -> Path:
    """The same, and its format to be guessed."""
    return _rewrite(_qcow2(folder), backing_file=str(secret))


def flat_extent(folder: Path, secret: Path) -> Path:
    """CVE-2022-47951: a descriptor whose extent is one of the host's files."""
    path = folder / "attack.vmdk"
    path.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 9 FLAT "{secret}" 0\n'
    )
    return path


def flat_in_sparse(folder: Path, secret: Path) -> Path:
    """The same descriptor inside of what looks like a sparse extent."""
    path = folder / "attack.vmdk"
    text = flat_extent(folder, secret).read_bytes()
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 0, 0, 128, 1, 20, 512, 0, 21, 128)
    path.write_bytes(header.ljust(512, b"\0") + text.ljust(20 * 512 + 65536, b"\0"))
    return path


def data_file(folder: Path, secret: Path) -> Path:
    """CVE-2024-32498: an external data file that is one of the host's."""
    return _rewrite(
        _qcow2(folder), incompatible_features=INCOMPATIBLE_DATA_FILE, data_file=str(secret)
    )


def data_file_raw(folder: Path, secret: Path) -> Path:
    """The same, said to be usable as a raw disk."""
    return _rewrite(
        _qcow2(folder),
        incompatible_features=INCOMPATIBLE_DATA_FILE,
        autoclear_features=AUTOCLEAR_DATA_FILE_RAW,
        data_file=str(secret),
    )


def json_data_file(folder: Path, secret: Path) -> Path:
    """CVE-2024-4467: the data file's name holds options, so that showing it opens any file."""
    name = "json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": str(secret)}}
    )
    return _rewrite(_qcow2(folder), incompatible_features=INCOMPATIBLE_DATA_FILE, data_file=name)


def json_backing(folder: Path, secret: Path) -> Path:
    """The same by a backing file."""
    name = "json:" + json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": str(secret)}}
    )
    return _rewrite(_qcow2(folder), backing_file=name, backing_format="raw")


def disguised(folder: Path, secret: Path) -> Path:
    """CVE-2024-44082: uploaded as a raw disk, while it is an image with a backing file."""
    path = backing_file(folder, secret)
    return path.rename(folder / "attack.raw")


def planted_header(folder: Path, secret: Path) -> Path:
    """CVE-2026-24708: a guest wrote an image's header to its raw disk, then asks for a resize."""
    header = data_file(folder, secret).read_bytes()
    path = folder / "flat.raw"
    path.write_bytes(header.ljust(2 << 20, b"\0"))
    return path


def nested(folder: Path, secret: Path) -> Path:
    """A good image of a disk that begins with a bad one's header: made raw, it turns into that."""
    inner = backing_file(folder, secret)
    outer = folder / "outer.qcow2"
    require("qemu-img")("convert", "-f", "raw", "-O", "qcow2", inner, outer)
    return outer


ATTACKS = (
    Attack("2015-5163", backing_file, "qcow2", "backing-file"),
    Attack("2015-5163-unnamed", backing_unnamed, "qcow2", "backing-format-missing"),
    Attack("2022-47951", flat_extent, "vmdk", "extent-file"),
    Attack("2022-47951-sparse", flat_in_sparse, "vmdk", "extent-file"),
    Attack("2024-32498", data_file, "qcow2", "data-file"),
    Attack("2024-32498-raw", data_file_raw, "qcow2", "data-file"),
    Attack("2024-4467", json_data_file, "qcow2", "reference-protocol"),
    Attack("2024-4467-backing", json_backing, "qcow2", "reference-protocol"),
    Attack("2024-44082", disguised, "qcow2", "backing-file"),
    Attack("2026-24708", planted_header, "qcow2", "data-file"),
    Attack("nested", nested, "qcow2", "nested-format"),
)
