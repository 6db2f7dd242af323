"""The same chains through the real tools and through ours: neither can tell who wrote what.

Images are drawn by hypothesis: every cluster size and refcount width, both versions, sizes that end
inside a cluster, 1 to 6 layers of any size over each other, and requests of every kind at the
borders of clusters, L2 tables and layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from blocklayer.api.disk import Disk
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.model import Chain, difference
from oracles import Oracle
from proof.chains import (
    Layered,
    blk,
    blk_json,
    drop,
    layered,
    model_of,
    our_create,
    our_fill,
    our_read,
    qemu_create,
    qemu_fill,
    run,
)

examples = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

UNPARSED = ("actual-size",)
"""How much a file takes on the host depends on who wrote it, and when."""


@pytest.fixture
def folder(tmpfs: Path) -> Iterator[Path]:
    """A folder that a test empties for each example."""
    place = tmpfs / "chain"
    yield place
    shutil.rmtree(place, ignore_errors=True)


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def same_map(qemu_img: Oracle, image: Path) -> None:
    assert blk_json("map", "-f", "qcow2", "--output=json", image) == qemu_img.json(
        "map", "-f", "qcow2", "--output=json", image
    )


def same_info(qemu_img: Oracle, image: Path) -> None:
    arguments = ("info", "-f", "qcow2", "--output=json", "--backing-chain", image)
    theirs = qemu_img.json(*arguments)
    assert drop(blk_json(*arguments), UNPARSED) == drop(theirs, UNPARSED)


def same_content(qemu_img: Oracle, image: Path, content: bytes) -> None:
    raw = image.with_suffix(".raw")
    raw.write_bytes(content)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, raw)
    raw.unlink()


def same_check(qemu_img: Oracle, image: Path) -> None:
    """Both find the image clean, and count the same."""
    theirs = qemu_img.json("check", "-f", "qcow2", "--output=json", image)
    ours = blk_json("check", "-f", "qcow2", "--output=json", image)
    assert drop(ours, ("filename",)) == drop(theirs, ("filename",))
    for found in ("corruptions", "leaks"):
        assert not theirs.get(found), f"{image.name}: {theirs}"


@examples
@given(chain=layered(granularity=512))
def test_they_write_we_read(
    qemu_img: Oracle, qemu_io: Oracle, folder: Path, chain: Layered
) -> None:
    place = emptied(folder)
    qemu_create(qemu_img, place, chain)
    qemu_fill(qemu_io, place, chain)
    model = model_of(chain)
    for depth, name in enumerate(reversed(chain.names)):
        image = place / name
        content = run(our_read(image))
        if depth == 0:
            # A discard leaves open what is read; who reads what is settled by comparing.
            same_content(qemu_img, image, content)
            if not any(r.kind == "discard" for _, requests in chain.layers for r in requests):
                expected = model.visible()
                assert content == expected, difference(content, expected)
        same_check(qemu_img, image)
    top = place / chain.names[-1]
    same_map(qemu_img, top)
    same_info(qemu_img, top)


@examples
@given(chain=layered())
def test_we_write_they_read(qemu_img: Oracle, folder: Path, chain: Layered) -> None:
    place = emptied(folder)
    run(our_create(place, chain))
    model = run(our_fill(place, chain))
    for name in chain.names:
        same_check(qemu_img, place / name)
    top = place / chain.names[-1]
    same_content(qemu_img, top, model.visible())
    same_map(qemu_img, top)
    same_info(qemu_img, top)


@examples
@given(chain=layered(most=3, granularity=512))
def test_we_go_on_where_they_stopped(
    qemu_img: Oracle, qemu_io: Oracle, folder: Path, chain: Layered
) -> None:
    """Both write to the same images in turns."""
    place = emptied(folder)
    qemu_create(qemu_img, place, chain)
    qemu_fill(qemu_io, place, chain)
    run(our_fill_over(place, chain))
    # QEMU refuses compressed writes to what is allocated.
    qemu_fill(qemu_io, place, chain.without("compress"))
    for name in chain.names:
        same_check(qemu_img, place / name)
        same_content(qemu_img, place / name, run(our_read(place / name)))
        same_map(qemu_img, place / name)


async def our_fill_over(place: Path, chain: Layered) -> None:
    for name, (shape, requests) in zip(chain.names, chain.layers, strict=True):
        async with await Disk.open(place / name, format="qcow2", writable=True) as disk:
            model = Chain(shape.size)
            model.write(0, await read_all(disk.root))
            for request in requests:
                await apply(disk.root, request)
                request.apply(model)
                model.settle(await read_all(disk.root))


@examples
@given(chain=layered(most=2, requests=0))
def test_new_images_are_described_alike(qemu_img: Oracle, folder: Path, chain: Layered) -> None:
    """Made by ours and made by theirs: the same information, the same host layout in the map."""
    ours, theirs = emptied(folder) / "ours", folder / "theirs"
    ours.mkdir()
    theirs.mkdir()
    run(our_create(ours, chain))
    qemu_create(qemu_img, theirs, chain)
    top = chain.names[-1]

    def described(image: Path) -> Any:
        arguments = ("info", "--output=json", "--backing-chain", image)
        text = drop(qemu_img.json(*arguments), UNPARSED)
        return drop(text, ("filename", "full-backing-filename", "virtual-size", "children"))

    assert described(ours / top) == described(theirs / top)
    same_info(qemu_img, ours / top)
    code, _, _ = blk("img", "compare", "-f", "qcow2", "-F", "qcow2", ours / top, theirs / top)
    assert code == 0
