"""Formats other than qcow2, by the same rules: qemu-img and blocklayer read each other's images."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

import blocklayer
from blocklayer import BlockError, aio
from blocklayer.cli.main import main
from drivers.images import (
    KINDS,
    MIB,
    Kind,
    apply,
    operations,
    read_all,
    write_ours,
    write_theirs,
)
from oracles import Oracle

CHECKED = ("vdi", "vhdx", "vmdk", "qed", "parallels")
"""Formats for which qemu-img has a check."""
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@each_kind
def test_qemu_reads_what_we_create_and_write(kind: Kind, tmpfs: Path, qemu_img: Oracle) -> None:
    image, raw = tmpfs / "image", tmpfs / "raw"
    kind.create(image)
    model = write_ours(image, kind, seed=1)
    assert len(model) == kind.disk_size
    raw.write_bytes(model)
    qemu_img("compare", "-f", kind.format, "-F", "raw", image, raw)
    if kind.format in CHECKED:
        qemu_img("check", "-f", kind.format, image)
    assert read_all(image, kind.format) == model


@each_kind
def test_we_read_and_continue_what_qemu_writes(
    kind: Kind, tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle
) -> None:
    image, raw = tmpfs / "image", tmpfs / "raw"
    kind.create_with(qemu_img, image)
    model = write_theirs(qemu_io, image, kind, seed=2)
    assert read_all(image, kind.format) == model
    with blocklayer.open(image, format=kind.format, writable=True) as disk:
        for offset in range(0, disk.size, MIB + 4096):
            disk.write(offset, b"new" * 100)
            model[offset : offset + 300] = (b"new" * 100)[: disk.size - offset]
    raw.write_bytes(model)
    qemu_img("compare", "-f", kind.format, "-F", "raw", image, raw)
    if kind.format in CHECKED:
        qemu_img("check", "-f", kind.format, image)


# qemu-img calls all of a vhdx image data: there is nothing to compare.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.format != "vhdx"], ids=str)
def test_map_is_what_qemu_says(kind: Kind, tmpfs: Path, qemu_img: Oracle, qemu_io: Oracle) -> None:
    image = tmpfs / "image"
    kind.create_with(qemu_img, image)
    write_theirs(qemu_io, image, kind, seed=3)
    theirs = qemu_img.json("map", "--output=json", "-f", kind.format, image)
    with blocklayer.open(image, format=kind.format) as disk:
        ours = [
            {
                name: getattr(entry, name)
                for name in ("start", "length", "depth", "present", "zero", "data", "compressed")
            }
            | ({} if entry.offset is None else {"offset": entry.offset})
            for entry in disk.map()
        ]
    assert _merged(ours) == _merged(theirs)


def _merged(entries: list[dict[str, int]]) -> list[dict[str, int]]:
    """Entries that say the same of neighbouring runs as one: where to split is nobody's promise."""
    merged: list[dict[str, int]] = []
    for entry in entries:
        if merged:
            last = merged[-1]
            same = all(
                last.get(k) == entry.get(k) for k in ("present", "zero", "data", "compressed")
            )
            follows = entry.get("offset") == (
                last["offset"] + last["length"] if "offset" in last else None
            )
            if same and follows:
                last["length"] += entry["length"]
                continue
        merged.append(dict(entry))
    return merged


@each_kind
def test_writes_side_by_side_do_not_meet(kind: Kind, tmpfs: Path, qemu_img: Oracle) -> None:
    image, raw = tmpfs / "image", tmpfs / "raw"
    kind.create(image)
    model = bytearray(kind.disk_size)

    async def run() -> None:
        async with await aio.Disk.open(image, format=kind.format, writable=True) as disk:
            pieces = list(range(0, disk.size, 96 * 1024))
            random.Random(4).shuffle(pieces)

            async def one(offset: int) -> None:
                data = bytes([1 + offset // 512 % 255]) * min(40000, disk.size - offset)
                await disk.write(offset, data)
                model[offset : offset + len(data)] = data
                if offset % 5 == 0:
                    await disk.flush()

            await asyncio.gather(*map(one, pieces))

    asyncio.run(run())
    raw.write_bytes(model)
    qemu_img("compare", "-f", kind.format, "-F", "raw", image, raw)
    if kind.format in CHECKED:
        qemu_img("check", "-f", kind.format, image)


@each_kind
def test_a_qcow2_overlay_reads_through_it(kind: Kind, tmpfs: Path, qemu_img: Oracle) -> None:
    base, overlay = tmpfs / "base", tmpfs / "overlay"
    kind.create(base)
    model = write_ours(base, kind, seed=5)
    blocklayer.create(overlay, format="qcow2", backing=base, backing_format=kind.format)
    with blocklayer.open(overlay, writable=True) as disk:
        assert disk.size == len(model)
        disk.write(MIB - 700, b"over" * 500)
    model[MIB - 700 : MIB + 1300] = b"over" * 500
    assert read_all(overlay, "qcow2") == model
    raw = tmpfs / "raw"
    raw.write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay, raw)


@each_kind
def test_what_is_converted_into_it(kind: Kind, tmpfs: Path, qemu_img: Oracle) -> None:
    """Data by the megabyte, single sectors, and holes; the copy engine allocates in runs."""
    image, raw = tmpfs / "image", tmpfs / "raw"
    model = bytearray(kind.disk_size)
    for what, offset, length, byte in operations(11, len(model), 60):
        apply(model, what, offset, length, byte)
    raw.write_bytes(model)
    options = [f"-o{key}={value}" for key, value in kind.options.items()]
    command = ["img", "convert", "-f", "raw", "-O", kind.format, *options, str(raw), str(image)]
    assert main(command) == 0
    qemu_img("compare", "-f", kind.format, "-F", "raw", image, raw)
    if kind.format in CHECKED:
        qemu_img("check", "-f", kind.format, image)
    assert read_all(image, kind.format)[: len(model)] == model


@each_kind
def test_damaged_images_are_refused_or_read(kind: Kind, tmpfs: Path) -> None:
    """Whatever the bytes say, the answer is data or a BlockError: no hang, no crash, no bomb."""
    image, damaged = tmpfs / "image", tmpfs / "damaged"
    kind.create(image)
    write_ours(image, kind, seed=6)
    whole = image.read_bytes()
    places = [at for at in range(0, len(whole), 512) if any(whole[at : at + 512])]
    # Guest data is runs of one byte; only sectors that are not are worth damaging.
    places = [at for at in places if len(set(whole[at : at + 512])) > 1][:400]
    chance = random.Random(7)
    for _ in range(40):
        mutated = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice(places) + chance.randrange(512)
            mutated[at : at + 4] = chance.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", chance.randbytes(4)]
            )
        if chance.random() < 0.1:
            del mutated[chance.randrange(len(mutated)) :]
        damaged.write_bytes(mutated)
        try:
            with blocklayer.open(damaged, format=kind.format) as disk:
                for entry in disk.map(0, min(disk.size, 64 * MIB)):
                    disk.read(entry.start, min(entry.length, 4096))
        except BlockError:
            continue


@each_kind
def test_info_says_what_qemu_says(
    kind: Kind, tmpfs: Path, qemu_img: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmpfs / "image"
    kind.create(image)
    theirs = qemu_img.json("info", "--output=json", "-f", kind.format, image)
    assert main(["img", "info", "--output=json", "-f", kind.format, str(image)]) == 0
    assert json.loads(capsys.readouterr().out) == theirs
