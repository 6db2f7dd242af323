"""Chains of images drawn by hypothesis, made by the real tools or by ours, for the proof suites."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from hypothesis import strategies as st

from blocklayer.api.disk import Disk, create
from blocklayer.cli.main import main
from blocklayer.testing.contract import apply, read_all
from blocklayer.testing.model import Chain, Layer
from blocklayer.testing.strategies import Request, Shape, request_lists, shapes
from oracles import Oracle

T = TypeVar("T")


class Layered(msgspec.Struct, frozen=True):
    """A chain to be made: for each layer, base first, its shape and what is done to it."""

    layers: list[tuple[Shape, list[Request]]]

    @property
    def names(self) -> list[str]:
        """The files' names, base first."""
        return [f"layer{number}.qcow2" for number in range(len(self.layers))]

    def without(self, kind: str) -> Layered:
        """The same chain without the requests of one kind."""
        return Layered(
            [(shape, [r for r in requests if r.kind != kind]) for shape, requests in self.layers]
        )


@st.composite
def layered(
    draw: st.DrawFn, *, most: int = 6, requests: int = 8, granularity: int = 1, large: bool = True
) -> Layered:
    """Chains of 1 to `most` layers with requests to each."""
    layers: list[tuple[Shape, list[Request]]] = []
    for _ in range(draw(st.integers(1, most))):
        shape = draw(shapes(large=large))
        below = [other.size for other, _ in layers]
        wanted = request_lists(shape, below, most=requests, granularity=granularity)
        layers.append((shape, _compressed_once(draw(wanted), shape)))
    return Layered(layers)


def _compressed_once(requests: list[Request], shape: Shape) -> list[Request]:
    """Without compressed writes to clusters that were touched before: QEMU refuses those."""
    touched: set[int] = set()
    kept: list[Request] = []
    for request in requests:
        end = request.offset + request.length - 1
        met = range(request.offset // shape.cluster_size, end // shape.cluster_size + 1)
        if request.kind != "compress" or touched.isdisjoint(met):
            kept.append(request)
            touched.update(met)
    return kept


def qemu_create(qemu_img: Oracle, folder: Path, chain: Layered) -> None:
    """Make the files of a chain with the real tool."""
    backing: list[str] = []
    for name, (shape, _) in zip(chain.names, chain.layers, strict=True):
        place = [name, str(shape.size)]
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", shape.option_text(), *backing, *place, cwd=folder
        )
        backing = ["-b", name, "-F", "qcow2"]


def qemu_fill(qemu_io: Oracle, folder: Path, chain: Layered) -> None:
    """Send each layer its requests with the real tool, in one process."""
    commands: list[str] = []
    for name, (_, requests) in zip(chain.names, chain.layers, strict=True):
        if requests:
            commands.append(f"open -o driver=qcow2,discard=unmap {name}")
            commands += [request.command() for request in requests]
            commands.append("close")
    if commands:
        qemu_io(*(part for command in commands for part in ("-c", command)), cwd=folder)


def model_of(chain: Layered) -> Chain:
    """What the guest of the topmost layer sees of a chain that the real tools filled."""
    model = Chain()
    for shape, requests in chain.layers:
        model.layers.append(Layer(shape.size))
        for request in requests:
            request.apply(model, request.flat())
    return model


async def our_create(folder: Path, chain: Layered) -> None:
    """Make the files of a chain with our library."""
    backing: dict[str, Any] = {}
    for name, (shape, _) in zip(chain.names, chain.layers, strict=True):
        await create(folder / name, shape.size, **backing, **shape.options())
        backing = {"backing": name, "backing_format": "qcow2"}


async def our_fill(folder: Path, chain: Layered) -> Chain:
    """Send each layer its requests with our library; the answer is what the top's guest sees."""
    model = Chain()
    for name, (shape, requests) in zip(chain.names, chain.layers, strict=True):
        model.layers.append(Layer(shape.size))
        async with await Disk.open(folder / name, format="qcow2", writable=True) as disk:
            for request in requests:
                await apply(disk.root, request)
                request.apply(model)
            model.settle(await read_all(disk.root))
    return model


async def our_read(image: Path, format: str | None = "qcow2") -> bytes:
    """All that the guest sees."""
    async with await Disk.open(image, format=format) as disk:
        return await read_all(disk.root)


def blk(*arguments: object, check: bool = True) -> tuple[int, str, str]:
    """Run `blk` in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments], "blk")
    said = err.getvalue()
    assert "Traceback" not in said, said
    if check:
        assert code == 0, f"blk {arguments}: exit code {code}: {said}{out.getvalue()}"
    return code, out.getvalue(), said


def blk_json(*arguments: object) -> Any:
    """Run `blk img …` and decode what it prints."""
    return json.loads(blk("img", *arguments)[1])


def drop(document: Any, names: Sequence[str]) -> Any:
    """A JSON document without the members `names`, at any depth."""
    if isinstance(document, dict):
        return {k: drop(v, names) for k, v in document.items() if k not in names}
    return [drop(item, names) for item in document] if isinstance(document, list) else document


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine on a loop of its own."""
    return asyncio.run(coroutine)
