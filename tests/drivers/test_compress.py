"""compress: what is written through it is compressed, and reads the same for the real tools."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from blocklayer import aio
from blocklayer.drivers import REGISTRY
from blocklayer.errors import UsageError
from blocklayer.graph.graph import Graph
from blocklayer.graph.node import Flags
from blocklayer.graph.open import open_options
from blocklayer.graph.permission import Permission
from blocklayer.graph.root import Root
from blocklayer.units import KIB
from oracles import Oracle

SIZE = 2048 * KIB + 512 * 5


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_compressed(
    tmp_path: Path, qemu_img: Oracle, qemu_io: Oracle, seed: int
) -> None:
    path = tmp_path / "a.qcow2"
    content = bytearray(SIZE)

    async def scene() -> None:
        await aio.create(path, SIZE)
        image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        node = await open_options(
            Graph(REGISTRY), {"driver": "compress", "file": image}, Flags(read_only=False)
        )
        root = Root(node, "the guest", Permission.CONSISTENT_READ | Permission.WRITE)
        chance = random.Random(seed)
        for _ in range(40):
            length = chance.choice((512, 64 * KIB, 200_192, 512 * 1025))
            offset = chance.randrange((SIZE - length) // 512 + 1) * 512
            if chance.random() < 0.3:
                offset = SIZE - length
            data = chance.randbytes(16) * (length // 16)
            await root.write(offset, data)
            content[offset : offset + length] = data
            assert await root.read(0, SIZE) == content
        await root.close()

    asyncio.run(scene())
    assert qemu_img.json("check", "--output=json", path)["compressed-clusters"] > 0
    raw = tmp_path / "a.raw"
    raw.write_bytes(content)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    assert qemu_io("-c", "read 0 1M", path).returncode == 0


def test_only_formats_that_compress(tmp_path: Path) -> None:
    async def scene() -> None:
        graph = Graph(REGISTRY)
        options = {"driver": "compress", "file": {"driver": "memory", "size": 512}}
        with pytest.raises(UsageError, match="not supported for underlying format: memory"):
            await open_options(graph, options, Flags(read_only=False))
        assert not graph.nodes

    asyncio.run(scene())
