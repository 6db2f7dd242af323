"""Images of every geometry against a model of plain bytes and against the real tools.

Requests run through the graph; after each life of the image `qemu-img check` finds nothing, and
`qemu-img compare` finds the model's bytes. Some of the writing is done by `qemu-io`.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.graph.root import Root
from effort import examples
from oracles import Oracle
from qcow2.images import opened, run

MIB = 1 << 20
SIZES = (MIB, 512 * 3001, 3 * MIB + 512 * 7)
LENGTHS = (1, 512, 4096, 65536, 300000)

standard = st.fixed_dictionaries(
    {
        "cluster_size": st.sampled_from((512, 1024, 4096, 65536, 2 * MIB)),
        "refcount_bits": st.sampled_from((1, 2, 4, 8, 16, 32, 64)),
        "lazy_refcounts": st.sampled_from(("off", "on")),
        "compat": st.sampled_from(("1.1", "1.1", "0.10")),
    }
).map(lambda g: g if g["compat"] == "1.1" else g | {"refcount_bits": 16, "lazy_refcounts": "off"})
extended = st.fixed_dictionaries(
    {
        "cluster_size": st.sampled_from((16384, 65536, 2 * MIB)),
        "refcount_bits": st.sampled_from((1, 16)),
        "lazy_refcounts": st.sampled_from(("off", "on")),
        "compat": st.just("1.1"),
        "extended_l2": st.just("on"),
    }
)
geometries: st.SearchStrategy[dict[str, Any]] = st.one_of(standard, standard, extended)

options = st.fixed_dictionaries(
    {},
    optional={
        "l2_cache_size": st.just(1024),
        "l2_cache_entry_size": st.just(512),
        "pass_discard_other": st.just(True),
        "overlap_check": st.sampled_from(("none", "constant", "all")),
    },
)

VERBS = ("write", "write", "write", "together", "zero", "unmap", "compress", "discard", "flush")
VERBS += ("shrink", "grow", "read")
requests = st.lists(
    st.tuples(st.sampled_from(VERBS), st.integers(0, 1 << 30), st.sampled_from(LENGTHS)),
    min_size=1,
    max_size=25,
)


class Disk:
    """A root and the bytes that it must show."""

    def __init__(self, root: Root, model: bytearray, cluster_size: int) -> None:
        self.root = root
        self.model = model
        self.cluster_size = cluster_size

    async def write(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        await self.root.write(offset, data)

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.model[offset : offset + length] = bytes(length)
        await self.root.write_zeroes(offset, length, unmap=unmap)

    async def request(self, verb: str, position: int, length: int) -> None:
        """One request; ``position`` also seeds what is written."""
        size, dice = len(self.model), random.Random(position)
        offset = position % size
        length = min(length, size - offset)
        if verb == "write":
            await self.write(offset, dice.randbytes(length))
        elif verb == "together":
            await asyncio.gather(*(self._one_of_many(dice, number) for number in range(8)))
        elif verb in ("zero", "unmap"):
            await self.zero(offset, length, verb == "unmap")
        elif verb == "compress":
            offset -= offset % self.cluster_size
            length = min(self.cluster_size, size - offset)
            data = (dice.randbytes(99) * (length // 99 + 1))[:length]
            self.model[offset : offset + length] = data
            await self.root.write_compressed(offset, data)
        elif verb == "discard":
            await self._discard(offset, length)
        elif verb == "flush":
            await self.root.flush()
        elif verb == "shrink":
            await self._resize(max(512, (size - offset // 2) // 512 * 512))
        elif verb == "grow":
            await self._resize(size + (offset // 2) // 512 * 512)
        else:
            assert await self.root.read(offset, length) == self.model[offset : offset + length]

    async def _one_of_many(self, dice: random.Random, number: int) -> None:
        """A request in its own eighth of the disk, which meets others' clusters all the same."""
        share = len(self.model) // 8
        offset = number * share + dice.randrange(share)
        length = min(dice.choice(LENGTHS), (number + 1) * share - offset)
        await dice.choice(
            (
                lambda: self.write(offset, dice.randbytes(length)),
                lambda: self.zero(offset, length, unmap=True),
                self.root.flush,
            )
        )()

    async def _discard(self, offset: int, length: int) -> None:
        await self.root.discard(offset, length)
        left = await self.root.read(offset, length)
        before = self.model[offset : offset + length]
        assert all(now in (0, then) for now, then in zip(left, before, strict=True))
        self.model[offset : offset + length] = left

    async def _resize(self, size: int) -> None:
        await self.root.truncate(size, shrink=True)
        grown = size - len(self.model)
        del self.model[size:]
        self.model += bytes(max(0, grown))


async def live(
    path: Path, model: bytearray, steps: list[Any], cluster_size: int, given: Any
) -> None:
    async with opened(path, **given) as root:
        disk = Disk(root, model, cluster_size)
        for verb, position, length in steps:
            await disk.request(verb, position, length)
        assert await root.read(0, len(model)) == model


def verify(path: Path, model: bytearray, qemu_img: Oracle) -> None:
    assert "No errors were found" in qemu_img("check", path).stdout
    plain = path.with_suffix(".raw")
    plain.write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, plain)


def spell(geometry: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in geometry.items())


@settings(max_examples=examples(10))
@given(geometries, options, st.sampled_from(SIZES), requests, requests)
def test_alone(
    qemu_img: Oracle,
    qemu_io: Oracle,
    geometry: dict[str, Any],
    given: dict[str, Any],
    size: int,
    first: list[Any],
    second: list[Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", spell(geometry), path, str(size))
        model = bytearray(size)
        run(live(path, model, first, geometry["cluster_size"], given))
        verify(path, model, qemu_img)
        offset = len(model) // 3 // 512 * 512
        length = min(70000, len(model) - offset) // 512 * 512
        qemu_io("-f", "qcow2", "-c", f"write -P 9 {offset} {length}", path)
        model[offset : offset + length] = b"\x09" * length
        run(live(path, model, second, geometry["cluster_size"], given))
        verify(path, model, qemu_img)


@settings(max_examples=examples(10))
@given(
    geometries,
    st.sampled_from((512, 65536)),
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.booleans(),
    requests,
)
def test_over_a_backing_file_and_beside_a_snapshot(
    qemu_img: Oracle,
    qemu_io: Oracle,
    geometry: dict[str, Any],
    below: int,
    backing_size: int,
    size: int,
    snapshot: bool,
    steps: list[Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base, path = Path(folder) / "base.qcow2", Path(folder) / "a.qcow2"
        qemu_img(
            "create", "-q", "-f", "qcow2", "-o", f"cluster_size={below}", base, str(backing_size)
        )
        model = bytearray(backing_size)
        commands: list[str] = []
        for number in range(5):
            offset = number * backing_size // 5 // 512 * 512
            length = min(backing_size - offset, (512, 100 * 512, 300 * 512)[number % 3])
            model[offset : offset + length] = bytes([number + 1]) * length
            commands += ["-c", f"write -P {number + 1} {offset} {length}"]
        qemu_io("-f", "qcow2", *commands, base)
        arguments = ("-o", spell(geometry), "-b", base, "-F", "qcow2", path, str(size))
        qemu_img("create", "-q", "-f", "qcow2", *arguments)
        model = model[:size] + bytes(max(0, size - backing_size))
        qemu_io("-f", "qcow2", "-c", "write -P 77 200k 100k", path)
        model[200 << 10 : 300 << 10] = b"\x4d" * (100 << 10)
        kept = bytes(model)
        # A version 2 image with a snapshot cannot be resized.
        snapshot = snapshot and geometry["refcount_bits"] >= 8 and geometry["compat"] == "1.1"
        if snapshot:
            qemu_img("snapshot", "-c", "one", path)
        run(live(path, model, steps, geometry["cluster_size"], {}))
        verify(path, model, qemu_img)
        if snapshot:
            qemu_img("snapshot", "-a", "one", path)
            verify(path, bytearray(kept), qemu_img)
