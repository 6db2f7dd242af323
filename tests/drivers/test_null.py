"""``null-co`` and ``null-aio``: sizes and names as the real tools have them; nothing is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from blocklayer.errors import UnsupportedError, UsageError
from blocklayer.graph.extent import Kind
from blocklayer.units import GIB
from drivers.opening import READ, using
from oracles import Oracle


def run(coroutine: Any) -> None:
    asyncio.run(coroutine)


@pytest.mark.parametrize("driver", ["null-co", "null-aio"])
@pytest.mark.parametrize(
    "options", [{}, {"size": 1000}, {"size": "64M"}, {"read-zeroes": True}, {"latency-ns": 1}]
)
def test_size_and_name_are_those_of_qemu_img(
    qemu_img: Oracle, driver: str, options: dict[str, Any]
) -> None:
    image = "json:" + json.dumps({"driver": driver, **options})
    theirs = qemu_img.json("info", "--output=json", image)

    async def main() -> None:
        async with using(image, taken=READ) as root:
            assert root.node.size == theirs["virtual-size"]
            assert root.node.driver.actual_size() == theirs["actual-size"]
            ours, named = root.node.filename, theirs["filename"]
            assert ours.startswith("json:") == named.startswith("json:")

    run(main())


def test_the_name_holds_no_options(qemu_img: Oracle) -> None:
    async def main() -> None:
        async with using("null-co://", format="raw") as root:
            assert root.node.size == GIB
            assert root.node.filename == "null-co://"
        with pytest.raises(UsageError) as caught:
            async with using("null-co://,size=1M"):
                pass
        theirs = qemu_img("info", "null-co://,size=1M", check=False).stderr
        assert str(caught.value) in theirs

    run(main())


@pytest.mark.parametrize("latency_ns", [0, 1000])
def test_nothing_is_kept(latency_ns: int) -> None:
    async def main() -> None:
        options = {"driver": "null-co", "read-zeroes": True, "latency-ns": latency_ns}
        async with using(options) as root:
            await root.write(0, b"gone" * 1000)
            await root.write_zeroes(0, 4096)
            await root.discard(0, 4096)
            await root.flush()
            assert await root.read(0, 4096) == bytes(4096)
            assert (await root.node.driver.map(0, GIB)).kind is Kind.ZERO
            with pytest.raises(UnsupportedError, match="does not support resize"):
                await root.truncate(2 * GIB)
        async with using({"driver": "null-co"}) as root:
            assert (await root.node.driver.map(0, GIB)).kind is Kind.DATA

    run(main())
